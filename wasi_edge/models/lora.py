"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv 2106.09685) of queries and values, the usual choice for ViT.

    q = x Wq^T + bq + (x Aq^T) Bq^T        v likewise        A (r, D) random, B (D, r) zero at first

Every weight of the network stays; A, B and the classifier learn, under autograd. The update is added inside the
product (`addmm`) and not as a tensor of its own. Scale is one (alpha = r). What is stored is the sum: a dense network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wasi_edge.errors import UsageError
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.geometry_swin import Geometry
from wasi_edge.models.vanilla import VanillaBlock, VanillaViT, build_vanilla

_UPDATES = ("query_down", "query_up", "value_down", "value_up")


class LoraBlock(VanillaBlock):
    """A block with updates of rank r beside its queries and values."""

    def __init__(self, geometry: ViTGeometry, rank: int) -> None:
        super().__init__(geometry)
        width = geometry.width
        self.query_down, self.value_down = (nn.Parameter(torch.empty(rank, width)) for _ in range(2))
        self.query_up, self.value_up = (nn.Parameter(torch.empty(width, rank)) for _ in range(2))

    def heads_of(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> queries, keys and values (B, H, N, d)."""
        batch, tokens, width = normed.shape
        x = normed.reshape(-1, width)
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).split(width, dim=1)
        q = torch.addmm(q, x @ self.query_down.t(), self.query_up.t())
        v = torch.addmm(v, x @ self.value_down.t(), self.value_up.t())
        q, k, v = (part.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2) for part in (q, k, v))
        return q, k, v

    def merged_weight(self) -> Tensor:
        """qkv's weight (3D, D) with the updates in it, a new tensor."""
        merged = self.qkv.weight.detach().clone()
        width = merged.shape[1]
        merged[:width].addmm_(self.query_up.detach(), self.query_down.detach())
        merged[2 * width :].addmm_(self.value_up.detach(), self.value_down.detach())
        return merged

    def merge(self) -> None:
        """Put the updates into qkv's weight; they are zero afterwards."""
        self.qkv.weight.data.copy_(self.merged_weight())
        self.query_up.data.zero_()
        self.value_up.data.zero_()


def is_update(name: str) -> bool:
    """Whether a parameter of this name is part of an update."""
    return name.rpartition(".")[2] in _UPDATES


def for_vit(geometry: Geometry) -> ViTGeometry:
    """`geometry`, if it is a ViT's. Raises UsageError for others."""
    if not isinstance(geometry, ViTGeometry):
        raise UsageError("lora is for ViT; choose another --method for Swin: wasi, wsi, asi, vanilla or head")
    return geometry


def build_lora(
    geometry: Geometry, read: Callable[[str], Tensor], image_size: int, num_classes: int, rank: int, seed: int
) -> VanillaViT:
    """A network whose updates and classifier alone require gradients; arguments as for `build_vanilla`.

    Raises UsageError as `for_vit` does.
    """
    vit = for_vit(geometry)
    generator = torch.Generator().manual_seed(seed)

    def read_or_start(name: str) -> Tensor:
        if not is_update(name):
            return read(name)
        if name.endswith("_up"):
            return torch.zeros(vit.width, rank)
        bound = vit.width**-0.5  # as for a linear layer
        return torch.empty(rank, vit.width).uniform_(-bound, bound, generator=generator)

    model = build_vanilla(geometry, read_or_start, image_size, num_classes, lambda: LoraBlock(vit, rank))
    assert isinstance(model, VanillaViT)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_update(name) or name.startswith("head."))
    return model
