"""Self-attention within windows, with a learned bias for every relative position (Liu et al. 2021, section 3.2).

Tokens come in the order of their windows, so a window is a run of rows and nothing is rolled or partitioned here. The
scores of 49 tokens are small: they are made a few photos at a time and again in the backward pass, which needs
them for the gradient of the bias anyway.

    scores = q k^T / sqrt(d) + table[relative position] + mask

where the mask keeps parts of a shifted window apart that are no neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from wasi_edge.chunks import window_photos
from wasi_edge.layers.attention import SavedAttention
from wasi_edge.layers.saving import Pass


class WindowAttention:
    """`params`: bias_table ((2w - 1)^2, H). `index` (n, n), n = w * w: the table's row for each pair of tokens of a
    window; `mask` (windows of a photo, n, n), added to the scores, or None."""

    def __init__(self, bias_table: Tensor, index: Tensor, mask: Tensor | None) -> None:
        self.params = {"bias_table": bias_table}
        self._index, self._mask = index, mask

    @property
    def heads(self) -> int:
        """H."""
        return self.params["bias_table"].shape[1]

    def forward(
        self, qkv: Tensor, run: Pass, save_as: str | None, dtype: torch.dtype | None
    ) -> tuple[Tensor, SavedAttention | None]:
        """(B, N, 3D) -> (B, N, D) in the buffer that all blocks share, or in one of its own if it is to be kept as it
        is; as `attention_forward`."""
        batch, tokens, triple = qkv.shape
        width, own = triple // 3, save_as is not None and dtype is qkv.dtype
        out = run.workspace.take(f"{save_as}.out" if own else "attention.out", (batch, tokens, width), qkv.dtype)
        bias = self._bias(tokens)
        for photos in self._chunks(batch, tokens):
            q, k, v = self._split(qkv[photos], run)
            mixed = torch.bmm(self._probabilities(q, k, bias), v)
            self._windows(out[photos]).copy_(self._by_head(mixed, out[photos]))
        if save_as is None:
            return out, None
        if own or dtype is None:
            return out, SavedAttention(qkv, out, None)
        keep = run.workspace.keep
        return out, SavedAttention(keep(f"{save_as}.qkv", qkv, dtype), keep(f"{save_as}.out", out, dtype), None)

    def backward(self, saved: SavedAttention, dout: Tensor, run: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, N, D) -> gradient of qkv (B, N, 3D), in the buffer that held qkv in the forward pass of a block, and of
        the table."""
        batch, tokens, width = dout.shape
        heads, count = self.heads, self._index.shape[0]
        dqkv = run.workspace.take("block.qkv", (batch, tokens, 3 * width), dout.dtype)
        bias = self._bias(tokens)
        dbias = dout.new_zeros(heads, count, count)
        scale = (width // heads) ** -0.5
        for photos in self._chunks(batch, tokens):
            kept = saved.qkv[photos]
            q, k, v = self._split(kept if kept.dtype is dout.dtype else kept.to(dout.dtype), run)
            p = self._probabilities(q, k, bias)
            dmixed = run.workspace.take("attention.window.dmixed", tuple(q.shape), dout.dtype)
            self._by_head(dmixed, dout[photos]).copy_(self._windows(dout[photos]))
            dv = torch.bmm(p.transpose(1, 2), dmixed)
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(dmixed, v.transpose(1, 2)), p, -1, p.dtype)
            dbias.add_(ds.view(-1, heads, count, count).sum(0))
            dq = torch.bmm(ds, k).mul_(scale)
            dk = torch.bmm(ds.transpose(1, 2), q)  # q is scaled already
            part = dqkv[photos].view(-1, count, 3, heads, width // heads)
            for number, gradient in enumerate((dq, dk, dv)):
                part[:, :, number].copy_(self._by_head(gradient, dout[photos]))
        table = self.params["bias_table"]
        dtable = torch.zeros_like(table).index_add_(0, self._index.view(-1), dbias.view(heads, -1).t())
        return dqkv, {"bias_table": dtable}

    def _bias(self, tokens: int) -> Tensor:
        """(windows, H, n, n), or (1, H, n, n) where all windows are alike."""
        count = self._index.shape[0]
        bias = self.params["bias_table"][self._index.view(-1)].t().reshape(1, self.heads, count, count)
        return bias if self._mask is None else bias + self._mask[:, None].to(bias.dtype)

    def _probabilities(self, q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        """softmax(q k^T + bias) (windows * H, n, n)."""
        scores = torch.bmm(q, k.transpose(1, 2))
        scores.view(-1, *bias.shape).add_(bias)
        return torch.softmax(scores, -1)

    def _split(self, qkv: Tensor, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (scaled), keys and values, each (windows * H, n, d) in a buffer."""
        heads, count = self.heads, self._index.shape[0]
        head_dim = qkv.shape[2] // (3 * heads)
        windows = qkv.view(-1, count, 3, heads, head_dim)
        split = run.workspace.take("attention.window.qkv", (3, len(windows), heads, count, head_dim), qkv.dtype)
        torch.mul(windows[:, :, 0].transpose(1, 2), head_dim**-0.5, out=split[0])
        split[1:].copy_(windows[:, :, 1:].permute(2, 0, 3, 1, 4))
        q, k, v = split.view(3, -1, count, head_dim)
        return q, k, v

    def _windows(self, x: Tensor) -> Tensor:
        """(b, N, D) -> (windows, n, H, d), a view."""
        return x.view(-1, self._index.shape[0], self.heads, x.shape[2] // self.heads)

    def _by_head(self, x: Tensor, like: Tensor) -> Tensor:
        """(windows * H, n, d) -> (windows, n, H, d), a view."""
        return x.view(-1, self.heads, self._index.shape[0], like.shape[2] // self.heads).transpose(1, 2)

    def _chunks(self, batch: int, tokens: int) -> Iterator[slice]:
        step = window_photos(tokens, self._index.shape[0], self.heads)
        return (slice(first, min(first + step, batch)) for first in range(0, batch, step))
