"""Random crops of pictures, a function of the step alone: a run that was stopped sees the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from wasi_edge.data.augment import augment, epoch_order


@dataclass(frozen=True)
class Crops:
    """All pictures pass once an epoch. `scale`: of the area, least and most; `turns`: input size and number of pictures
    of a step, steps go through these in turn; `side`: of the crops, px, before they are made as small as the input, or
    None: cut at the size of the input."""

    pictures: Sequence[np.ndarray]
    scale: tuple[float, float]
    turns: tuple[tuple[int, int], ...]
    seed: int
    side: int | None = None

    def of_step(self, step: int) -> tuple[list[int], int, np.ndarray]:
        """Which pictures a step sees, the input size, and their crops: uint8 (B, side, side, 3)."""
        counts = [count for _, count in self.turns]
        rounds, turn = divmod(step, len(self.turns))
        first = rounds * sum(counts) + sum(counts[:turn])
        size, count = self.turns[turn]
        places = [divmod(number, len(self.pictures)) for number in range(first, first + count)]
        chosen = [(epoch, int(_order(len(self.pictures), self.seed, epoch)[at])) for epoch, at in places]
        side = self.side or size
        views = [augment(self.pictures[i], side, self.seed, epoch, i, self.scale) for epoch, i in chosen]
        return [i for _, i in chosen], size, np.stack(views)

    def of_all(self, scale: tuple[float, float], count: int | None = None) -> np.ndarray:
        """One crop each of the first `count` pictures: uint8 (count, side, side, 3)."""
        side = self.side or self.turns[0][0]
        pictures = enumerate(self.pictures[:count])
        return np.stack([augment(picture, side, self.seed + 7, 0, i, scale) for i, picture in pictures])


@lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return epoch_order(count, seed, epoch)


def mixed(views: np.ndarray, seed: int) -> np.ndarray:
    """Every picture with another one, in random shares: uint8 like `views`."""
    share = np.random.default_rng(seed).random((len(views), 1, 1, 1), dtype=np.float32)
    return (share * views + (1 - share) * views[::-1]).round().astype(np.uint8)


def shrunk(views: np.ndarray, size: int) -> np.ndarray:
    """uint8 (B, S, S, 3) -> (B, size, size, 3)."""
    resized = (Image.fromarray(view).resize((size, size), Image.Resampling.BICUBIC) for view in views)
    return np.stack([np.asarray(view) for view in resized])
