"""The network that is made into the default model, while it learns: linears of blocks as balanced pairs of factors, any
input size. Under torch autograd; memory does not matter here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wasi_edge.artefact import Artefact
from wasi_edge.models.network import resampled
from wasi_edge.models.vanilla import VanillaViT


class TwoFactors(nn.Module):
    """x -> (x R^T) L^T + b."""

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor) -> None:
        super().__init__()
        balance = (right.norm(dim=1) / left.norm(dim=0)).sqrt()
        self.left = nn.Parameter(left * balance)
        self.right = nn.Parameter(right / balance[:, None])
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.right), self.left, self.bias)


class Sized:
    """A network whose position table is resampled to the size of what it sees, and not trained.

    With `bfloat16`, its matrix products are computed in that precision; parameters and results stay float32.
    """

    def __init__(self, model: VanillaViT, position: Tensor, sizes: Sequence[int], bfloat16: bool) -> None:
        self.model = model
        self._bfloat16 = bfloat16
        self._tables = {size: resampled("position", position, model.geometry, size).clone() for size in sizes}

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, S, S) -> tokens after the last norm (B, N, D), and what a head reads of them (B, F)."""
        self.model.position = nn.Parameter(self._tables[pixels.shape[-1]], requires_grad=False)
        hidden: list[Tensor] = []
        hook = self.model.norm.register_forward_hook(lambda _, __, output: hidden.append(output))
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            read = self.model.features(pixels)
        hook.remove()
        return hidden[0].float(), read.float()

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters that learn, by name: neither the position table nor a head."""
        named = self.model.named_parameters()
        return {name: value for name, value in named if name != "position" and not name.startswith("head.")}


def factored(artefact: Artefact) -> list[str]:
    """Linears that the artefact has in factors."""
    return [name for name, rank in artefact.config.linears.items() if rank is not None]


@torch.no_grad()
def in_factors(student: VanillaViT, artefact: Artefact) -> VanillaViT:
    """`student` with what the artefact has, linears of blocks as pairs."""
    stored = lambda name: torch.from_numpy(artefact.tensors.read(name, np.float32))  # noqa: E731
    for name in factored(artefact):
        _, index, linear = name.split(".")
        pair = TwoFactors(stored(f"{name}.left"), stored(f"{name}.right"), stored(f"{name}.bias"))
        setattr(student.blocks[int(index)], linear, pair)
    for name, parameter in student.named_parameters():
        if name != "position" and not name.startswith("head.") and not name.endswith((".left", ".right")):
            parameter.copy_(stored(name))
    return student
