"""The same Swin transformer as a plain `nn.Module` under torch autograd: windows by rolling and partitioning, as in the
authors' code, and torch's fused attention with the bias as its mask.

The yardstick and the oracle of the explicit one, as `vanilla.py` is of ViT. Parameter names are those of the artefact
with dense linears.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from wasi_edge.models.geometry_swin import SwinGeometry
from wasi_edge.models.windows import relative_index, shift_mask


class VanillaWindowBias(nn.Module):
    """The learned bias of every relative position: (H, n, n)."""

    def __init__(self, window: int, heads: int) -> None:
        super().__init__()
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))

    def forward(self, index: Tensor) -> Tensor:
        count = len(index)
        return self.bias_table[index.view(-1)].view(count, count, -1).permute(2, 0, 1)


class VanillaSwinBlock(nn.Module):
    """What merges tokens, if that is before this block; attention in windows; MLP. Tokens (B, N, D) row by row."""

    def __init__(self, geometry: SwinGeometry, index: int, image_size: int) -> None:
        super().__init__()
        shape = geometry.block_shapes(image_size)[index]
        width, eps = shape.width, geometry.norm_eps
        self.heads, self.grid = shape.heads, round(shape.tokens**0.5)
        self.window, self.shift = geometry.window_at(image_size), geometry.shift_at(image_size, index)
        self.merge_norm = nn.LayerNorm(2 * width, eps=eps) if shape.merged else None
        self.merge = nn.Linear(2 * width, width, bias=False) if shape.merged else None
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, shape.mlp_width)
        self.fc2 = nn.Linear(shape.mlp_width, width)
        self.attention = VanillaWindowBias(self.window, shape.heads)
        self._index = torch.from_numpy(relative_index(self.window))
        mask = shift_mask(self.grid, self.window, self.shift)
        self._mask = None if mask is None else torch.from_numpy(mask)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """(B, N, D), or (B, 4 N, D / 2) where tokens are merged first -> (B, N, D)."""
        if self.merge is not None and self.merge_norm is not None:
            batch, _, width = x.shape
            x = x.view(batch, self.grid, 2, self.grid, 2, width).permute(0, 1, 3, 4, 2, 5)
            x = self.merge(self.merge_norm(x.reshape(batch, -1, 4 * width)))
        x = x + self.proj(self._mixed(self.norm1(x)))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def _mixed(self, normed: Tensor) -> Tensor:
        batch, tokens, width = normed.shape
        grid, window, shift = self.grid, self.window, self.shift
        count = grid // window
        x = normed.view(batch, grid, grid, width)
        if shift:
            x = torch.roll(x, (-shift, -shift), (1, 2))
        x = x.view(batch, count, window, count, window, width).transpose(2, 3).reshape(-1, window * window, width)
        q, k, v = self.heads_of(x)
        bias = self.attention(self._index)[None]
        if self._mask is not None:
            mask = self._mask.to(bias.dtype).repeat(batch, 1, 1)[:, None]
            bias = bias + mask
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = self.proj_input(x, batch, width)
        if shift:
            x = torch.roll(x, (shift, shift), (1, 2))
        return x.reshape(batch, tokens, width)

    def heads_of(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(windows, n, D) -> queries, keys and values (windows, H, n, d)."""
        windows, count, width = normed.shape
        q, k, v = self.qkv(normed).view(windows, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return q, k, v

    def proj_input(self, mixed: Tensor, batch: int, width: int) -> Tensor:
        """(windows, H, n, d) -> (B, grid, grid, D)."""
        count, window = self.grid // self.window, self.window
        x = mixed.transpose(1, 2).reshape(batch, count, count, window, window, width).transpose(2, 3)
        return x.reshape(batch, self.grid, self.grid, width)


class VanillaSwin(nn.Module):
    """(B, C, S, S) -> logits (B, classes), or features (B, F) through `features`; `checkpointed` as in `VanillaViT`."""

    def __init__(
        self,
        geometry: SwinGeometry,
        image_size: int,
        num_classes: int,
        new_block: Callable[[int], VanillaSwinBlock] | None = None,
        checkpointed: bool = False,
    ) -> None:
        super().__init__()
        new_block = new_block or (lambda index: VanillaSwinBlock(geometry, index, image_size))
        self.checkpointed = checkpointed
        self.geometry, self.image_size = geometry, image_size
        self.patch_embed = nn.Linear(geometry.channels * geometry.patch_size**2, geometry.width)
        self.patch_norm = nn.LayerNorm(geometry.width, eps=geometry.norm_eps)
        self.blocks = nn.ModuleList(new_block(index) for index in range(geometry.depth))
        self.norm = nn.LayerNorm(geometry.feature_width, eps=geometry.norm_eps)
        self.head = nn.Linear(geometry.feature_width, num_classes)

    def features(self, pixels: Tensor) -> Tensor:
        batch, channels, side, _ = pixels.shape
        p = self.geometry.patch_size
        grid = side // p
        patches = pixels.view(batch, channels, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5)
        x = self.patch_norm(self.patch_embed(patches.reshape(batch, grid * grid, channels * p * p)))
        for block in self.blocks:
            if self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x).mean(1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels))
