"""Multi-head self-attention with an explicit backward.

q, k and v are strided views of one (B, N, 3D) tensor and the output is laid out (B, N, H, d) in memory, so no
transpose is ever materialised. Forward and backward are torch's fused CPU kernels, which keep only the log-sum-exp
of each row; where a torch lacks them (they are not public API) the textbook product is used. `mask` is not needed
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
    """`qkv` (B, N, 3D) and `out` (B, N, D) in the saving dtype, `lse` (B, H, N) float32 (None: textbook path)."""

    qkv: Tensor
    out: Tensor
    lse: Tensor | None


def attention_forward(
    qkv: Tensor, heads: int, run: Pass, save_as: str | None, dtype: torch.dtype, fused: bool = _FUSED
) -> tuple[Tensor, SavedAttention | None]:
    """(B, N, 3D) -> (B, N, D)."""
    batch, tokens, triple = qkv.shape
    q, k, v = _split_heads(qkv, heads)
    if fused:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        out, lse = _probabilities(q, k) @ v, None
    out = out.transpose(1, 2).reshape(batch, tokens, triple // 3)
    if save_as is None:
        return out, None
    keep = run.workspace.keep
    return out, SavedAttention(keep(f"{save_as}.qkv", qkv, dtype), keep(f"{save_as}.out", out, dtype), lse)


def attention_backward(saved: SavedAttention, dout: Tensor, heads: int, run: Pass) -> Tensor:
    """(B, N, D) -> gradient of qkv (B, N, 3D)."""
    batch, tokens, width = dout.shape
    head_dim = width // heads
    qkv, out = saved.qkv, saved.out
    if qkv.dtype != dout.dtype:
        # widened into buffers that only the forward pass of a block uses
        qkv = run.workspace.keep("block.qkv", qkv, dout.dtype)
        out = run.workspace.keep("block.middle", out, dout.dtype)
    q, k, v = _split_heads(qkv, heads)
    dout = dout.view(batch, tokens, heads, head_dim).transpose(1, 2)
    if saved.lse is not None:
        out = out.view(batch, tokens, heads, head_dim).transpose(1, 2)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, saved.lse, 0.0, False
        )
    else:
        p = _probabilities(q, k)
        dp = dout @ v.transpose(-1, -2)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * head_dim**-0.5
        dq, dk, dv = ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dout
    dqkv = run.workspace.take("attention.dqkv", (batch, tokens, 3, heads, head_dim), dout.dtype)
    for index, gradient in enumerate((dq, dk, dv)):
        dqkv[:, :, index].copy_(gradient.transpose(1, 2))
    return dqkv.view(batch, tokens, 3 * width)


def _split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3D) -> three views (B, H, N, d)."""
    batch, tokens, triple = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, triple // (3 * heads)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) (B, H, N, N)."""
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1)
