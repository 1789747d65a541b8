"""Swin's windows as numbers: which token is where, what keeps strangers apart (Liu et al. 2021, section 3.2). No torch.

Tokens of a grid are numbered row by row. A block works on them in the order of its own windows, one window after the
other, each row by row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from wasi_edge.models.geometry_swin import SwinGeometry

# what keeps parts of a shifted window apart that are no neighbours, as in the authors' code
APART = -100.0


class EntryOrder(NamedTuple):
    """How tokens come to a block: token i of it is token `order[i]` of the block before, or four of them side by side
    where it `merges`."""

    order: np.ndarray
    merges: bool


def entry_order(geometry: SwinGeometry, index: int, image_size: int) -> EntryOrder | None:
    """From the order that block `index` - 1 leaves tokens in to that of this block's windows; None where they agree."""
    stage, number = geometry.stage_of(index)
    wanted = block_order(geometry, index, image_size)
    before = np.arange(len(wanted)) if index == 0 else block_order(geometry, index - 1, image_size)
    place = np.argsort(before)  # of each token of the grid, where it is now
    if stage and not number:
        grid = geometry.grid(image_size) >> stage
        row, column = wanted // grid, wanted % grid
        four = [(2 * row + down) * 2 * grid + 2 * column + right for right in (0, 1) for down in (0, 1)]
        return EntryOrder(place[np.stack(four, 1).reshape(-1)], True)
    return None if np.array_equal(before, wanted) else EntryOrder(place[wanted], False)


def block_order(geometry: SwinGeometry, index: int, image_size: int) -> np.ndarray:
    """Numbers of the tokens of the grid, row by row, in the order of the windows of block `index`, (N,)."""
    grid = geometry.grid(image_size) >> geometry.stage_of(index)[0]
    return window_order(grid, geometry.window_at(image_size), geometry.shift_at(image_size, index))


def window_order(grid: int, window: int, shift: int) -> np.ndarray:
    """Numbers of the tokens of a grid, row by row, in the order of windows that are shifted to the right and down; what
    is beyond the edge comes from the other one, (grid * grid,)."""
    numbers = np.roll(np.arange(grid * grid).reshape(grid, grid), (-shift, -shift), (0, 1))
    return _by_window(numbers, window).reshape(-1)


def relative_index(window: int) -> np.ndarray:
    """Row of the bias table for each pair of tokens of a window, (w * w, w * w)."""
    places = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij")).reshape(2, -1)
    down, right = places[:, :, None] - places[:, None, :] + window - 1
    return down * (2 * window - 1) + right


def shift_mask(grid: int, window: int, shift: int) -> np.ndarray | None:
    """What is added to the scores of each window, float32 (windows, w * w, w * w): `APART` between tokens that only the
    shift brought together. None without a shift."""
    if not shift:
        return None
    place = np.arange(grid)
    part = (place >= grid - window).astype(np.int8) + (place >= grid - shift)
    parts = _by_window(3 * part[:, None] + part[None, :], window)
    return np.where(parts[:, :, None] != parts[:, None, :], np.float32(APART), np.float32(0))


def _by_window(grid: np.ndarray, window: int) -> np.ndarray:
    """(g, g) -> (windows, w * w)."""
    count = len(grid) // window
    return grid.reshape(count, window, count, window).swapaxes(1, 2).reshape(count * count, window * window)
