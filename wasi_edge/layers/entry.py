"""How tokens come to a block whose neighbourhoods are not those of the block before.

    Reorder   the same tokens in the order of this block's windows
    Merge     four neighbours side by side, normed and made one of twice their width (Liu et al. 2021, section 3.1)

Blocks work on windows that are runs of rows, so what others do as rolling and partitioning around every attention is
here one gather between two blocks.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from wasi_edge.layers.linear import Linear
from wasi_edge.layers.norm import LayerNorm, SavedNorm
from wasi_edge.layers.saving import Pass


class SavedEntry(NamedTuple):
    """What the backward pass reads: shape of the input, and of a merge its norm."""

    shape: tuple[int, int, int]
    norm: SavedNorm | None


class Reorder:
    """Token i of the result is token `order[i]` of the input."""

    def __init__(self, order: Tensor, gradient_name: str) -> None:
        self._order, self._inverse = order, torch.argsort(order)
        self._gradient_name = gradient_name

    @property
    def layers(self) -> dict[str, Linear | LayerNorm]:
        """Nothing here learns."""
        return {}

    def forward(
        self, x: Tensor, run: Pass, save_as: str | None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, SavedEntry]:
        """(B, N, D) -> (B, N, D), in the buffer that blocks with another order read."""
        y = run.workspace.take("block.in", tuple(x.shape), x.dtype)
        return _gather(x, self._order, y, run), SavedEntry((x.shape[0], x.shape[1], x.shape[2]), None)

    def backward(self, saved: SavedEntry, dy: Tensor, run: Pass) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        """Gradient of x (B, N, D), in a buffer."""
        dx = run.workspace.take(self._gradient_name, saved.shape, dy.dtype)
        return _gather(dy, self._inverse, dx, run), {}


class Merge:
    """`order` (4 N', ): four tokens of the input for each of the result, side by side."""

    def __init__(self, order: Tensor, norm: LayerNorm, linear: Linear, gradient_name: str) -> None:
        self._order, self._inverse = order, torch.argsort(order)
        self.norm, self.linear = norm, linear
        self._gradient_name = gradient_name

    @property
    def layers(self) -> dict[str, Linear | LayerNorm]:
        """By name, in the order of the forward pass."""
        return {"merge_norm": self.norm, "merge": self.linear}

    def forward(
        self, x: Tensor, run: Pass, save_as: str | None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, SavedEntry]:
        """(B, N, D) -> (B, N / 4, 2 D), in the buffer that blocks with another order read."""
        normed, saved = self.norm.forward(self._gathered(x, run), run, save_as, dtype)
        batch, tokens, width = x.shape
        y = run.workspace.take("block.in", (batch * tokens // 4, 2 * width), x.dtype)
        y, _ = self.linear.forward(normed, tokens // 4, run, None, out=y)
        return y.view(batch, tokens // 4, 2 * width), SavedEntry((batch, tokens, width), saved)

    def backward(self, saved: SavedEntry, dy: Tensor, run: Pass) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        """Gradient of x (B, N, D), in a buffer, and those of norm and linear."""
        assert saved.norm is not None
        batch, tokens, width = saved.shape
        normed = self.norm.again(saved.norm, run)
        dnormed = run.workspace.take("block.branch", (len(normed), 4 * width), dy.dtype)
        dnormed, linear = self.linear.backward_from_input(normed, dy.view(-1, 2 * width), run, out=dnormed)
        dgathered, norm = self.norm.backward(saved.norm, dnormed, run)
        dx = run.workspace.take(self._gradient_name, saved.shape, dy.dtype)
        dx = _gather(dgathered.view(batch, tokens, width), self._inverse, dx, run)
        return dx, {"merge_norm": norm, "merge": linear}

    def gathered_norm(self, x: Tensor, run: Pass) -> Tensor:
        """What the linear sees (T / 4, 4 D), in the buffer that all norms share."""
        return self.norm.forward(self._gathered(x, run), run, None)[0]

    def _gathered(self, x: Tensor, run: Pass) -> Tensor:
        batch, tokens, width = x.shape
        gathered = run.workspace.take("block.branch", (batch, tokens, width), x.dtype)
        return _gather(x, self._order, gathered, run).view(batch * tokens // 4, 4 * width)


Entry = Reorder | Merge


def _gather(x: Tensor, order: Tensor, out: Tensor, run: Pass) -> Tensor:
    """Tokens `order` of x (B, N, D), into `out`; how long it takes is counted."""
    began = time.perf_counter()
    torch.index_select(x, 1, order, out=out)
    run.gather_seconds += time.perf_counter() - began
    return out
