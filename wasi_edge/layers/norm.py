"""LayerNorm with an explicit backward that needs only the normalised input.

x_hat = (x - mean) * rstd,  y = x_hat * weight + bias. The backward pass reads x_hat and rstd, never x: x_hat is
bounded by sqrt(D), so it can wait in float16 without overflow, which the residual stream x cannot promise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wasi_edge.layers.saving import Pass


class SavedNorm(NamedTuple):
    """`x_hat` (T, D) in the saving dtype and `rstd` (T, 1) float32."""

    x_hat: Tensor
    rstd: Tensor


class LayerNorm:
    """`params`: weight (D,), bias (D,)."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.params = {"weight": weight, "bias": bias}
        self.eps = eps

    def forward(
        self, x: Tensor, run: Pass, save_as: str | None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, SavedNorm | None]:
        """(T, D) -> (T, D). With `save_as`, x_hat is kept under that name in `dtype` (x's own)."""
        width = x.shape[-1]
        weight, bias = self.params["weight"], self.params["bias"]
        if save_as is None:
            return torch.native_layer_norm(x, (width,), weight, bias, self.eps)[0], None
        x_hat, _, rstd = torch.native_layer_norm(x, (width,), None, None, self.eps)
        saved = SavedNorm(run.workspace.keep(save_as, x_hat, dtype or x.dtype), rstd)
        return x_hat.mul_(weight).add_(bias), saved

    def backward(self, saved: SavedNorm, dy: Tensor, run: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        """(T, D) -> gradient of x (T, D), and of weight and bias."""
        x_hat = saved.x_hat
        if x_hat.dtype != dy.dtype:
            # widened into a buffer that only the forward pass of a block uses
            x_hat = run.workspace.keep("block.middle", x_hat, dy.dtype)
        tokens, width = dy.shape
        # x_hat has mean 0 and rstd 1 by construction, so torch's kernel on x_hat gives dx / rstd
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dy,
            x_hat,
            (width,),
            torch.zeros(tokens, 1, dtype=dy.dtype),
            torch.ones(tokens, 1, dtype=dy.dtype),
            self.params["weight"],
            self.params["bias"],
            [True, True, True],
        )
        return dx.mul_(saved.rstd), {"weight": dweight, "bias": dbias}
