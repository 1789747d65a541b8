"""The transformer block, and the one place that says what is kept for its backward pass.

    n1 = norm1(x);  x2 = x + proj(attention(qkv(n1)));  n2 = norm2(x2);  y = x2 + fc2(gelu(fc1(n2)))

`keep.py` has the choices and what each costs per token; `_KEPT` is what they mean here. The backward pass rebuilds the
rest just before it is read: GELU's derivative from n2, the attention from n1, everything from the block's input. All
blocks share the buffers of what is rebuilt, because only one of them is in its backward pass at a time. Of the linears
only fc2 keeps anything: the inputs of the others are at hand again by then. What is kept as it is, and not rounded, is
written where it stays at once: no copy is made of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wasi_edge.keep import Keep, Rebuild
from wasi_edge.layers.activation import SavedGelu, gelu, gelu_backward, keep_gelu
from wasi_edge.layers.attention import Attention, SavedAttention
from wasi_edge.layers.entry import Entry, Merge, SavedEntry
from wasi_edge.layers.linear import Linear
from wasi_edge.layers.norm import LayerNorm, SavedNorm
from wasi_edge.layers.saving import Pass
from wasi_edge.layers.window_attention import WindowAttention

_PARTS = ("norm1", "attention", "norm2", "gelu", "fc2")
# what the forward pass keeps
_KEPT = {
    Rebuild.NOTHING: _PARTS,
    Rebuild.ATTENTION: tuple(part for part in _PARTS if part != "attention"),
    Rebuild.BRANCHES: tuple(part for part in _PARTS if part not in ("attention", "gelu")),
    Rebuild.BLOCK: ("norm1",),
}
# the name of the buffers of what is rebuilt
_REBUILT = "rebuilt"


@dataclass
class SavedBlock:
    """What the backward pass of one block reads; None is rebuilt first."""

    shape: tuple[int, int, int]
    keep: Keep
    norm1: SavedNorm | None = None
    attention: SavedAttention | None = None
    norm2: SavedNorm | None = None
    gelu: SavedGelu | None = None
    fc2: Tensor | None = None
    entry: SavedEntry | None = None


class Block:
    """Pre-norm attention and MLP, and perhaps an `entry` that brings tokens to it. `layers` maps names to all layers
    with `params`: norm1, qkv, proj, norm2, fc1, fc2, and those of attention and entry.

    With `queries` (of the attention), only so many leading tokens of each photo are asked for, as in the last block of
    a network whose head reads the class token alone: all tokens are looked at, and nothing else is done for those that
    nobody reads.
    """

    def __init__(
        self,
        name: str,
        attention: Attention | WindowAttention,
        norm1: LayerNorm,
        qkv: Linear,
        proj: Linear,
        norm2: LayerNorm,
        fc1: Linear,
        fc2: Linear,
        entry: Entry | None = None,
    ) -> None:
        self.name, self.attention, self.entry = name, attention, entry
        self.queries = attention.queries if isinstance(attention, Attention) else None
        self.norm1, self.qkv, self.proj = norm1, qkv, proj
        self.norm2, self.fc1, self.fc2 = norm2, fc1, fc2

    @property
    def linears(self) -> dict[str, Linear]:
        """The linears by name, in the order of the forward pass."""
        own = {"qkv": self.qkv, "proj": self.proj, "fc1": self.fc1, "fc2": self.fc2}
        return {"merge": self.entry.linear, **own} if isinstance(self.entry, Merge) else own

    @property
    def layers(self) -> dict[str, Linear | LayerNorm | WindowAttention]:
        """All layers that have parameters, by name."""
        entry = {} if self.entry is None else self.entry.layers
        attention = {"attention": self.attention} if isinstance(self.attention, WindowAttention) else {}
        return {**entry, "norm1": self.norm1, **self.linears, **attention, "norm2": self.norm2}

    def forward(self, x: Tensor, run: Pass, keep: Keep | None) -> tuple[Tensor, SavedBlock | None]:
        """(B, N, D) -> (B, n, D), in the buffer that the outputs of all blocks share, n = N or `queries`. `keep` None:
        inference."""
        entered = None
        if self.entry is not None:
            kept = None if keep is None else f"{self.name}.entry"
            x, entered = self.entry.forward(x, run, kept, _kept_dtype(keep or Keep(), x.dtype))
        batch, tokens, width = x.shape
        saved = SavedBlock((batch, tokens, width), keep or Keep(), entry=entered)
        names = _names(self.name, () if keep is None else _KEPT[keep.rebuild])
        dtype = _kept_dtype(saved.keep, x.dtype)
        residual = self._asked(x)

        needs_input = saved.keep.rebuild is Rebuild.BLOCK
        n1, saved.norm1 = self.norm1.forward(x.view(-1, width), run, names["norm1"], dtype, with_mean=needs_input)
        mixed, saved.attention = self._mix(n1, saved, names["attention"], run, dtype)
        tokens = self.queries or tokens
        middle, _ = self._add_branch(residual, self.proj, mixed, tokens, run, None, "block.middle")
        n2, saved.norm2 = self.norm2.forward(middle, run, names["norm2"], dtype)
        inner, saved.gelu = self._expand(n2, saved, names["gelu"], run)
        y, saved.fc2 = self._add_branch(middle, self.fc2, inner, tokens, run, names["fc2"], "block.out")
        return y.view(batch, tokens, width), None if keep is None else saved

    def backward(self, saved: SavedBlock, dy: Tensor, run: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, n, D) -> gradient of x (B, N, D), in place in `dy` where n = N and tokens come in as they are, else in a
        buffer, and gradients named `<layer>.<parameter>`."""
        batch, all_tokens, width = saved.shape
        tokens = self.queries or all_tokens
        dy = dy.view(-1, width) if self.queries is None else dy.reshape(-1, width).clone()
        if saved.keep.rebuild is Rebuild.BLOCK:
            self._rebuild(saved, run)
        elif saved.keep.rebuild is Rebuild.BRANCHES:
            assert saved.norm2
            inner = self._inner(self.norm2.again(saved.norm2, run), saved, f"{_REBUILT}.gelu", run)
            saved.gelu = keep_gelu(inner, run, f"{_REBUILT}.gelu", saved.keep.compact)
        assert saved.norm1 and saved.norm2 and saved.gelu and saved.fc2 is not None
        take = run.workspace.take
        grads: dict[str, dict[str, Tensor]] = {}

        dinner = take("block.inner", (dy.shape[0], self.fc1.shape[0]), dy.dtype)
        dbranch = take("block.branch", (dy.shape[0], width), dy.dtype)
        dinner, grads["fc2"] = self.fc2.backward(saved.fc2, dy, tokens, run, out=dinner)
        dinner = gelu_backward(saved.gelu, dinner, run)
        n2 = self.norm2.again(saved.norm2, run)
        dbranch, grads["fc1"] = self.fc1.backward_from_input(n2, dinner, run, out=dbranch)
        dx, grads["norm2"] = self.norm2.backward(saved.norm2, dbranch, run)
        dy.add_(dx)

        if saved.attention is None:
            n1 = self.norm1.again(saved.norm1, run)
            _, saved.attention = self._mix(n1, saved, f"{_REBUILT}.attention", run, None)
        assert saved.attention is not None
        mixed = saved.attention.output(dy.dtype, run).view_as(dy)
        dbranch, grads["proj"] = self.proj.backward_from_input(mixed, dy, run, out=dbranch)
        dqkv, grads["attention"] = self.attention.backward(saved.attention, dbranch.view(batch, tokens, width), run)
        n1 = self.norm1.again(saved.norm1, run)
        dbranch = take("block.branch", (len(n1), width), dy.dtype)
        dbranch, grads["qkv"] = self.qkv.backward_from_input(n1, dqkv.view(-1, 3 * width), run, out=dbranch)
        dx, grads["norm1"] = self.norm1.backward(saved.norm1, dbranch, run)
        if self.queries is None:
            dx = dy.add_(dx).view(saved.shape)
        else:
            dx = take("gradient", saved.shape, dy.dtype).copy_(dx.view(saved.shape))
            dx[:, :tokens].add_(dy.view(batch, tokens, width))
        if self.entry is not None:
            assert saved.entry is not None
            dx, entry_grads = self.entry.backward(saved.entry, dx, run)
            grads |= entry_grads
        named = {f"{layer}.{key}": value for layer in self.layers for key, value in grads[layer].items()}
        return dx, named

    def _rebuild(self, saved: SavedBlock, run: Pass) -> None:
        """Everything but the output, again from the kept input; the product of fc2 is read by nobody."""
        assert saved.norm1
        names, tokens = _names(_REBUILT, _PARTS), self.queries or saved.shape[1]
        n1 = self.norm1.again(saved.norm1, run)
        # queries, keys, values and the attention's output stay where they are: the MLP's backward leaves them alone
        mixed, saved.attention = self._mix(n1, saved, names["attention"], run, None)
        x = self.norm1.inputs(saved.norm1, run.workspace.take("block.out", tuple(n1.shape), n1.dtype))
        residual = self._asked(x.view(saved.shape))
        middle, _ = self._add_branch(residual, self.proj, mixed, tokens, run, None, "block.middle")
        dtype = _kept_dtype(saved.keep, middle.dtype)
        n2, saved.norm2 = self.norm2.forward(middle, run, names["norm2"], dtype)
        inner, saved.gelu = self._expand(n2, saved, names["gelu"], run)
        saved.fc2 = self.fc2.save(inner, tokens, run, f"{_REBUILT}.fc2")

    def _mix(
        self, n1: Tensor, saved: SavedBlock, save_as: str | None, run: Pass, dtype: torch.dtype | None
    ) -> tuple[Tensor, SavedAttention | None]:
        """norm1's output (T, D) -> attention's (B n, D), and what the attention keeps."""
        batch, tokens, width = saved.shape
        own = save_as is not None and dtype is n1.dtype
        qkv = run.workspace.take(f"{save_as}.qkv" if own else "block.qkv", (len(n1), 3 * width), n1.dtype)
        qkv, _ = self.qkv.forward(n1, tokens, run, None, out=qkv)
        qkv = qkv.view(batch, tokens, 3 * width)
        mixed, attention = self.attention.forward(qkv, run, save_as, dtype)
        return mixed.view(-1, width), attention

    def _asked(self, x: Tensor) -> Tensor:
        """(B, N, D) -> the tokens that are asked for (B n, D)."""
        return x[:, : self.queries].reshape(-1, x.shape[2])

    def _add_branch(
        self, residual: Tensor, last: Linear, x: Tensor, tokens: int, run: Pass, name: str | None, out: str
    ) -> tuple[Tensor, Tensor | None]:
        """residual + last(x) (T, D) in the buffer `out`, and the kept input of `last`."""
        y = run.workspace.take(out, tuple(residual.shape), residual.dtype)
        return last.forward(x, tokens, run, name, out=y, residual=residual)

    def _expand(self, n2: Tensor, saved: SavedBlock, save_as: str | None, run: Pass) -> tuple[Tensor, SavedGelu | None]:
        """norm2's output (T, D) -> fc2's input (T, M), in the buffer that all blocks share, and what GELU keeps."""
        inner = self._inner(n2, saved, save_as, run)
        kept = keep_gelu(inner, run, save_as, saved.keep.compact)
        return gelu(inner, kept, run), kept

    def _inner(self, n2: Tensor, saved: SavedBlock, save_as: str | None, run: Pass) -> Tensor:
        """norm2's output (T, D) -> GELU's input (T, M), in a buffer of its own if that is what is to be kept."""
        name = "block.inner" if save_as is None or saved.keep.compact else save_as
        inner = run.workspace.take(name, (len(n2), self.fc1.shape[0]), n2.dtype)
        return self.fc1.forward(n2, saved.shape[1], run, None, out=inner)[0]


def _names(slot: str, parts: tuple[str, ...]) -> dict[str, str | None]:
    """The buffer of each part, None for one that is not kept."""
    return {part: f"{slot}.{part}" if part in parts else None for part in _PARTS}


def _kept_dtype(keep: Keep, dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if keep.compact else dtype
