"""The transformer block, and the one place that says what is kept for its backward pass.

    n1 = norm1(x);  x2 = x + proj(attention(qkv(n1)));  n2 = norm2(x2);  y = x2 + fc2(gelu(fc1(n2)))

Bytes per token, width D, MLP width M, heads H, gradient rank r, all linears low-rank:

    kept                     full            compact
    norm1 x_hat, rstd        4 D + 4         2 D + 4
    qkv                      12 D            6 D
    attention out, lse       4 D + 4 H       2 D + 4 H
    norm2 x_hat, rstd        4 D + 4         2 D + 4
    gelu                     4 M (input)     M (derivative)
    z of qkv, proj, fc1, fc2 16 r            16 r

`recompute` keeps x (4 D) and runs the block forward a second time, keeping `full` in buffers that all recomputed
blocks share. The table is checked by a test that counts the buffers, and it is what the planner adds up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wasi_edge.layers.activation import SavedGelu, gelu_backward, gelu_forward
from wasi_edge.layers.attention import SavedAttention, attention_backward, attention_forward
from wasi_edge.layers.linear import Linear
from wasi_edge.layers.norm import LayerNorm, SavedNorm
from wasi_edge.layers.saving import Keep, Pass


@dataclass
class SavedBlock:
    """What the backward pass of one block reads. `x` alone is set when the block is to be recomputed."""

    shape: tuple[int, int, int]
    x: Tensor | None = None
    norm1: SavedNorm | None = None
    qkv: Tensor | None = None
    attention: SavedAttention | None = None
    proj: Tensor | None = None
    norm2: SavedNorm | None = None
    fc1: Tensor | None = None
    gelu: SavedGelu | None = None
    fc2: Tensor | None = None


class Block:
    """Pre-norm attention and MLP. `layers` maps norm1, qkv, proj, norm2, fc1, fc2 to layers with `params`."""

    def __init__(
        self,
        name: str,
        heads: int,
        norm1: LayerNorm,
        qkv: Linear,
        proj: Linear,
        norm2: LayerNorm,
        fc1: Linear,
        fc2: Linear,
    ) -> None:
        self.name, self.heads = name, heads
        self.norm1, self.qkv, self.proj = norm1, qkv, proj
        self.norm2, self.fc1, self.fc2 = norm2, fc1, fc2

    @property
    def linears(self) -> dict[str, Linear]:
        """The four linears by name, in the order of the forward pass."""
        return {"qkv": self.qkv, "proj": self.proj, "fc1": self.fc1, "fc2": self.fc2}

    @property
    def layers(self) -> dict[str, Linear | LayerNorm]:
        """All layers by name, in the order of the forward pass."""
        return {"norm1": self.norm1, **self.linears, "norm2": self.norm2}

    def forward(self, x: Tensor, run: Pass, keep: Keep | None) -> tuple[Tensor, SavedBlock | None]:
        """(B, N, D) -> (B, N, D), in the buffer that the outputs of all blocks share. `keep` None: inference."""
        saved: SavedBlock | None
        if keep is Keep.RECOMPUTE:
            saved = SavedBlock(_shape3(x), x=run.workspace.keep(f"{self.name}.x", x, x.dtype))
            middle, inner = self._to_inner(x, run, None, None)
        else:
            saved = None if keep is None else SavedBlock(_shape3(x))
            middle, inner = self._to_inner(x, run, saved, keep)
            if saved is not None:
                saved.fc2 = self.fc2.save(inner, x.shape[1], run, f"{self.name}.fc2")
        out = run.workspace.take("block.branch", tuple(middle.shape), x.dtype)
        branch, _ = self.fc2.forward(inner, x.shape[1], run, None, out=out)
        y = torch.add(middle, branch, out=run.workspace.take("block.out", tuple(middle.shape), x.dtype))
        return y.view_as(x), saved

    def backward(self, saved: SavedBlock, dy: Tensor, run: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, N, D) -> gradient of x, in place in `dy`, and gradients named `<layer>.<parameter>`."""
        if saved.x is not None:
            saved = self._rebuild(saved.x, run)
        assert saved.norm1 and saved.attention and saved.norm2 and saved.gelu
        assert saved.qkv is not None and saved.proj is not None
        assert saved.fc1 is not None and saved.fc2 is not None
        batch, tokens, width = saved.shape
        take = run.workspace.take
        grads: dict[str, Tensor] = {}

        dy = dy.view(-1, width)
        dinner = take("block.inner", (dy.shape[0], self.fc1.shape[0]), dy.dtype)
        dbranch = take("block.branch", (dy.shape[0], width), dy.dtype)
        dinner, grads_fc2 = self.fc2.backward(saved.fc2, dy, tokens, run, out=dinner)
        dinner = gelu_backward(saved.gelu, dinner, run)
        dbranch, grads_fc1 = self.fc1.backward(saved.fc1, dinner, tokens, run, out=dbranch)
        dx, grads_norm2 = self.norm2.backward(saved.norm2, dbranch, run)
        dy.add_(dx)

        dbranch, grads_proj = self.proj.backward(saved.proj, dy, tokens, run, out=dbranch)
        dqkv = attention_backward(saved.attention, dbranch.view(batch, tokens, width), self.heads, run)
        dbranch, grads_qkv = self.qkv.backward(saved.qkv, dqkv.view(-1, 3 * width), tokens, run, out=dbranch)
        dx, grads_norm1 = self.norm1.backward(saved.norm1, dbranch, run)
        dy.add_(dx)

        for layer, layer_grads in (
            ("norm1", grads_norm1),
            ("qkv", grads_qkv),
            ("proj", grads_proj),
            ("norm2", grads_norm2),
            ("fc1", grads_fc1),
            ("fc2", grads_fc2),
        ):
            grads.update({f"{layer}.{key}": value for key, value in layer_grads.items()})
        return dy.view(batch, tokens, width), grads

    def _to_inner(self, x: Tensor, run: Pass, saved: SavedBlock | None, keep: Keep | None) -> tuple[Tensor, Tensor]:
        """All but fc2: the residual after attention (T, D) and gelu's output (T, M). Fills `saved` but for fc2."""
        batch, tokens, width = x.shape
        take = run.workspace.take
        dtype = torch.float16 if keep is Keep.COMPACT else x.dtype
        # recomputed blocks share one set of buffers: only one of them is in its backward pass at a time
        slot = "recompute" if keep is None else self.name
        name = {key: None if saved is None else f"{slot}.{key}" for key in _SLOTS}

        residual = x.reshape(-1, width)
        count = residual.shape[0]
        n1, norm1 = self.norm1.forward(residual, run, name["norm1"], dtype)
        qkv = take("block.qkv", (count, 3 * width), x.dtype)
        qkv, z_qkv = self.qkv.forward(n1, tokens, run, name["qkv"], out=qkv)
        mixed, attention = attention_forward(
            qkv.view(batch, tokens, 3 * width), self.heads, run, name["attention"], dtype
        )
        branch = take("block.branch", (count, width), x.dtype)
        branch, z_proj = self.proj.forward(mixed.view(count, width), tokens, run, name["proj"], out=branch)
        # never in place in x: it may be the copy that was kept
        middle = torch.add(residual, branch, out=take("block.middle", (count, width), x.dtype))

        n2, norm2 = self.norm2.forward(middle, run, name["norm2"], dtype)
        inner = take("block.inner", (count, self.fc1.shape[0]), x.dtype)
        inner, z_fc1 = self.fc1.forward(n2, tokens, run, name["fc1"], out=inner)
        inner, gelu = gelu_forward(inner, run, name["gelu"], compact=keep is Keep.COMPACT)
        if saved is not None:
            saved.norm1, saved.qkv, saved.attention, saved.proj = norm1, z_qkv, attention, z_proj
            saved.norm2, saved.fc1, saved.gelu = norm2, z_fc1, gelu
        return middle, inner

    def _rebuild(self, x: Tensor, run: Pass) -> SavedBlock:
        """Run forward again from the kept x and keep everything, without the product of fc2 that nobody reads."""
        saved = SavedBlock(_shape3(x))
        _, inner = self._to_inner(x, run, saved, None)
        saved.fc2 = self.fc2.save(inner, x.shape[1], run, "recompute.fc2")
        return saved


_SLOTS = ("norm1", "qkv", "attention", "proj", "norm2", "fc1", "gelu")


def _shape3(x: Tensor) -> tuple[int, int, int]:
    batch, tokens, width = x.shape
    return batch, tokens, width
