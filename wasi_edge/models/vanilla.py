"""The same Vision Transformer as a plain `nn.Module` under torch autograd with fused attention.

This is what everybody else runs: `--method vanilla`, the yardstick of every comparison, and the oracle that the
explicit layers are tested against. Parameter names are those of the artefact with dense linears.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.geometry_swin import Geometry, SwinGeometry
from wasi_edge.models.network import resampled
from wasi_edge.models.vanilla_swin import VanillaSwin, VanillaSwinBlock


class VanillaBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, geometry: ViTGeometry) -> None:
        super().__init__()
        width = geometry.width
        self.heads = geometry.heads
        self.norm1 = nn.LayerNorm(width, eps=geometry.norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=geometry.norm_eps)
        self.fc1 = nn.Linear(width, geometry.mlp_width)
        self.fc2 = nn.Linear(geometry.mlp_width, width)
        self.scale1 = nn.Parameter(torch.ones(width)) if geometry.layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(width)) if geometry.layer_scale else None

    def heads_of(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> queries, keys and values (B, H, N, d)."""
        batch, tokens, width = normed.shape
        q, k, v = self.qkv(normed).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """(B, N, D) -> (B, n, D) for the first n = `queries` tokens, or all of them."""
        q, k, v = self.heads_of(self.norm1(x))
        if queries is not None:
            q, x = q[:, :, :queries], x[:, :queries]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        branch = self.proj(mixed)
        x = x + (branch if self.scale1 is None else branch * self.scale1)
        branch = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + (branch if self.scale2 is None else branch * self.scale2)


class VanillaViT(nn.Module):
    """(B, C, S, S) -> logits (B, classes), or features (B, F) through `features`.

    With `checkpointed`, blocks keep their input alone for the backward pass and run a second time there.
    """

    def __init__(
        self,
        geometry: ViTGeometry,
        image_size: int,
        num_classes: int,
        new_block: Callable[[int], VanillaBlock] | None = None,
        checkpointed: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        new_block = new_block or (lambda index: VanillaBlock(geometry))
        self.geometry, self.image_size = geometry, image_size
        patch_inputs = geometry.channels * geometry.patch_size**2
        self.patch_embed = nn.Linear(patch_inputs, geometry.width)
        self.class_token = nn.Parameter(torch.zeros(geometry.width)) if geometry.class_token else None
        self.registers = nn.Parameter(torch.zeros(geometry.registers, geometry.width)) if geometry.registers else None
        positions = geometry.tokens(image_size) - geometry.registers
        self.position = nn.Parameter(torch.zeros(positions, geometry.width))
        self.blocks = nn.ModuleList(new_block(index) for index in range(geometry.depth))
        self.norm = nn.LayerNorm(geometry.width, eps=geometry.norm_eps)
        self.head = nn.Linear(geometry.feature_width, num_classes)

    def features(self, pixels: Tensor) -> Tensor:
        batch, channels, side, _ = pixels.shape
        p = self.geometry.patch_size
        grid = side // p
        patches = pixels.view(batch, channels, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5)
        x = self.patch_embed(patches.reshape(batch, grid * grid, channels * p * p))
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(batch, 1, -1), x), 1)
        x = x + self.position
        first = self.geometry.leading_tokens
        if self.registers is not None:
            classes = int(self.geometry.class_token)
            x = torch.cat((x[:, :classes], self.registers.expand(batch, -1, -1), x[:, classes:]), 1)
        for index, block in enumerate(self.blocks):
            is_last = index == len(self.blocks) - 1
            queries = self.geometry.queries if is_last else None
            if self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(block, x, queries, use_reentrant=False)
            else:
                x = block(x, queries)
        if self.geometry.pool_first:
            return self.norm(x[:, first:].mean(1))
        x = self.norm(x)
        reads = {"class": lambda: x[:, 0], "distillation": lambda: x[:, 1], "mean": lambda: x[:, first:].mean(1)}
        return torch.cat([reads[part]() for part in self.geometry.features.split("+")], 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels))


def new_block(geometry: Geometry, index: int, image_size: int) -> VanillaBlock | VanillaSwinBlock:
    """Block `index` alone, uninitialised."""
    if isinstance(geometry, SwinGeometry):
        return VanillaSwinBlock(geometry, index, image_size)
    return VanillaBlock(geometry)


def build_vanilla(
    geometry: Geometry,
    read: Callable[[str], Tensor],
    image_size: int,
    num_classes: int,
    new_block: Callable[[int], Any] | None = None,
    checkpointed: bool = False,
) -> VanillaViT | VanillaSwin:
    """A network with dense weights; `read(name)` gives a tensor by its artefact name, those that only blocks of
    another kind have (`new_block`, of the block's number) included. The head is left at zero."""
    model: VanillaViT | VanillaSwin
    with torch.device("meta"):
        if isinstance(geometry, SwinGeometry):
            model = VanillaSwin(geometry, image_size, num_classes, new_block, checkpointed)
        else:
            model = VanillaViT(geometry, image_size, num_classes, new_block, checkpointed)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("head."):
                parameter.zero_()
            else:
                parameter.copy_(resampled(name, read(name), geometry, image_size))
    return model
