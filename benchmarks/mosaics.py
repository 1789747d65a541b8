"""Data sets of small pictures, stored as one mosaic a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

TILE = 32


def tiles_of(path: Path) -> np.ndarray:
    """All tiles of a mosaic, row by row: uint8 (n, 32, 32, 3)."""
    with Image.open(path) as mosaic:
        pixels = np.asarray(mosaic.convert("RGB"))
    rows, columns = pixels.shape[0] // TILE, pixels.shape[1] // TILE
    return pixels.reshape(rows, TILE, columns, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
