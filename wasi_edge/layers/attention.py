"""Multi-head self-attention with an explicit backward.

A few photos at a time: the kernels return new tensors, which are then small, short-lived and of one size; heads and
rows are work enough for the cores. q, k and v are strided views of one (N, 3D) tensor, so no transpose of them is ever
materialised. Forward and backward are torch's fused CPU kernels, which keep only the log-sum-exp of each row; where a
torch lacks them (they are not public API) the textbook product is used. `mask` is not needed
by ViT; the kernels take `is_causal` and an additive mask when a decoder comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wasi_edge.chunks import attention_photos
from wasi_edge.layers.saving import Pass

_FUSED = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu") and hasattr(
    torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward"
)


class SavedAttention(NamedTuple):
    """`qkv` (B, N, 3D) and `out` (B, N, D), `lse` (B, H, N) float32 (None: textbook path)."""

    qkv: Tensor
    out: Tensor
    lse: Tensor | None

    def output(self, dtype: torch.dtype, run: Pass) -> Tensor:
        """`out` (B, N, D) in `dtype`, in the buffer that norms share unless it is so already."""
        return _widened(self.out, "norm.out", dtype, run)


class Attention:
    """Of all tokens of a photo; the first `queries` of them ask, or all. It has no parameters."""

    def __init__(self, heads: int, queries: int | None = None) -> None:
        self.heads, self.queries = heads, queries
        self.params: dict[str, Tensor] = {}

    def forward(
        self, qkv: Tensor, run: Pass, save_as: str | None, dtype: torch.dtype | None
    ) -> tuple[Tensor, SavedAttention | None]:
        """`attention_forward`."""
        return attention_forward(qkv, self.heads, run, save_as, dtype, queries=self.queries)

    def backward(self, saved: SavedAttention, dout: Tensor, run: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        """`attention_backward`, and no gradients of parameters."""
        return attention_backward(saved, dout, self.heads, run), {}


def attention_forward(
    qkv: Tensor,
    heads: int,
    run: Pass,
    save_as: str | None,
    dtype: torch.dtype | None,
    fused: bool = _FUSED,
    queries: int | None = None,
) -> tuple[Tensor, SavedAttention | None]:
    """(B, N, 3D) -> (B, n, D) for the first n = `queries` tokens, or all of them, in the buffer that all blocks
    share, or in one of its own if it is to be kept as it is.

    With `save_as`, qkv and the output are kept in `dtype`: copied if that is not their own. None refers to them where
    they are, for a backward pass that comes before anything else is written there.
    """
    batch, tokens, triple = qkv.shape
    width, take, asking = triple // 3, run.workspace.take, queries or tokens
    is_copied = save_as is not None and dtype is not None and dtype is not qkv.dtype
    own = save_as is not None and dtype is qkv.dtype
    out = take(f"{save_as}.out" if own else "attention.out", (batch, asking, width), qkv.dtype)
    lse: Tensor | None = None
    for photos in _chunks(batch, tokens, run.ample):
        q, k, v = _split_heads(qkv[photos], heads)
        q = q[:, :, :asking]
        if fused:
            mixed, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
            if save_as is not None:
                lse = take(f"{save_as}.lse", (batch, heads, asking), sums.dtype)
                lse[photos] = sums
        else:
            mixed = _probabilities(q, k) @ v
        out[photos].view(-1, asking, heads, width // heads).copy_(mixed.transpose(1, 2))
    if save_as is None:
        return out, None
    if not is_copied:
        return out, SavedAttention(qkv, out, lse)
    assert dtype is not None
    keep = run.workspace.keep
    return out, SavedAttention(keep(f"{save_as}.qkv", qkv, dtype), keep(f"{save_as}.out", out, dtype), lse)


def attention_backward(saved: SavedAttention, dout: Tensor, heads: int, run: Pass) -> Tensor:
    """(B, n, D) -> gradient of qkv (B, N, 3D), in the buffer that held qkv in the forward pass of a block."""
    (batch, asking, width), tokens = dout.shape, saved.qkv.shape[1]
    head_dim = width // heads
    dqkv = run.workspace.take("block.qkv", (batch, tokens, 3, heads, head_dim), dout.dtype)
    for photos in _chunks(batch, tokens, run.ample):
        q, k, v = _split_heads(_widened(saved.qkv[photos], "attention.photo.qkv", dout.dtype, run), heads)
        q = q[:, :, :asking]
        dmixed = dout[photos].view(-1, asking, heads, head_dim).transpose(1, 2)
        if saved.lse is not None:
            mixed = _widened(saved.out[photos], "attention.photo.out", dout.dtype, run)
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dmixed,
                q,
                k,
                v,
                mixed.view(-1, asking, heads, head_dim).transpose(1, 2),
                saved.lse[photos],
                0.0,
                False,
            )
        else:
            p = _probabilities(q, k)
            dp = dmixed @ v.transpose(-1, -2)
            ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * head_dim**-0.5
            dq, dk, dv = ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dmixed
        for index, gradient in enumerate((dq, dk, dv)):
            dqkv[photos, : gradient.shape[2], index].copy_(gradient.transpose(1, 2))
        dqkv[photos, asking:, 0] = 0.0
    return dqkv.view(batch, tokens, 3 * width)


def _widened(kept: Tensor, name: str, dtype: torch.dtype, run: Pass) -> Tensor:
    """What was kept, in `dtype`: as it is where it is so already."""
    return kept if kept.dtype is dtype else run.workspace.keep(name, kept, dtype)


def _chunks(batch: int, tokens: int, ample: bool) -> Iterator[slice]:
    step = attention_photos(tokens, ample)
    return (slice(first, min(first + step, batch)) for first in range(0, batch, step))


def _split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3D) -> three views (B, H, N, d)."""
    batch, tokens, triple = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, triple // (3 * heads)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) (B, H, N, N)."""
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1)
