"""What the default model is made from: unlabelled photos, and small labelled pictures (tiles) in mosaics.

Pictures that are evaluation photos, or crops of them, are left out: `overlap.json` names them, `overlap` finds them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.accuracy.datasets import all_photos
from benchmarks.accuracy.tasks import reserved_classes
from benchmarks.mosaics import tiles_of

OVERLAP = Path(__file__).parent / "overlap.json"
# bees: `hymenoptera` was taken from the same photos, and not every crop of one can be found
_BEES = "n02206856"


def photo_paths(folder: Path) -> list[Path]:
    """Photos of a folder, by path, that are not evaluation photos."""
    seen = _evaluation_pictures()
    return [path for path in all_photos(folder) if path.name not in seen]


@dataclass(frozen=True)
class Tiles:
    """`pictures` uint8 (n, 32, 32, 3) and `labels` int64 (n,), class after class, as many of each of `names`."""

    pictures: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]

    @property
    def classes(self) -> int:
        """How many."""
        return len(self.names)

    def spread(self, count: int) -> np.ndarray:
        """Indices of `count` tiles: the first of each class, then the second of each, and so on."""
        return np.arange(len(self.labels)).reshape(self.classes, -1).T.ravel()[:count]


def read_tiles(folder: Path) -> Tiles:
    """Training tiles that a model may be made from: of classes that no evaluation task is drawn from, without those
    that are evaluation photos. Raises FileNotFoundError where there is none."""
    every, seen, without = all_tiles(folder), _evaluation_pictures(), {_BEES, *reserved_classes()}
    each = len(every.labels) // every.classes
    kept = {
        label: [label * each + i for i in range(each) if f"{name}/{i}" not in seen]
        for label, name in enumerate(every.names)
        if name not in without
    }
    count = min(map(len, kept.values()))
    chosen = np.array([i for members in kept.values() for i in members[:count]])
    names = tuple(every.names[label] for label in kept)
    return Tiles(every.pictures[chosen], np.repeat(np.arange(len(names)), count), names)


def all_tiles(folder: Path) -> Tiles:
    """All training tiles: `train/` holds one mosaic a class. Raises FileNotFoundError where there is none."""
    paths = sorted((folder / "train").glob("*.webp"))
    if not paths:
        raise FileNotFoundError(f"expected mosaics train/*.webp in {folder}, found none")
    pictures, names = [tiles_of(path) for path in paths], tuple(path.stem for path in paths)
    return Tiles(np.concatenate(pictures), np.repeat(np.arange(len(paths)), len(pictures[0])), names)


def _evaluation_pictures() -> set[str]:
    return {pair["picture"] for pair in json.loads(OVERLAP.read_text())}
