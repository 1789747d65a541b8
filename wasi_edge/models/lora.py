"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv 2106.09685) of queries and values, the usual choice.

    q = x Wq^T + bq + (x Aq^T) Bq^T        v likewise        A (r, D) random, B (D, r) zero at first

Every weight of the network stays; A, B and the classifier learn, under autograd. The update is added inside the
product (`addmm`) and not as a tensor of its own. Scale is one (alpha = r). What is stored is the sum: a dense network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.geometry_swin import Geometry, SwinGeometry
from wasi_edge.models.vanilla import VanillaBlock, VanillaViT, build_vanilla
from wasi_edge.models.vanilla_swin import VanillaSwin, VanillaSwinBlock

_UPDATES = ("query_down", "query_up", "value_down", "value_up")


class LowRankUpdates(nn.Module):
    """Of queries and values, for a block with a linear `qkv` and `heads` that asks `heads_of` for its heads."""

    qkv: nn.Linear
    heads: int

    def add_updates(self, rank: int) -> None:
        """Uninitialised ones of rank r."""
        width = self.qkv.in_features
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

    def merge_updates(self) -> None:
        """Put the updates into qkv's weight; they are zero afterwards."""
        self.qkv.weight.data.copy_(self.merged_weight())
        self.query_up.data.zero_()
        self.value_up.data.zero_()


class LoraBlock(LowRankUpdates, VanillaBlock):
    """A block of ViT with updates."""

    def __init__(self, geometry: ViTGeometry, rank: int) -> None:
        super().__init__(geometry)
        self.add_updates(rank)


class LoraSwinBlock(LowRankUpdates, VanillaSwinBlock):
    """A block of Swin with updates."""

    def __init__(self, geometry: SwinGeometry, index: int, image_size: int, rank: int) -> None:
        super().__init__(geometry, index, image_size)
        self.add_updates(rank)


def lora_block(geometry: Geometry, index: int, image_size: int, rank: int) -> LoraBlock | LoraSwinBlock:
    """Block `index` alone, uninitialised."""
    if isinstance(geometry, SwinGeometry):
        return LoraSwinBlock(geometry, index, image_size, rank)
    return LoraBlock(geometry, rank)


def is_update(name: str) -> bool:
    """Whether a parameter of this name is part of an update."""
    return name.rpartition(".")[2] in _UPDATES


def build_lora(
    geometry: Geometry, read: Callable[[str], Tensor], image_size: int, num_classes: int, rank: int, seed: int
) -> VanillaViT | VanillaSwin:
    """A network whose updates and classifier alone require gradients; arguments as for `build_vanilla`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = geometry.block_shapes(image_size)

    def read_or_start(name: str) -> Tensor:
        if not is_update(name):
            return read(name)
        width = shapes[int(name.split(".")[1])].width
        if name.endswith("_up"):
            return torch.zeros(width, rank)
        bound = width**-0.5  # as for a linear layer
        return torch.empty(rank, width).uniform_(-bound, bound, generator=generator)

    def block(index: int) -> LoraBlock | LoraSwinBlock:
        return lora_block(geometry, index, image_size, rank)

    model = build_vanilla(geometry, read_or_start, image_size, num_classes, block)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_update(name) or name.startswith("head."))
    return model
