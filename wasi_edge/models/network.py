"""A vision transformer built on explicit layers, whatever its architecture.

    photo -> stem: tokens -> blocks -> norm -> features -> logits

Features are the class token, the mean of the patch tokens, or both side by side, after the last norm. Forward and
backward are written out; there is no autograd tape. What each block keeps is the plan's decision (`keeps`); blocks
before those it speaks of are frozen. A network may be built in two parts: the frozen blocks with the stem, and
the blocks that learn, which then take the tokens that the first part made. `vit.py` and `swin.py` have what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wasi_edge.keep import Keep
from wasi_edge.layers.block import Block, SavedBlock
from wasi_edge.layers.linear import PLAIN_KINDS, DenseLinear, Linear, LinearKinds
from wasi_edge.layers.norm import LayerNorm, SavedNorm
from wasi_edge.layers.saving import Pass
from wasi_edge.models import resample, swin, vit
from wasi_edge.models.geometry_swin import Geometry, SwinGeometry
from wasi_edge.models.parts import OnGradients
from wasi_edge.models.swin import SwinStem
from wasi_edge.models.vit import Stem


@dataclass
class SavedForward:
    """What the backward pass reads: `stem` where the stem learns, `blocks` of the blocks that do."""

    stem: Any
    blocks: list[SavedBlock]
    norm: SavedNorm


class VisionTransformer:
    """The network, or some of its blocks alone, at one input size. `stem` None: tokens come in instead of photos."""

    def __init__(
        self,
        geometry: Geometry,
        image_size: int,
        stem: Stem | SwinStem | None,
        blocks: Sequence[Block],
        norm: LayerNorm,
        head: DenseLinear | None,
    ) -> None:
        self.geometry, self.image_size = geometry, image_size
        self.stem, self.blocks, self.norm, self.head = stem, list(blocks), norm, head

    def tokens_of(self, linear: str) -> int:
        """Tokens per photo that pass through the block of this linear."""
        return self.geometry.block_shapes(self.image_size)[int(linear.split(".")[1])].tokens

    def linears(self, last_blocks: int | None = None) -> dict[str, Linear]:
        """Every linear of every block, or of the last ones, by name."""
        blocks = self.blocks if last_blocks is None else self._last(last_blocks)
        return {f"{block.name}.{key}": layer for block in blocks for key, layer in block.linears.items()}

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter under its name in the artefact (`docs/architecture.md`)."""
        named: dict[str, Tensor] = {} if self.stem is None else self.stem.parameters()
        for block in self.blocks:
            for layer, parts in block.layers.items():
                for key, value in parts.params.items():
                    named[artefact_name(f"{block.name}.{layer}", key)] = value
        named |= {f"norm.{key}": value for key, value in self.norm.params.items()}
        if self.head is not None:
            named |= {f"head.{key}": value for key, value in self.head.params.items()}
        return named

    def learning_parameters(self, trained_blocks: int) -> dict[str, Tensor]:
        """Those of `parameters` that learn when the last `trained_blocks` blocks do."""
        named = self.parameters()
        if trained_blocks == self.geometry.depth:
            return named
        learning = tuple(f"{block.name}." for block in self._last(trained_blocks))
        return {name: value for name, value in named.items() if name.startswith((*learning, "norm.", "head."))}

    def features(
        self, inputs: Tensor, run: Pass, keeps: Sequence[Keep] | None = None
    ) -> tuple[Tensor, SavedForward | None]:
        """(B, C, S, S), or tokens (B, N, D) without a stem -> (B, F). With `keeps`, one choice for each of the last
        blocks, what the backward pass needs is kept."""
        frozen = len(self.blocks) - (0 if keeps is None else len(keeps))
        x, stem = self._tokens(inputs, run, learns=keeps is not None and not frozen)
        saved_blocks = []
        for index, block in enumerate(self.blocks):
            x, saved = block.forward(x, run, None if keeps is None or index < frozen else keeps[index - frozen])
            if saved is not None:
                saved_blocks.append(saved)
        batch, tokens, width = x.shape
        name = None if keeps is None else "norm"
        if self.geometry.pool_first:
            features, saved_norm = self.norm.forward(self._pool(x), run, name)
        else:
            normed, saved_norm = self.norm.forward(x.view(-1, width), run, name)
            features = self._pool(normed.view(batch, tokens, width))
        if saved_norm is None:
            return features, None
        return features, SavedForward(stem, saved_blocks, saved_norm)

    def logits(self, inputs: Tensor, run: Pass) -> Tensor:
        """(B, C, S, S), or tokens (B, N, D) without a stem -> (B, classes)."""
        assert self.head is not None, "this model has no classifier"
        return self.head.forward(self.features(inputs, run)[0], 1, run, None)[0]

    def last_tokens(self, inputs: Tensor, run: Pass) -> Tensor:
        """(B, C, S, S) -> what the last block makes of it (B, n, D), before the last norm; a buffer. n is N, or fewer
        where the last block of the network is among these and the head reads leading tokens alone."""
        x, _ = self._tokens(inputs, run, learns=False)
        for block in self.blocks:
            x, _ = block.forward(x, run, None)
        return x

    def backward(self, saved: SavedForward, dfeatures: Tensor, run: Pass, on_gradients: OnGradients) -> None:
        """Walk back from (B, F). `on_gradients(layer name, gradients)` is called as each layer's are complete."""
        last = self.geometry.block_shapes(self.image_size)[-1]
        shape, width = (len(dfeatures), self.geometry.read_tokens(last.tokens), last.width), last.width
        dx = run.workspace.take("gradient", shape, dfeatures.dtype)
        if self.geometry.pool_first:
            dpooled, grads = self.norm.backward(saved.norm, dfeatures, run)
            self._pool_backward(dpooled, dx)
        else:
            self._pool_backward(dfeatures, dx)
            dnormed, grads = self.norm.backward(saved.norm, dx.view(-1, width), run)
            dx.copy_(dnormed.view(shape))
        on_gradients("norm", grads)
        # every block adds its part to this one in place
        for block, saved_block in zip(reversed(self._last(len(saved.blocks))), reversed(saved.blocks), strict=True):
            dx, grads = block.backward(saved_block, dx, run)
            on_gradients(block.name, grads)
        if saved.stem is not None and self.stem is not None:
            self.stem.backward(saved.stem, dx, run, on_gradients)

    def _last(self, count: int) -> list[Block]:
        return self.blocks[len(self.blocks) - count :]

    def _tokens(self, inputs: Tensor, run: Pass, learns: bool) -> tuple[Tensor, Any]:
        """Tokens (B, N, D) of photos, and what the stem keeps of them; tokens themselves are copied to where blocks
        expect them."""
        if self.stem is not None:
            return self.stem.forward(inputs, run, learns)
        return run.workspace.keep("block.out", inputs, inputs.dtype), None

    def _pool(self, normed: Tensor) -> Tensor:
        """(B, N, D) -> (B, F)."""
        reads, parts = self.geometry.features.split("+"), []
        if "class" in reads:
            parts.append(normed[:, 0])
        if "distillation" in reads:
            parts.append(normed[:, 1])
        if "mean" in reads:
            parts.append(normed[:, self.geometry.leading_tokens :].mean(1))
        return torch.cat(parts, 1)

    def _pool_backward(self, dfeatures: Tensor, dnormed: Tensor) -> Tensor:
        """(B, F) -> (B, N, D), in `dnormed`."""
        tokens, width = dnormed.shape[1:]
        dnormed.zero_()
        reads, first = self.geometry.features.split("+"), self.geometry.leading_tokens
        if "mean" in reads:
            dnormed[:, first:] = (dfeatures[:, -width:] / (tokens - first)).unsqueeze(1)
        if "distillation" in reads:
            dnormed[:, 1] = dfeatures[:, -width:]
        if "class" in reads:
            dnormed[:, 0] = dfeatures[:, :width]
        return dnormed


