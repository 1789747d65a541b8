"""Multi-head self-attention with an explicit backward.

Photo by photo: the kernels return new tensors, which are then small, short-lived and of one size; heads and rows are
work enough for the cores. q, k and v are strided views of one (N, 3D) tensor, so no transpose of them is ever
materialised. Forward and backward are torch's fused CPU kernels, which keep only the log-sum-exp of each row; where a
torch lacks them (they are not public API) the textbook product is used. `mask` is not needed
by ViT; the kernels take `is_causal` and an additive mask when a decoder comes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wasi_edge.layers.saving import Pass

_FUSED = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu") and hasattr(
    torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward"
)


class SavedAttention(NamedTuple):
    """`qkv` (B, N, 3D) and `out` (B, N, D), `lse` (B, H, N) float32 (None: textbook path)."""

    qkv: Tensor
    out: Tensor
    lse: Tensor | None


def attention_forward(
    qkv: Tensor, heads: int, run: Pass, save_as: str | None, dtype: torch.dtype | None, fused: bool = _FUSED
) -> tuple[Tensor, SavedAttention | None]:
    """(B, N, 3D) -> (B, N, D), in the buffer that all blocks share.

    With `save_as`, qkv and the output are copied in `dtype`; None refers to them where they are, for a backward pass
    that comes before anything else is written there.
    """
    batch, tokens, triple = qkv.shape
    width, take = triple // 3, run.workspace.take
    out = take("attention.out", (batch, tokens, width), qkv.dtype)
    lse: Tensor | None = None
    for photo in range(batch):
        q, k, v = _split_heads(qkv[photo : photo + 1], heads)
        if fused:
            mixed, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
            if save_as is not None:
                lse = take(f"{save_as}.lse", (batch, heads, tokens), sums.dtype)
                lse[photo] = sums[0]
        else:
            mixed = _probabilities(q, k) @ v
        out[photo].view(tokens, heads, width // heads).copy_(mixed[0].transpose(0, 1))
    if save_as is None:
        return out, None
    if dtype is None:
        return out, SavedAttention(qkv, out, lse)
    keep = run.workspace.keep
    return out, SavedAttention(keep(f"{save_as}.qkv", qkv, dtype), keep(f"{save_as}.out", out, dtype), lse)


def attention_backward(saved: SavedAttention, dout: Tensor, heads: int, run: Pass) -> Tensor:
    """(B, N, D) -> gradient of qkv (B, N, 3D), in the buffer that held qkv in the forward pass of a block."""
    batch, tokens, width = dout.shape
    head_dim, keep = width // heads, run.workspace.keep
    dqkv = run.workspace.take("block.qkv", (batch, tokens, 3, heads, head_dim), dout.dtype)
    for photo in range(batch):
        one = slice(photo, photo + 1)
        q, k, v = _split_heads(keep("attention.photo.qkv", saved.qkv[one], dout.dtype), heads)
        dmixed = dout[one].view(1, tokens, heads, head_dim).transpose(1, 2)
        if saved.lse is not None:
            mixed = keep("attention.photo.out", saved.out[one], dout.dtype)
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dmixed,
                q,
                k,
                v,
                mixed.view(1, tokens, heads, head_dim).transpose(1, 2),
                saved.lse[one],
                0.0,
                False,
            )
        else:
            p = _probabilities(q, k)
            dp = dmixed @ v.transpose(-1, -2)
            ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * head_dim**-0.5
            dq, dk, dv = ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dmixed
        for index, gradient in enumerate((dq, dk, dv)):
            dqkv[photo, :, index].copy_(gradient[0].transpose(0, 1))
    return dqkv.view(batch, tokens, 3 * width)


def _split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3D) -> three views (B, H, N, d)."""
    batch, tokens, triple = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, triple // (3 * heads)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) (B, H, N, N)."""
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1)
