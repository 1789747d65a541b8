"""What the default model is made from: unlabelled photos, and small labelled pictures (tiles) in mosaics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.mosaics import tiles_of

_PHOTOS = (".jpg", ".jpeg", ".png")


def photo_paths(folder: Path) -> list[Path]:
    """Photos of a flat folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _PHOTOS)


@dataclass(frozen=True)
class Tiles:
    """`pictures` uint8 (n, 32, 32, 3) and `labels` int64 (n,), class after class, as many of each of `classes`."""

    pictures: np.ndarray
    labels: np.ndarray
    classes: int

    def spread(self, count: int) -> np.ndarray:
        """Indices of `count` tiles: the first of each class, then the second of each, and so on."""
        return np.arange(len(self.labels)).reshape(self.classes, -1).T.ravel()[:count]


def read_tiles(folder: Path) -> Tiles:
    """All training tiles: `train/` holds one mosaic a class. Raises FileNotFoundError where there is none."""
    paths = sorted((folder / "train").glob("*.webp"))
    if not paths:
        raise FileNotFoundError(f"expected mosaics train/*.webp in {folder}, found none")
    pictures = [tiles_of(path) for path in paths]
    return Tiles(np.concatenate(pictures), np.repeat(np.arange(len(paths)), len(pictures[0])), len(paths))
