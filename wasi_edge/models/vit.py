"""A Vision Transformer built on explicit layers (Dosovitskiy et al. 2021; LayerScale: Touvron et al. 2021).

    photo -> patches -> tokens (class token, position) -> blocks -> norm -> features -> logits

Features are the class token, the mean of the patch tokens, or both side by side, after the last norm. Forward and
backward are written out; there is no autograd tape. What each block keeps is the plan's decision (`keeps`); blocks
before those it speaks of are frozen. A network may be built in two parts: the frozen blocks with the embedding, and
the blocks that learn, which then take the tokens that the first part made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wasi_edge.keep import Keep
from wasi_edge.layers.block import Block, SavedBlock
from wasi_edge.layers.linear import PLAIN_KINDS, DenseLinear, Linear, LinearKinds
from wasi_edge.layers.norm import LayerNorm, SavedNorm
from wasi_edge.layers.saving import Pass
from wasi_edge.models.geometry import ViTGeometry

OnGradients = Callable[[str, dict[str, Tensor]], None]


@dataclass
class SavedForward:
    """What the backward pass reads: `patches` where the embedding learns, `blocks` of the blocks that do."""

    patches: Tensor | None
    blocks: list[SavedBlock]
    norm: SavedNorm


class Stem:
    """Photo -> patches -> tokens: the class token, registers (R, D), patches. `position`, of all but the registers, is
    already resampled to the input size."""

    def __init__(
        self,
        patch_size: int,
        patch_embed: DenseLinear,
        class_token: Tensor | None,
        position: Tensor,
        registers: Tensor | None = None,
    ) -> None:
        self.patch_size = patch_size
        self.patch_embed, self.class_token, self.position = patch_embed, class_token, position
        self.registers = registers

    def parameters(self) -> dict[str, Tensor]:
        """By artefact name."""
        named: dict[str, Tensor] = {f"patch_embed.{key}": value for key, value in self.patch_embed.params.items()}
        if self.class_token is not None:
            named["class_token"] = self.class_token
        if self.registers is not None:
            named["registers"] = self.registers
        return named | {"position": self.position}

    def forward(self, pixels: Tensor, run: Pass) -> tuple[Tensor, Tensor]:
        """(B, C, S, S) -> tokens (B, N, D) and the patches (B * g * g, C * p * p) they were made from."""
        batch, channels, side, _ = pixels.shape
        p, width = self.patch_size, self.position.shape[1]
        grid = side // p
        tokens = grid * grid + self._first_patch
        patches = run.workspace.take("patches", (batch, grid, grid, channels, p, p), pixels.dtype)
        patches.copy_(pixels.view(batch, channels, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5))
        patches = patches.view(batch * grid * grid, channels * p * p)
        embedded = run.workspace.take("block.branch", (len(patches), width), pixels.dtype)
        embedded, _ = self.patch_embed.forward(patches, grid * grid, run, None, out=embedded)
        x = run.workspace.take("block.out", (batch, tokens, width), pixels.dtype)
        x[:, self._first_patch :].copy_(embedded.view(batch, grid * grid, width))
        x[:, self._first_patch :].add_(self.position[self._classes :])
        if self.class_token is not None:
            x[:, 0] = self.class_token + self.position[0]
        if self.registers is not None:
            x[:, self._classes : self._first_patch] = self.registers
        return x, patches

    def backward(self, patches: Tensor, dx: Tensor, run: Pass, on_gradients: OnGradients) -> None:
        """Gradients from that of the tokens (B, N, D); photos need none."""
        summed = dx.sum(0)
        root = {"position": summed}
        if self.registers is not None:
            root["registers"] = summed[self._classes : self._first_patch]
            root["position"] = torch.cat((summed[: self._classes], summed[self._first_patch :]))
        if self.class_token is not None:
            root["class_token"] = summed[0].clone()
        on_gradients("", root)
        dpatches = run.workspace.keep("block.branch", dx[:, self._first_patch :], dx.dtype).view(-1, dx.shape[2])
        on_gradients("patch_embed", {"weight": dpatches.t() @ patches, "bias": dpatches.sum(0)})

    @property
    def _classes(self) -> int:
        return 0 if self.class_token is None else 1

    @property
    def _first_patch(self) -> int:
        return self._classes + (0 if self.registers is None else len(self.registers))


class VisionTransformer:
    """The network, or its last blocks alone, at one input size. `stem` None: tokens come in instead of photos."""

    def __init__(
        self,
        geometry: ViTGeometry,
        image_size: int,
        stem: Stem | None,
        blocks: Sequence[Block],
        norm: LayerNorm,
        head: DenseLinear | None,
    ) -> None:
        self.geometry, self.image_size = geometry, image_size
        self.stem, self.blocks, self.norm, self.head = stem, list(blocks), norm, head

    @property
    def tokens(self) -> int:
        """Tokens per photo, class token included."""
        return self.geometry.tokens(self.image_size)

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
        x, patches = self._tokens(inputs, run)
        frozen = len(self.blocks) - (0 if keeps is None else len(keeps))
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
        return features, SavedForward(None if frozen else patches, saved_blocks, saved_norm)

    def logits(self, inputs: Tensor, run: Pass) -> Tensor:
        """(B, C, S, S), or tokens (B, N, D) without a stem -> (B, classes)."""
        assert self.head is not None, "this model has no classifier"
        return self.head.forward(self.features(inputs, run)[0], 1, run, None)[0]

    def last_tokens(self, inputs: Tensor, run: Pass) -> Tensor:
        """(B, C, S, S) -> what the last block makes of it (B, n, D), before the last norm; a buffer. n is N, or fewer
        where the last block of the network is among these and the head reads leading tokens alone."""
        x, _ = self._tokens(inputs, run)
        for block in self.blocks:
            x, _ = block.forward(x, run, None)
        return x

    def backward(self, saved: SavedForward, dfeatures: Tensor, run: Pass, on_gradients: OnGradients) -> None:
        """Walk back from (B, F). `on_gradients(layer name, gradients)` is called as each layer's are complete."""
        width = self.geometry.width
        shape = len(dfeatures), self.geometry.read_tokens(self.tokens), width
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
        if saved.patches is not None and self.stem is not None:
            self.stem.backward(saved.patches, dx, run, on_gradients)

    def _last(self, count: int) -> list[Block]:
        return self.blocks[len(self.blocks) - count :]

    def _tokens(self, inputs: Tensor, run: Pass) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N, D) of photos, and their patches; tokens themselves are copied to where blocks expect them."""
        if self.stem is not None:
            return self.stem.forward(inputs, run)
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
        width = self.geometry.width
        dnormed.zero_()
        reads, first = self.geometry.features.split("+"), self.geometry.leading_tokens
        if "mean" in reads:
            dnormed[:, first:] = (dfeatures[:, -width:] / (self.tokens - first)).unsqueeze(1)
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


def build_vit(
    geometry: ViTGeometry,
    ranks: Mapping[str, int | None],
    read: Callable[[str], Tensor],
    image_size: int,
    head: bool,
    blocks: range | None = None,
    kinds: LinearKinds = PLAIN_KINDS,
) -> VisionTransformer:
    """A network of float32 parameters. `read(name)` gives a tensor by its artefact name; `ranks[linear]` is its
    rank, None for a dense one, and `kinds` what it is built of; the position embedding is resampled to `image_size`.
    With `blocks`, a part of it: the stem belongs to the first block."""
    blocks = range(geometry.depth) if blocks is None else blocks

    def queries(index: int) -> int | None:
        return geometry.queries if index == geometry.depth - 1 else None

    return VisionTransformer(
        geometry,
        image_size,
        build_stem(geometry, read, image_size) if blocks.start == 0 else None,
        [build_block(geometry, index, ranks, read, kinds, queries(index)) for index in blocks],
        LayerNorm(read("norm.weight"), read("norm.bias"), geometry.norm_eps),
        DenseLinear(read("head.weight"), read("head.bias")) if head else None,
    )


def build_stem(geometry: ViTGeometry, read: Callable[[str], Tensor], image_size: int) -> Stem:
    """What comes before the blocks; arguments as for `build_vit`."""
    return Stem(
        geometry.patch_size,
        DenseLinear(read("patch_embed.weight"), read("patch_embed.bias")),
        read("class_token") if geometry.class_token else None,
        resample_position(read("position"), geometry, image_size),
        read("registers") if geometry.registers else None,
    )


def build_block(
    geometry: ViTGeometry,
    index: int,
    ranks: Mapping[str, int | None],
    read: Callable[[str], Tensor],
    kinds: LinearKinds = PLAIN_KINDS,
    queries: int | None = None,
) -> Block:
    """Block `index` alone; arguments as for `build_vit` and `Block`."""
    name = f"blocks.{index}"

    def linear(key: str, scale: str | None) -> Linear:
        bias = read(f"{name}.{key}.bias")
        factor = read(f"{name}.{scale}") if scale is not None and geometry.layer_scale else None
        if ranks[f"{name}.{key}"] is None:
            return kinds.dense(read(f"{name}.{key}.weight"), bias, factor)
        return kinds.factored(read(f"{name}.{key}.left"), read(f"{name}.{key}.right"), bias, factor)

    def norm(key: str) -> LayerNorm:
        return LayerNorm(read(f"{name}.{key}.weight"), read(f"{name}.{key}.bias"), geometry.norm_eps)

    return Block(
        name,
        geometry.heads,
        norm("norm1"),
        linear("qkv", None),
        linear("proj", "scale1"),
        norm("norm2"),
        linear("fc1", None),
        linear("fc2", "scale2"),
        queries,
    )


def resample_position(position: Tensor, geometry: ViTGeometry, image_size: int) -> Tensor:
    """(g*g [+1], D) -> (N - R, D) at `image_size`, R registers having none: bicubic without antialiasing as Hugging
    Face's ViT and DINOv2 do; returned as it is where the grid already fits. The class token's row is left alone."""
    if position.shape[0] == geometry.tokens(image_size) - geometry.registers:
        return position
    first = 1 if geometry.class_token else 0
    side, grid = image_size // geometry.patch_size, geometry.position_grid
    patches = position[first:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(side, side), mode="bicubic", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).reshape(side * side, -1)
    return torch.cat((position[:first], patches)).contiguous()
