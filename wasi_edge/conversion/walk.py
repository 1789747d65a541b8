"""The calibration photos' tokens on their way through the network, one block at a time: dense, and in factors.

Two streams of tokens (n, N, D) in float16: what the dense network makes of the photos, and what the network that is
being made of factors makes of them. Of each linear in turn the second one's inputs are paired with what, added to its
stream, would bring it back to the first (`regression.py`); for qkv and fc1, whose outputs are no part of the stream,
with the dense layer's own. Everything between is worked out again from the streams, eight photos at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wasi_edge.chunks import CONVERSION_PHOTOS, WIDE_INPUT
from wasi_edge.conversion.factorise import Moments, squared_singular_values
from wasi_edge.conversion.regression import JointMoments, regress
from wasi_edge.layers.activation import gelu, keep_gelu
from wasi_edge.layers.attention import attention_forward
from wasi_edge.layers.block import Block
from wasi_edge.layers.linear import WasiLinear
from wasi_edge.layers.saving import Pass
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.vit import build_block, build_stem
from wasi_edge.preprocess import Preprocessing, normalise

LINEARS = ("qkv", "proj", "fc1", "fc2")


@dataclass(frozen=True)
class Calibration:
    """`count` photos; `read(i)` gives photo i as uint8 (S, S, 3) at the size of the preprocessing."""

    count: int
    read: Callable[[int], np.ndarray]


class Walk:
    """`read` gives tensors of the dense network by name; the walk can be taken twice (`spectra`, then `factored`)."""

    def __init__(
        self,
        geometry: ViTGeometry,
        read: Callable[[str], Tensor],
        calibration: Calibration,
        preprocessing: Preprocessing,
    ) -> None:
        self._geometry, self._read, self._run = geometry, read, Pass()
        stem = build_stem(geometry, read, preprocessing.image_size)
        shape = calibration.count, geometry.tokens(preprocessing.image_size), geometry.width
        self._dense = torch.empty(shape, dtype=torch.float16)
        for first in range(0, calibration.count, CONVERSION_PHOTOS):
            chosen = range(first, min(first + CONVERSION_PHOTOS, calibration.count))
            pixels = normalise(np.stack([calibration.read(photo) for photo in chosen]), preprocessing)
            self._dense[first : first + len(chosen)] = stem.forward(torch.from_numpy(pixels), self._run)[0]
        self._factored = self._dense.clone()

    def spectra(self, index: int) -> dict[str, np.ndarray]:
        """Squared singular values of W C^{1/2} of the linears of block `index`, run dense. Blocks in their order."""
        block = self._dense_block(index)
        observed = {name: Moments(layer.shape[1], _precision(layer.shape[1])) for name, layer in block.linears.items()}
        for chunk in self._dense.split(CONVERSION_PHOTOS):
            stages = _Stages(block, chunk, self._run)
            observed["qkv"].add(stages.normed())
            observed["proj"].add(stages.mixed())
            middle = stages.middle()
            observed["fc1"].add(stages.normed_again(middle))
            observed["fc2"].add(stages.expanded(middle))
            chunk.copy_(stages.output(middle))
        self._run.workspace.clear()  # eigenvectors need the room
        found = {}
        for name, layer in block.linears.items():
            weight = layer.params["weight"]
            if "scale" in layer.params:
                weight = layer.params["scale"][:, None] * weight
            found[f"{block.name}.{name}"] = squared_singular_values(
                weight, observed.pop(name).covariance(consume=True)
            ).numpy()
        return found

    def start_again(self) -> None:
        """Both streams back to the photos' tokens, after `spectra` of all blocks."""
        self._dense.copy_(self._factored)

    def factored(self, index: int, ranks: Mapping[str, int | None], rounded: torch.dtype) -> dict[str, Tensor]:
        """left, right (or weight) and bias of the linears of block `index`; what follows is calibrated on what
        `rounded` leaves of them."""
        dense = self._dense_block(index)
        ours = copy.copy(dense)  # its linears give way to factors one by one
        streams = [stream.split(CONVERSION_PHOTOS) for stream in (self._dense, self._factored)]
        tensors: dict[str, Tensor] = {}
        for stage in LINEARS:
            name, layer = f"{dense.name}.{stage}", getattr(dense, stage)
            rank = ranks[name]
            moments = None if rank is None else JointMoments(layer.shape[1], layer.shape[0], _precision(layer.shape[1]))
            for wanted, chunk in zip(*streams, strict=True):
                x, y = _PAIRS[stage](_Stages(dense, wanted, self._run), _Stages(ours, chunk, self._run))
                if moments is not None:
                    moments.add_pairs(x, y)
            weight, bias, scale = (layer.params.get(key) for key in ("weight", "bias", "scale"))
            if moments is None or rank is None:
                tensors |= {f"{name}.weight": weight, f"{name}.bias": bias}
                continue
            self._run.workspace.clear()
            (left, right), bias = regress(weight, rank, moments, scale)
            del moments
            tensors |= {f"{name}.left": left, f"{name}.right": right, f"{name}.bias": bias}
            left, right, bias = (value.to(rounded).float() for value in (left, right, bias))
            setattr(ours, stage, WasiLinear(left, right, bias, scale))
        for chunk in self._factored.split(CONVERSION_PHOTOS):
            stages = _Stages(ours, chunk, self._run)
            chunk.copy_(stages.output(chunk))
        return tensors

    def _dense_block(self, index: int) -> Block:
        return build_block(self._geometry, index, {f"blocks.{index}.{linear}": None for linear in LINEARS}, self._read)


