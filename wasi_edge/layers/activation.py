"""GELU (exact, erf) with an explicit backward.

Kept is either the input a, or the derivative gelu'(a) in 8 bits: it lies in [-0.1290, 1.1290], so 255 levels give
a rounding error of at most 0.0025, a quarter of the bytes of a.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wasi_edge.chunks import GELU_ROWS
from wasi_edge.layers.saving import Pass

_LOWEST, _HIGHEST = -0.13, 1.13
_STEP = (_HIGHEST - _LOWEST) / 255


class SavedGelu(NamedTuple):
    """Exactly one is set: `inputs` (T, M) float, or `derivative` (T, M) uint8."""

    inputs: Tensor | None
    derivative: Tensor | None


def keep_gelu(a: Tensor, run: Pass, save_as: str | None, compact: bool) -> SavedGelu | None:
    """What the backward pass needs of GELU's input a (T, M): its derivative, or a itself where it is; nothing without
    a name."""
    if save_as is None:
        return None
    if not compact:
        return SavedGelu(a, None)
    derivative = run.workspace.take(save_as, tuple(a.shape), torch.uint8)
    # contiguous: for an expanded one the kernel makes a copy of its whole output
    one = run.workspace.take("gelu.one", (min(GELU_ROWS, len(a)), a.shape[1]), a.dtype).fill_(1.0)
    for inputs, target in zip(a.split(GELU_ROWS), derivative.split(GELU_ROWS), strict=True):
        slope = run.workspace.take("gelu.slope", tuple(inputs.shape), a.dtype)
        torch.ops.aten.gelu_backward.grad_input(one[: len(inputs)], inputs, grad_input=slope)
        # + 0.5 because conversion to an integer truncates
        target.copy_(slope.sub_(_LOWEST).mul_(1 / _STEP).add_(0.5))
    return SavedGelu(None, derivative)


def gelu(a: Tensor, saved: SavedGelu | None, run: Pass) -> Tensor:
    """gelu(a) (T, M), in place; where `saved` refers to a, in the buffer that all blocks share."""
    if saved is None or saved.inputs is None:
        return torch.ops.aten.gelu_(a)
    return torch.ops.aten.gelu.out(a, out=run.workspace.take("block.inner", tuple(a.shape), a.dtype))


def gelu_backward(saved: SavedGelu, dy: Tensor, run: Pass) -> Tensor:
    """(T, M) -> gradient of a (T, M), in place in `dy`."""
    if saved.inputs is not None:
        return torch.ops.aten.gelu_backward.grad_input(dy, saved.inputs, grad_input=dy)
    assert saved.derivative is not None
    for gradient, derivative in zip(dy.split(GELU_ROWS), saved.derivative.split(GELU_ROWS), strict=True):
        slope = run.workspace.keep("gelu.slope", derivative, dy.dtype)
        gradient.mul_(slope.mul_(_STEP).add_(_LOWEST))
    return dy
