"""What is particular to a Swin transformer (Liu et al. 2021): attention in windows, shifted in every second block, and
stages between which four tokens become one.

Tokens leave the stem row by row. Each block works on them in the order of its own windows, into which the gather before
it (`layers/entry.py`) brings them from the order of the block before; the mean that the head reads knows no order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from wasi_edge.layers.block import Block
from wasi_edge.layers.entry import Entry, Merge, Reorder
from wasi_edge.layers.linear import PLAIN_KINDS, DenseLinear, LinearKinds
from wasi_edge.layers.norm import LayerNorm, SavedNorm
from wasi_edge.layers.saving import Pass
from wasi_edge.layers.window_attention import WindowAttention
from wasi_edge.models.geometry_swin import SwinGeometry
from wasi_edge.models.parts import OnGradients, Parts, patches_of

# what keeps parts of a shifted window apart that are no neighbours, as in the authors' code
APART = -100.0


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
    table = resample_bias(read(f"{parts.name}.attention.bias_table"), window)
    mask = shift_mask(grid, window, geometry.shift_at(image_size, index))
    return Block(
        parts.name,
        WindowAttention(table, relative_index(window), mask),
        parts.norm("norm1"),
        parts.linear("qkv"),
        parts.linear("proj"),
        parts.norm("norm2"),
        parts.linear("fc1"),
        parts.linear("fc2"),
        _entry(geometry, index, image_size, parts),
    )


def _entry(geometry: SwinGeometry, index: int, image_size: int, parts: Parts) -> Entry | None:
    """From the order that block `index` - 1 leaves tokens in to that of this block's windows; None where they agree."""
    # neighbouring blocks must not share one buffer for the gradients of their inputs
    buffer = f"gradient.{index % 2}"
    stage, number = geometry.stage_of(index)
    wanted = block_order(geometry, index, image_size)
    if index == 0:
        before = torch.arange(len(wanted))
    else:
        before = block_order(geometry, index - 1, image_size)
    place = torch.argsort(before)  # of each token of the grid, where it is now
    if stage and not number:
        grid = geometry.grid(image_size) >> stage
        row, column = wanted // grid, wanted % grid
        four = [(2 * row + down) * 2 * grid + 2 * column + right for right in (0, 1) for down in (0, 1)]
        order = place[torch.stack(four, 1).view(-1)]
        return Merge(order, parts.norm("merge_norm"), parts.linear("merge", has_bias=False), buffer)
    return None if torch.equal(before, wanted) else Reorder(place[wanted], buffer)


def block_order(geometry: SwinGeometry, index: int, image_size: int) -> Tensor:
    """Numbers of the tokens of the grid, row by row, in the order of the windows of block `index`, (N,)."""
    grid = geometry.grid(image_size) >> geometry.stage_of(index)[0]
    return window_order(grid, geometry.window_at(image_size), geometry.shift_at(image_size, index))


def window_order(grid: int, window: int, shift: int) -> Tensor:
    """Numbers of the tokens of a grid, row by row, in the order of windows that are shifted to the right and down; what
    is beyond the edge comes from the other one, (grid * grid,)."""
    numbers = torch.arange(grid * grid).view(grid, grid).roll((-shift, -shift), (0, 1))
    count = grid // window
    return numbers.view(count, window, count, window).transpose(1, 2).reshape(-1)


def relative_index(window: int) -> Tensor:
    """Row of the bias table for each pair of tokens of a window, (w * w, w * w)."""
    places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    down, right = places[:, :, None] - places[:, None, :] + window - 1
    return down * (2 * window - 1) + right


def shift_mask(grid: int, window: int, shift: int) -> Tensor | None:
    """What is added to the scores of each window, (windows, w * w, w * w): `APART` between tokens that only the shift
    brought together. None without a shift."""
    if not shift:
        return None
    place = torch.arange(grid)
    part = (place >= grid - window).int() + (place >= grid - shift).int()
    parts = 3 * part[:, None] + part[None, :]
    count = grid // window
    parts = parts.view(count, window, count, window).transpose(1, 2).reshape(count * count, window * window)
    return (parts[:, :, None] != parts[:, None, :]).float().mul_(APART)


def resample_bias(table: Tensor, window: int) -> Tensor:
    """((2 v - 1)^2, H) -> ((2 w - 1)^2, H), bicubic; returned as it is where the windows agree."""
    side, wanted = round(len(table) ** 0.5), 2 * window - 1
    if side == wanted:
        return table
    image = table.t().reshape(1, -1, side, side)
    image = F.interpolate(image, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return image.reshape(-1, wanted * wanted).t().contiguous()