def artefact_name(layer: str, key: str) -> str:
    """`blocks.3.proj` + `scale` is stored as `blocks.3.scale1`; every other parameter as `<layer>.<key>`."""
    if key == "scale":
        return (
            layer.removesuffix(".proj") + ".scale1"
            if layer.endswith(".proj")
            else layer.removesuffix(".fc2") + ".scale2"
        )
    return f"{layer}.{key}"


def build_network(
    geometry: Geometry,
    ranks: Mapping[str, int | None],
    read: Callable[[str], Tensor],
    image_size: int,
    head: bool,
    blocks: range | None = None,
    kinds: LinearKinds = PLAIN_KINDS,
) -> VisionTransformer:
    """A network of float32 parameters. `read(name)` gives a tensor by its artefact name; `ranks[linear]` is its
    rank, None for a dense one, and `kinds` what it is built of; what belongs to positions is resampled to `image_size`.
    With `blocks`, a part of it: the stem belongs to the first block."""
    blocks = range(geometry.depth) if blocks is None else blocks
    return VisionTransformer(
        geometry,
        image_size,
        build_stem(geometry, read, image_size) if blocks.start == 0 else None,
        [build_block(geometry, index, ranks, read, image_size, kinds) for index in blocks],
        LayerNorm(read("norm.weight"), read("norm.bias"), geometry.norm_eps),
        DenseLinear(read("head.weight"), read("head.bias")) if head else None,
    )


def build_stem(geometry: Geometry, read: Callable[[str], Tensor], image_size: int) -> Stem | SwinStem:
    """What comes before the blocks; arguments as for `build_network`."""
    if isinstance(geometry, SwinGeometry):
        return swin.build_stem(geometry, read)
    return vit.build_stem(geometry, read, image_size)


def build_block(
    geometry: Geometry,
    index: int,
    ranks: Mapping[str, int | None],
    read: Callable[[str], Tensor],
    image_size: int,
    kinds: LinearKinds = PLAIN_KINDS,
) -> Block:
    """Block `index` alone; arguments as for `build_network`."""
    if isinstance(geometry, SwinGeometry):
        return swin.build_block(geometry, index, ranks, read, image_size, kinds)
    return vit.build_block(geometry, index, ranks, read, image_size, kinds)


def resampled(name: str, value: Tensor, geometry: Geometry, image_size: int) -> Tensor:
    """`resample.resampled` of a torch tensor."""
    return torch.from_numpy(resample.resampled(name, value.numpy(), geometry, image_size))
