"""What is particular to a Swin transformer (Liu et al. 2021): attention in windows, shifted in every second block, and
stages between which four tokens become one.

Tokens leave the stem row by row. Each block works on them in the order of its own windows, into which the gather before
it (`layers/entry.py`) brings them from the order of the block before; the mean that the head reads knows no order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wasi_edge.layers.block import Block
from wasi_edge.layers.entry import Entry, Merge, Reorder
from wasi_edge.layers.linear import PLAIN_KINDS, DenseLinear, LinearKinds
from wasi_edge.layers.norm import LayerNorm, SavedNorm
from wasi_edge.layers.saving import Pass
from wasi_edge.layers.window_attention import WindowAttention
from wasi_edge.models.geometry_swin import SwinGeometry
from wasi_edge.models.parts import OnGradients, Parts, patches_of
from wasi_edge.models.resample import resample_bias
from wasi_edge.models.windows import entry_order, relative_index, shift_mask


class SwinStem:
    """Photo -> patches -> normed tokens, row by row."""

    def __init__(self, patch_size: int, patch_embed: DenseLinear, norm: LayerNorm) -> None:
        self.patch_size, self.patch_embed, self.norm = patch_size, patch_embed, norm

    def parameters(self) -> dict[str, Tensor]:
        """By artefact name."""
        named = {f"patch_embed.{key}": value for key, value in self.patch_embed.params.items()}
        return named | {f"patch_norm.{key}": value for key, value in self.norm.params.items()}

    def forward(self, pixels: Tensor, run: Pass, learns: bool) -> tuple[Tensor, tuple[Tensor, SavedNorm] | None]:
        """(B, C, S, S) -> tokens (B, N, D) and, if the stem learns, what it keeps."""
        patches = patches_of(pixels, self.patch_size, run)
        count, width = len(patches) // len(pixels), self.patch_embed.shape[0]
        embedded = run.workspace.take("block.branch", (len(patches), width), pixels.dtype)
        embedded, _ = self.patch_embed.forward(patches, count, run, None, out=embedded)
        normed, saved = self.norm.forward(embedded, run, "patch_norm" if learns else None)
        x = run.workspace.keep("block.out", normed, normed.dtype).view(len(pixels), count, width)
        return x, None if saved is None else (patches, saved)

    def backward(self, saved: tuple[Tensor, SavedNorm], dx: Tensor, run: Pass, on_gradients: OnGradients) -> None:
        """Gradients from that of the tokens (B, N, D); photos need none."""
        patches, norm = saved
        dembedded, grads = self.norm.backward(norm, dx.view(-1, dx.shape[2]), run)
        on_gradients("patch_norm", grads)
        on_gradients("patch_embed", {"weight": dembedded.t() @ patches, "bias": dembedded.sum(0)})


def build_stem(geometry: SwinGeometry, read: Callable[[str], Tensor]) -> SwinStem:
    """What comes before the blocks."""
    return SwinStem(
        geometry.patch_size,
        DenseLinear(read("patch_embed.weight"), read("patch_embed.bias")),
        LayerNorm(read("patch_norm.weight"), read("patch_norm.bias"), geometry.norm_eps),
    )


def build_block(
    geometry: SwinGeometry,
    index: int,
    ranks: Mapping[str, int | None],
    read: Callable[[str], Tensor],
    image_size: int,
    kinds: LinearKinds = PLAIN_KINDS,
) -> Block:
    """Block `index` alone, with what brings tokens to it; arguments as for `network.build_network`."""
    parts = Parts(f"blocks.{index}", ranks, read, kinds, geometry.norm_eps)
    window = geometry.window_at(image_size)
    grid = geometry.grid(image_size) >> geometry.stage_of(index)[0]
    table = read(f"{parts.name}.attention.bias_table")
    table = torch.from_numpy(resample_bias(table.numpy(), window))
    mask = shift_mask(grid, window, geometry.shift_at(image_size, index))
    pairs = torch.from_numpy(relative_index(window))
    return Block(
        parts.name,
        WindowAttention(table, pairs, None if mask is None else torch.from_numpy(mask)),
        parts.norm("norm1"),
        parts.linear("qkv"),
        parts.linear("proj"),
        parts.norm("norm2"),
        parts.linear("fc1"),
        parts.linear("fc2"),
        _entry(geometry, index, image_size, parts),
    )


def _entry(geometry: SwinGeometry, index: int, image_size: int, parts: Parts) -> Entry | None:
    """What brings tokens to block `index`."""
    found = entry_order(geometry, index, image_size)
    if found is None:
        return None
    order = torch.from_numpy(found.order)
    # neighbouring blocks must not share one buffer for the gradients of their inputs
    buffer = f"gradient.{index % 2}"
    if found.merges:
        return Merge(order, parts.norm("merge_norm"), parts.linear("merge", has_bias=False), buffer)
    return Reorder(order, buffer)
