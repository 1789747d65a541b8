"""LayerNorm with an explicit backward that needs only the normalised input.

x_hat = (x - mean) * rstd,  y = x_hat * weight + bias. The backward pass reads x_hat and rstd, never x: x_hat is
bounded by sqrt(D), so it can wait in float16 without overflow, which the residual stream x cannot promise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wasi_edge.chunks import NORM_ROWS
from wasi_edge.layers.saving import Pass


class SavedNorm(NamedTuple):
    """`x_hat` (T, D) in the saving dtype, `rstd` (T, 1) and, where x itself is to be rebuilt, `mean` (T, 1) in x's."""

    x_hat: Tensor
    rstd: Tensor
    mean: Tensor | None = None


class LayerNorm:
    """`params`: weight (D,), bias (D,)."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.params = {"weight": weight, "bias": bias}
        self.eps = eps

    def forward(
        self, x: Tensor, run: Pass, save_as: str | None, dtype: torch.dtype | None = None, with_mean: bool = False
    ) -> tuple[Tensor, SavedNorm | None]:
        """(T, D) -> (T, D), in the buffer all norms share. With `save_as`, x_hat is kept under that name in `dtype`
        (x's own), and all that `inputs` needs if `with_mean`."""
        take, shape = run.workspace.take, (x.shape[0], x.shape[1])
        weight, bias = self.params["weight"], self.params["bias"]
        y = take("norm.out", shape, x.dtype)
        saved = None
        if save_as is not None:
            saved = SavedNorm(
                take(save_as, shape, dtype or x.dtype),
                take(f"{save_as}.rstd", (shape[0], 1), x.dtype),
                take(f"{save_as}.mean", (shape[0], 1), x.dtype) if with_mean else None,
            )
        for rows in _chunks(shape[0]):
            x_hat, mean, rstd = torch.native_layer_norm(x[rows], (shape[1],), None, None, self.eps)
            if saved is not None:
                saved.x_hat[rows] = x_hat
                saved.rstd[rows] = rstd
                if saved.mean is not None:
                    saved.mean[rows] = mean
            torch.addcmul(bias, x_hat, weight, out=y[rows])
        return y, saved

    def again(self, saved: SavedNorm, run: Pass) -> Tensor:
        """The output (T, D) of `forward` once more, in the buffer all norms share."""
        weight, bias = self.params["weight"], self.params["bias"]
        y = run.workspace.take("norm.out", tuple(saved.x_hat.shape), saved.rstd.dtype)
        for rows in _chunks(len(y)):
            torch.addcmul(bias, saved.x_hat[rows].to(y.dtype), weight, out=y[rows])
        return y

    def inputs(self, saved: SavedNorm, out: Tensor) -> Tensor:
        """x (T, D), into `out`, as exactly as x_hat was kept."""
        assert saved.mean is not None, "the mean was not kept"
        for rows in _chunks(len(out)):
            torch.div(saved.x_hat[rows].to(out.dtype), saved.rstd[rows], out=out[rows]).add_(saved.mean[rows])
        return out

    def backward(self, saved: SavedNorm, dy: Tensor, run: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        """(T, D) -> gradient of x (T, D), in the buffer all norms share, and of weight and bias."""
        tokens, width = dy.shape
        weight, bias = self.params["weight"], self.params["bias"]
        dx = run.workspace.take("norm.out", (tokens, width), dy.dtype)
        grads = {"weight": torch.zeros_like(weight), "bias": torch.zeros_like(bias)}
        zero, one = torch.zeros(NORM_ROWS, 1, dtype=dy.dtype), torch.ones(NORM_ROWS, 1, dtype=dy.dtype)
        for rows in _chunks(tokens):
            count = len(dy[rows])
            # x_hat has mean 0 and rstd 1 by construction, so torch's kernel on x_hat gives dx / rstd
            part, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
                dy[rows],
                saved.x_hat[rows].to(dy.dtype),
                (width,),
                zero[:count],
                one[:count],
                weight,
                bias,
                [True, True, True],
            )
            torch.mul(part, saved.rstd[rows], out=dx[rows])
            grads["weight"].add_(dweight)
            grads["bias"].add_(dbias)
        return dx, grads


def _chunks(tokens: int) -> Iterator[slice]:
    """A few tokens at a time: what the kernels return is small and still in the cache when it is copied."""
    return (slice(first, min(first + NORM_ROWS, tokens)) for first in range(0, tokens, NORM_ROWS))
