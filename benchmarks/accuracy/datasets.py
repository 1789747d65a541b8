"""The evaluation sets in memory, and who is in which part of them.

Photos are shrunk once, as `finetune` shrinks them. A split is a list of photo names for each part: `fixed_split` is the
one that defaults are chosen by, checked in under `splits/`; `random_split` is drawn from a seed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.mosaics import tiles_of
from wasi_edge.preprocess import center_view, normalise, open_photo, shrink
from wasi_edge.preprocessing import Preprocessing

ROOT = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SPLITS = Path(__file__).parent / "splits"
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Photos:
    """Shrunk photos uint8 (h, w, 3), their names and classes; stands in for the photo cache of a run."""

    shrunk: list[np.ndarray]
    names: list[str]
    labels: Tensor
    classes: list[str]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.shrunk)

    def read(self, i: int) -> np.ndarray:
        """Photo i, as `PhotoCache.read`."""
        return self.shrunk[i]

    def inputs(self, indices: Sequence[int]) -> Tensor:
        """Centre views, normalised: (n, 3, S, S)."""
        views = np.stack([center_view(self.shrunk[i], self.preprocessing) for i in indices])
        return torch.from_numpy(normalise(views, self.preprocessing))


@dataclass(frozen=True)
class Split:
    """Indices into `Photos`, by part."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def load_photos(name: str, preprocessing: Preprocessing, per_class: int | None = None, first: int = 0) -> Photos:
    """All photos of `clothing`, `flowers`, `hymenoptera` or `cifar10`, or so many of each class from the `first` on.

    Raises FileNotFoundError where the data is absent.
    """
    folder = ROOT / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is absent: these photos are not part of the project")
    taken: Counter[str] = Counter()

    def is_wanted(label: str) -> bool:
        taken[label] += 1
        return taken[label] > first and (per_class is None or taken[label] <= first + per_class)

    every = _mosaic_tiles(folder) if name == "cifar10" else _folder_photos(folder)
    return shrunk_photos((entry for entry in every if is_wanted(entry[0])), preprocessing)


def shrunk_photos(entries: Iterable[tuple[str, str, Path | Image.Image]], preprocessing: Preprocessing) -> Photos:
    """Pictures with their classes and names, shrunk as `finetune` does; classes in the order they come in."""
    shrunk, names, labels = [], [], []
    classes: list[str] = []
    for label, photo, image in entries:
        if label not in classes:
            classes.append(label)
        opened = open_photo(image, preprocessing.resize_side) if isinstance(image, Path) else image
        shrunk.append(shrink(opened, preprocessing))
        names.append(photo)
        labels.append(classes.index(label))
    return Photos(shrunk, names, torch.tensor(labels), classes, preprocessing)


def all_photos(folder: Path) -> list[Path]:
    """Photos of a folder and the folders in it, by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))


def _folder_photos(folder: Path) -> Iterator[tuple[str, str, Path]]:
    for path in all_photos(folder):
        yield path.parent.name, path.relative_to(folder).as_posix(), path


def _mosaic_tiles(folder: Path) -> Iterator[tuple[str, str, Image.Image]]:
    """Training tiles of every class; the test mosaics are other photos, and read by name `test/...`."""
    for part in ("train", "test"):
        for path in sorted((folder / part).glob("*.webp")):
            for number, tile in enumerate(tiles_of(path)):
                yield path.stem, f"{part}/{path.stem}/{number:04d}", Image.fromarray(tile)


def random_split(photos: Photos, seed: int, shares: tuple[float, float, float] = (0.6, 0.2, 0.2)) -> Split:
    """Of every class the same shares, in an order that `seed` alone decides."""
    rng = np.random.default_rng(seed)
    parts: list[list[int]] = [[], [], []]
    bounds = np.cumsum((0.0, *shares))
    for label in range(len(photos.classes)):
        members = rng.permutation(np.flatnonzero(photos.labels.numpy() == label))
        cuts = np.round(bounds * len(members)).astype(int)
        for part, first, last in zip(parts, cuts[:-1], cuts[1:], strict=True):
            part.extend(members[first:last].tolist())
    return Split(*(np.array(sorted(part)) for part in parts))


def fixed_split(name: str, photos: Photos) -> Split:
    """The split of `splits/<name>.json`: lists of photo names; those of a smaller `photos` that are there."""
    named = json.loads((SPLITS / f"{name}.json").read_text())
    index = {photo: i for i, photo in enumerate(photos.names)}
    return Split(*(np.array([index[photo] for photo in named[part] if photo in index]) for part in PARTS))


def folds(name: str, photos: Photos, number: int, parts: int = 4) -> Split:
    """Fold `number` of what the fixed split does not keep for tests: one of `parts` validates, the others train.

    Validation photos stand in for test photos too, which these splits leave alone.
    """
    held = fixed_split(name, photos)
    pool = np.sort(np.concatenate([held.train, held.val]))
    rng = np.random.default_rng(1000)
    train: list[int] = []
    val: list[int] = []
    for label in range(len(photos.classes)):
        members = rng.permutation(pool[photos.labels.numpy()[pool] == label])
        for index, part in enumerate(np.array_split(members, parts)):
            (val if index == number else train).extend(part.tolist())
    return Split(np.array(sorted(train)), np.array(sorted(val)), np.array(sorted(val)))


def write_fixed_split(name: str, photos: Photos, seed: int = 0) -> None:
    """Draw the split of `name` and check it in."""
    split = random_split(photos, seed)
    named = {part: [photos.names[i] for i in getattr(split, part)] for part in PARTS}
    SPLITS.mkdir(exist_ok=True)
    (SPLITS / f"{name}.json").write_text(json.dumps(named, indent=0) + "\n")
