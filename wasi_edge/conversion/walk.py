"""The calibration photos' tokens on their way through the network, one block at a time: dense, and in factors.

Two streams of tokens (n, N, D) in float16: what the dense network makes of the photos, and what the network that is
being made of factors makes of them. Of each linear in turn the second one's inputs are paired with what, added to its
stream, would bring it back to the first (`regression.py`); for qkv and fc1, whose outputs are no part of the stream,
with the dense layer's own. Everything between is worked out again from the streams, a few photos at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wasi_edge.chunks import WIDE_INPUT, conversion_photos
from wasi_edge.conversion.factorise import Moments, squared_singular_values
from wasi_edge.conversion.regression import JointMoments, regress
from wasi_edge.layers.activation import gelu, keep_gelu
from wasi_edge.layers.attention import Attention
from wasi_edge.layers.block import Block
from wasi_edge.layers.entry import Merge
from wasi_edge.layers.linear import Linear, WasiLinear
from wasi_edge.layers.saving import Pass
from wasi_edge.models.geometry_swin import Geometry
from wasi_edge.models.network import build_block, build_stem
from wasi_edge.preprocess import normalise
from wasi_edge.preprocessing import Preprocessing


@dataclass(frozen=True)
class Calibration:
    """`count` photos; `read(i)` gives photo i as uint8 (S, S, 3) at the size of the preprocessing."""

    count: int
    read: Callable[[int], np.ndarray]


class Walk:
    """`read` gives tensors of the dense network by name; the walk can be taken twice (`spectra`, then `factored`)."""

    def __init__(
        self,
        geometry: Geometry,
        read: Callable[[str], Tensor],
        calibration: Calibration,
        preprocessing: Preprocessing,
    ) -> None:
        self._geometry, self._read, self._run = geometry, read, Pass()
        self._size = preprocessing.image_size
        blocks = geometry.block_shapes(self._size)
        self._together = conversion_photos(max(shape.tokens * shape.width for shape in blocks))
        stem = build_stem(geometry, read, self._size)
        shape = calibration.count, geometry.tokens(self._size), geometry.width
        self._dense = torch.empty(shape, dtype=torch.float16)
        for first in range(0, calibration.count, self._together):
            chosen = range(first, min(first + self._together, calibration.count))
            pixels = normalise(np.stack([calibration.read(photo) for photo in chosen]), preprocessing)
            self._dense[first : first + len(chosen)] = stem.forward(torch.from_numpy(pixels), self._run, learns=False)[
                0
            ]
        self._factored = self._dense.clone()

    def spectra(self, index: int) -> dict[str, np.ndarray]:
        """Squared singular values of W C^{1/2} of the linears of block `index`, run dense. Blocks in their order."""
        block = self._dense_block(index)
        observed = {name: Moments(layer.shape[1], _precision(layer.shape[1])) for name, layer in block.linears.items()}
        if isinstance(block.entry, Merge):
            for chunk in self._dense.split(self._together):
                observed["merge"].add(block.entry.gathered_norm(chunk.float(), self._run))
        self._dense = self._entered(block, self._dense)
        for chunk in self._dense.split(self._together):
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
        self._dense = self._factored.clone()

    def factored(self, index: int, ranks: Mapping[str, int | None], rounded: torch.dtype) -> dict[str, Tensor]:
        """left, right (or weight) and bias of the linears of block `index`; what follows is calibrated on what
        `rounded` leaves of them."""
        dense = self._dense_block(index)
        ours = copy.copy(dense)  # its linears give way to factors one by one
        tensors: dict[str, Tensor] = {}
        if isinstance(dense.entry, Merge):
            pairs = self._merge_pairs(dense.entry)
            linear = self._fitted(f"{dense.name}.merge", dense.entry.linear, pairs, ranks, rounded, tensors)
            merge = copy.copy(dense.entry)
            merge.linear, ours.entry = linear, merge
        self._dense = self._entered(dense, self._dense)
        self._factored = self._entered(ours, self._factored)
        streams = [stream.split(self._together) for stream in (self._dense, self._factored)]
        for stage, pair in _PAIRS.items():
            pairs = (
                pair(_Stages(dense, wanted, self._run), _Stages(ours, chunk, self._run))
                for wanted, chunk in zip(*streams, strict=True)
            )
            linear = self._fitted(f"{dense.name}.{stage}", getattr(dense, stage), pairs, ranks, rounded, tensors)
            setattr(ours, stage, linear)
        for chunk in self._factored.split(self._together):
            stages = _Stages(ours, chunk, self._run)
            chunk.copy_(stages.output(chunk))
        return tensors

    def _fitted(
        self,
        name: str,
        layer: Linear,
        pairs: Iterable[tuple[Tensor, Tensor]],
        ranks: Mapping[str, int | None],
        rounded: torch.dtype,
        tensors: dict[str, Tensor],
    ) -> Linear:
        """What takes the place of a dense layer: itself, or factors fitted to pairs of inputs and wanted outputs. The
        tensors to be stored are added to `tensors`. All pairs are gone through even then: that moves the streams."""
        rank, precision = ranks[name], _precision(layer.shape[1])
        moments = None if rank is None else JointMoments(layer.shape[1], layer.shape[0], precision)
        for x, y in pairs:
            if moments is not None:
                moments.add_pairs(x, y)
        weight, bias, scale = (layer.params.get(key) for key in ("weight", "bias", "scale"))
        assert weight is not None
        if moments is None or rank is None:
            tensors[f"{name}.weight"] = weight
            if bias is not None:
                tensors[f"{name}.bias"] = bias
            return layer
        self._run.workspace.clear()
        (left, right), fitted = regress(weight, rank, moments, scale, has_bias=bias is not None)
        tensors |= {f"{name}.left": left, f"{name}.right": right}
        if bias is not None:
            tensors[f"{name}.bias"] = fitted
            bias = fitted.to(rounded).float()
        return WasiLinear(left.to(rounded).float(), right.to(rounded).float(), bias, scale)

    def _merge_pairs(self, entry: Merge) -> Iterator[tuple[Tensor, Tensor]]:
        """What the linear of a merge sees of our tokens, and what the dense one makes of the dense tokens."""
        streams = [stream.split(self._together) for stream in (self._dense, self._factored)]
        for wanted, chunk in zip(*streams, strict=True):
            made = entry.forward(wanted.float(), self._run, None)[0]
            yield entry.gathered_norm(chunk.float(), self._run), made.flatten(0, 1)

    def _entered(self, block: Block, stream: Tensor) -> Tensor:
        """The stream as it comes to the block: as it is, in another order, or merged."""
        if block.entry is None:
            return stream
        first = block.entry.forward(stream[:1].float(), self._run, None)[0]
        entered = torch.empty((len(stream), *first.shape[1:]), dtype=stream.dtype)
        for made, chunk in zip(entered.split(self._together), stream.split(self._together), strict=True):
            made.copy_(block.entry.forward(chunk.float(), self._run, None)[0])
        return entered

    def _dense_block(self, index: int) -> Block:
        prefix = f"blocks.{index}."
        ranks = {name: None for name in self._geometry.linear_shapes() if name.startswith(prefix)}
        block = build_block(self._geometry, index, ranks, self._read, self._size)
        if isinstance(block.attention, Attention):
            # all tokens are looked at, also where the head reads one: a photo has only one of those
            block.attention, block.queries = Attention(block.attention.heads), None
        return block


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
        mixed, _ = self.block.attention.forward(qkv, self._run, None, None)
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
