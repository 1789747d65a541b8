"""Ten tasks as an owner's photos are: few photos of a few classes, each with test photos that nothing chooses by.

A default, a rate, a rule counts when it holds on tasks that did not choose it: candidates are compared on all tasks but
one and reported on that one (`leave_one_out.py`). Every task has splits 0, 1, 2: of each class so many photos to train
on, a quarter as many that choose the epoch, and test photos, in an order that the task and the split alone decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.accuracy.datasets import ROOT, Photos, Split, all_photos, shrunk_photos
from benchmarks.mosaics import tiles_of
from wasi_edge.preprocessing import Preprocessing

SPLITS = (0, 1, 2)
TINY = "tiny-imagenet-32"
# draws of classes of Tiny ImageNet: how many, and from where on in one fixed order. The model that ships was healed on
# all classes, so its figures on these tasks flatter it; one that is made anew has to leave `reserved_classes` out
TINY_DRAWS = {"tiny-a": (10, 0), "tiny-b": (10, 10), "tiny-50": (50, 20)}


@dataclass(frozen=True)
class Task:
    """`train` photos of each class to learn from, `test` to test on where there are so many; `size`: of the input."""

    name: str
    data: str
    size: int
    train: int
    test: int

    @property
    def val(self) -> int:
        """Photos of each class that choose the epoch."""
        return max(4, self.train // 4)

    def photos(self, preprocessing: Preprocessing) -> Photos:
        """All of the task's photos at its size. Raises FileNotFoundError where the data is absent."""
        return _photos(self, preprocessing.with_image_size(self.size))

    def pictures(self) -> list[Path | Image.Image]:
        """The same pictures as they are on disk, in the same order."""
        return [picture for _, _, picture in _pictures(self)]

    def split(self, photos: Photos, number: int) -> Split:
        """Split `number`. Photos whose data has a test part of its own are tested on those alone."""
        rng = np.random.default_rng([number, *self.name.encode()])
        parts: list[list[int]] = [[], [], []]
        labels = photos.labels.numpy()
        for label in range(len(photos.classes)):
            members = rng.permutation(np.flatnonzero(labels == label)).tolist()
            for_tests = [i for i in members if photos.names[i].startswith("test/")]
            others = [i for i in members if not photos.names[i].startswith("test/")]
            parts[0] += others[: self.train]
            parts[1] += others[self.train : self.train + self.val]
            parts[2] += (for_tests or others[self.train + self.val :])[: self.test]
        return Split(*(np.array(sorted(part)) for part in parts))


TASKS = (
    Task("clothing-10", "clothing", 168, 10, 80),
    Task("clothing-40", "clothing", 168, 40, 80),
    Task("flowers-20", "flowers", 112, 20, 60),
    Task("flowers-80", "flowers", 112, 80, 60),
    Task("hymenoptera", "hymenoptera", 168, 24, 20),
    Task("cifar10-20", "cifar10", 84, 20, 50),
    Task("cifar10-80", "cifar10", 84, 80, 50),
    Task("tiny-a", TINY, 84, 40, 50),
    Task("tiny-b", TINY, 84, 40, 50),
    Task("tiny-50", TINY, 84, 20, 10),
)
# of each class of the large sets, those that the splits draw from
_POOL = 200


def find_task(name: str) -> Task:
    """The task of that name. Raises KeyError where there is none."""
    return {task.name: task for task in TASKS}[name]


def tiny_classes(task: str) -> tuple[str, ...]:
    """Classes (wnids) of a draw of Tiny ImageNet: no two draws share one."""
    names = sorted(path.stem for path in (ROOT / TINY / "train").glob("*.webp"))
    count, first = TINY_DRAWS[task]
    order = np.random.default_rng(2026).permutation(len(names))
    return tuple(sorted(names[i] for i in order[first : first + count]))


def reserved_classes() -> tuple[str, ...]:
    """Classes of Tiny ImageNet that tasks are made of: what a shipped model is made from leaves them out."""
    return tuple(sorted(name for task in TINY_DRAWS for name in tiny_classes(task)))


@lru_cache(maxsize=3)
def _photos(task: Task, preprocessing: Preprocessing) -> Photos:
    if not (ROOT / task.data).is_dir():
        raise FileNotFoundError(f"{ROOT / task.data} is absent: these photos are not part of the project")
    return shrunk_photos(_pictures(task), preprocessing)


def _pictures(task: Task) -> Iterator[tuple[str, str, Path | Image.Image]]:
    """Class, name and picture; names of what only tests may use begin with `test/`."""
    folder = ROOT / task.data
    if task.data in ("cifar10", TINY):
        wanted = tiny_classes(task.name) if task.data == TINY else None
        for part, its_tests in (("train", "train"), ("test" if task.data == "cifar10" else "val", "test")):
            for path in sorted((folder / part).glob("*.webp")):
                if wanted is None or path.stem in wanted:
                    for number, tile in enumerate(tiles_of(path)[:_POOL]):
                        yield path.stem, f"{its_tests}/{path.stem}/{number:04d}", Image.fromarray(tile)
        return
    for path in all_photos(folder):
        yield path.parent.name, path.relative_to(folder).as_posix().replace("val/", "").replace("train/", ""), path