class _Stages:
    """A block in parts, for one chunk of a stream (B, N, D) float16. Results are fresh or buffers, (T, ...) float32."""

    def __init__(self, block: Block, stream: Tensor, run: Pass) -> None:
        self.block, self.stream, self._run = block, stream, run
        self._tokens = stream.shape[1]

    def normed(self) -> Tensor:
        """What qkv sees."""
        return self._linear_input(self.block.norm1, self.stream)

    def normed_again(self, middle: Tensor) -> Tensor:
        """What fc1 sees; `middle` (B, N, D) or (T, D) is the stream behind the attention."""
        return self._linear_input(self.block.norm2, middle)

    def mixed(self) -> Tensor:
        """What proj sees."""
        qkv = self.apply("qkv", self.normed()).view(*self.stream.shape[:2], -1)
        mixed, _ = attention_forward(qkv, self.block.heads, self._run, None, None)
        return mixed.reshape(-1, mixed.shape[-1])

    def middle(self) -> Tensor:
        """The stream behind the attention."""
        return self._flat(self.stream) + self.apply("proj", self.mixed())

    def expanded(self, middle: Tensor) -> Tensor:
        """What fc2 sees."""
        inner = self.apply("fc1", self.normed_again(middle))
        return gelu(inner, keep_gelu(inner, self._run, None, False), self._run)

    def output(self, middle: Tensor) -> Tensor:
        """The stream behind the block, (B, N, D)."""
        return (self._flat(middle) + self.apply("fc2", self.expanded(middle))).view(self.stream.shape)

    def apply(self, name: str, x: Tensor) -> Tensor:
        """What the linear `name` makes of its input, scale included."""
        return self.block.linears[name].forward(x, self._tokens, self._run, None)[0]

    def _linear_input(self, norm: object, stream: Tensor) -> Tensor:
        return norm.forward(self._flat(stream), self._run, None)[0]  # type: ignore[attr-defined]

    @staticmethod
    def _flat(stream: Tensor) -> Tensor:
        return stream.reshape(-1, stream.shape[-1]).float()


def _pair_qkv(dense: _Stages, ours: _Stages) -> tuple[Tensor, Tensor]:
    wanted = dense.apply("qkv", dense.normed())
    return ours.normed(), wanted


def _pair_proj(dense: _Stages, ours: _Stages) -> tuple[Tensor, Tensor]:
    # from here on the dense stream is that behind its attention
    middle = dense.middle()
    dense.stream.copy_(middle.view(dense.stream.shape))
    return ours.mixed(), middle - ours._flat(ours.stream)


def _pair_fc1(dense: _Stages, ours: _Stages) -> tuple[Tensor, Tensor]:
    ours.stream.copy_(ours.middle().view(ours.stream.shape))
    wanted = dense.apply("fc1", dense.normed_again(dense.stream))
    return ours.normed_again(ours.stream), wanted


def _pair_fc2(dense: _Stages, ours: _Stages) -> tuple[Tensor, Tensor]:
    dense.stream.copy_(dense.output(dense.stream))
    return ours.expanded(ours.stream), ours._flat(dense.stream) - ours._flat(ours.stream)


_PAIRS: dict[str, Callable[[_Stages, _Stages], tuple[Tensor, Tensor]]] = {
    "qkv": _pair_qkv,
    "proj": _pair_proj,
    "fc1": _pair_fc1,
    "fc2": _pair_fc2,
}


def _precision(width: int) -> torch.dtype:
    return torch.float32 if width > WIDE_INPUT else torch.float64
