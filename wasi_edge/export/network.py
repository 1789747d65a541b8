"""A vision transformer as nodes of ONNX: two thin matrix products for a factored linear, all else standard operators.

    pixels (B, C, S, S) -> tokens -> blocks -> norm -> features -> logits (B, classes)

What can be decided beforehand is: LayerScale is multiplied into the linear before it, the scale of the attention's
scores into the queries, positions are resampled, Swin's windows are one gather between two blocks
(`models/windows.py`), and the last block computes only the tokens that the head reads. GELU is spelled as runtimes
recognise it. The twin of `models/network.py`, in whose words it is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import numpy as np

from wasi_edge.export.graph import Graph
from wasi_edge.models.geometry import BlockShape, ViTGeometry
from wasi_edge.models.geometry_swin import Geometry, SwinGeometry
from wasi_edge.models.resample import resampled
from wasi_edge.models.windows import entry_order, relative_index, shift_mask


class Tensors(Protocol):
    """What is read from: `tensorfile.TensorFile`, or a stand-in."""

    def read(self, name: str, dtype: type = ...) -> np.ndarray:
        """A tensor, whole."""

    def read_rows(self, name: str, start: int, stop: int, dtype: type = ...) -> np.ndarray:
        """Its rows from `start` to before `stop`."""


def add_network(
    graph: Graph,
    geometry: Geometry,
    ranks: Mapping[str, int | None],
    tensors: Tensors,
    image_size: int,
    num_classes: int,
    pixels: str,
    divisors: Mapping[str, np.ndarray] | None = None,
) -> str:
    """Add the network to `graph`; returns the name of its logits.

    `divisors` maps factored linears to one number a channel between their factors, (K,): what the right factor gives is
    divided by them and the left one multiplied, which changes nothing but how well both can be rounded to eight bits.
    """
    build = _Builder(graph, geometry, ranks, tensors, image_size, divisors or {})
    x = build.stem(pixels)
    for index, shape in enumerate(geometry.block_shapes(image_size)):
        x = build.block(index, shape, x)
    features = build.features(x)
    weight = build.weight("head.weight", (geometry.feature_width, num_classes), lambda w: w.T)
    x = graph.op("MatMul", "head.product", features, weight)
    return graph.op("Add", "logits", x, build.weight("head.bias", (num_classes,)))


def between_factors(ranks: Mapping[str, int | None]) -> dict[str, str]:
    """Of every factored linear, the name of the value between its two products."""
    return {linear: f"{linear}.right.product" for linear, rank in ranks.items() if rank is not None}


def _times_rows(weight: np.ndarray, factors: np.ndarray | None) -> np.ndarray:
    """(I, O), row i times `factors[i]`."""
    return weight if factors is None else weight * factors[:, None]


class _Builder:
    def __init__(
        self,
        graph: Graph,
        geometry: Geometry,
        ranks: Mapping[str, int | None],
        tensors: Tensors,
        image_size: int,
        divisors: Mapping[str, np.ndarray],
    ) -> None:
        self._graph, self._geometry, self._ranks = graph, geometry, ranks
        self._tensors, self._size, self._divisors = tensors, image_size, divisors

    # ---- what comes before and after the blocks ------------------------------------------------

    def stem(self, pixels: str) -> str:
        """(B, C, S, S) -> tokens (B, N, D)."""
        op, geometry = self._graph.op, self._geometry
        patch, grid = geometry.patch_size, geometry.grid(self._size)
        width = geometry.block_shapes(self._size)[0].width
        shape = (width, geometry.channels, patch, patch)
        weight = self.weight("patch_embed.weight", shape, lambda w: w.reshape(shape))
        x = op("Conv", "patch_embed", pixels, weight, self.weight("patch_embed.bias", (width,)), strides=[patch, patch])
        x = op("Reshape", "patches.flat", x, self._shape(0, width, grid * grid))
        x = op("Transpose", "patches", x, perm=[0, 2, 1])
        if isinstance(geometry, SwinGeometry):
            return self._norm("patch_norm", x, width)
        return self._with_leading_tokens(geometry, x, width)

    def _with_leading_tokens(self, geometry: ViTGeometry, patches: str, width: int) -> str:
        op, size = self._graph.op, self._size
        position = resampled("position", self._tensors.read("position", np.float32), geometry, size)
        classes = int(geometry.class_token)
        x = op("Add", "patches.placed", patches, self._graph.constant("position", position[None, classes:]))
        leading = []
        if geometry.class_token:
            leading.append(self._tensors.read("class_token", np.float32)[None] + position[:1])
        if geometry.registers:
            leading.append(self._tensors.read("registers", np.float32))
        if not leading:
            return x
        tokens = self._graph.constant("leading_tokens", np.concatenate(leading)[None])
        # as many copies as there are photos
        batch = op("Shape", "batch", patches, start=0, end=1)
        shape = op("Concat", "leading_tokens.shape", batch, self._shape(geometry.leading_tokens, width), axis=0)
        return op("Concat", "tokens", op("Expand", "leading_tokens.all", tokens, shape), x, axis=1)

    def features(self, x: str) -> str:
        """(B, n, D) -> (B, F)."""
        op, geometry = self._graph.op, self._geometry
        width = geometry.block_shapes(self._size)[-1].width
        if geometry.pool_first:
            return self._norm("norm", self._mean(x), width)
        x, parts = self._norm("norm", x, width), []
        for read in geometry.features.split("+"):
            if read == "mean":
                parts.append(self._mean(x))
            else:
                place = self._graph.constant(f"features.{read}.place", 0 if read == "class" else 1, np.int64)
                parts.append(op("Gather", f"features.{read}", x, place, axis=1))
        return parts[0] if len(parts) == 1 else op("Concat", "features", *parts, axis=1)

    def _mean(self, x: str) -> str:
        patches = self._tokens("features.patches", x, self._geometry.leading_tokens, 2**31)
        axis = self._graph.constant("features.axis", [1], np.int64)
        return self._graph.op("ReduceMean", "features.mean", patches, axis, keepdims=0)

    # ---- blocks --------------------------------------------------------------------------------

    def block(self, index: int, shape: BlockShape, x: str) -> str:
        """(B, N, D) -> (B, n, D), n the tokens that are asked for."""
        op, name, width = self._graph.op, f"blocks.{index}", shape.width
        asking = self._geometry.queries if index == self._geometry.depth - 1 else None
        if isinstance(self._geometry, SwinGeometry):
            x = self._entered(self._geometry, index, shape, x)
        scales = ("scale1", "scale2") if self._geometry.layer_scale else (None, None)

        normed = self._norm(f"{name}.norm1", x, width)
        if isinstance(self._geometry, SwinGeometry):
            mixed = self._window_attention(self._geometry, index, shape, normed)
        else:
            mixed = self._attention(name, shape, normed, asking)
        residual = x if asking is None else self._tokens(f"{name}.asked", x, 0, asking)
        branch = self._linear(f"{name}.proj", mixed, scales[0])
        x = op("Add", f"{name}.middle", branch, residual)
        inner = self._linear(f"{name}.fc1", self._norm(f"{name}.norm2", x, width))
        branch = self._linear(f"{name}.fc2", self._gelu(f"{name}.gelu", inner), scales[1])
        return op("Add", f"{name}.out", branch, x)

    def _attention(self, name: str, shape: BlockShape, normed: str, asking: int | None) -> str:
        op, heads, head_dim = self._graph.op, shape.heads, shape.width // shape.heads
        q, k, v = self._queries_keys_values(name, normed, shape, asking)
        by_head = self._shape(0, shape.tokens, heads, head_dim)
        asked = by_head if asking is None else self._shape(0, asking, heads, head_dim)
        q = op("Transpose", f"{name}.q.heads", op("Reshape", f"{name}.q.split", q, asked), perm=[0, 2, 1, 3])
        k = op("Transpose", f"{name}.k.heads", op("Reshape", f"{name}.k.split", k, by_head), perm=[0, 2, 3, 1])
        v = op("Transpose", f"{name}.v.heads", op("Reshape", f"{name}.v.split", v, by_head), perm=[0, 2, 1, 3])
        scores = op("Softmax", f"{name}.probabilities", op("MatMul", f"{name}.scores", q, k), axis=-1)
        mixed = op("Transpose", f"{name}.mixed.tokens", op("MatMul", f"{name}.mixed", scores, v), perm=[0, 2, 1, 3])
        return op("Reshape", f"{name}.attention", mixed, self._shape(0, asking or shape.tokens, shape.width))

    def _window_attention(self, geometry: SwinGeometry, index: int, shape: BlockShape, normed: str) -> str:
        op, name, heads = self._graph.op, f"blocks.{index}", shape.heads
        head_dim, count = shape.width // heads, shape.attended
        windows = shape.tokens // count
        q, k, v = self._queries_keys_values(name, normed, shape, None)
        by_head = self._shape(0, windows, count, heads, head_dim)
        q, k, v = (
            op("Transpose", f"{name}.{key}.heads", op("Reshape", f"{name}.{key}.split", x, by_head), perm=perm)
            for key, x, perm in (("q", q, [0, 1, 3, 2, 4]), ("k", k, [0, 1, 3, 4, 2]), ("v", v, [0, 1, 3, 2, 4]))
        )
        scores = op("Add", f"{name}.scores.placed", op("MatMul", f"{name}.scores", q, k), self._bias(geometry, index))
        probabilities = op("Softmax", f"{name}.probabilities", scores, axis=-1)
        mixed = op("MatMul", f"{name}.mixed", probabilities, v)
        mixed = op("Transpose", f"{name}.mixed.tokens", mixed, perm=[0, 1, 3, 2, 4])
        return op("Reshape", f"{name}.attention", mixed, self._shape(0, shape.tokens, shape.width))

    def _bias(self, geometry: SwinGeometry, index: int) -> str:
        """What is added to the scores (windows or 1, H, n, n): position and, in shifted windows, what keeps apart."""
        window = geometry.window_at(self._size)
        grid = geometry.grid(self._size) >> geometry.stage_of(index)[0]
        mask = shift_mask(grid, window, geometry.shift_at(self._size, index))
        heads, count = geometry.stage_heads[geometry.stage_of(index)[0]], window * window
        name = f"blocks.{index}.attention.bias_table"

        def values() -> np.ndarray:
            table = resampled(name, self._tensors.read(name, np.float32), geometry, self._size)
            bias = table[relative_index(window)].transpose(2, 0, 1)[None]
            return np.ascontiguousarray(bias if mask is None else bias + mask[:, None])

        windows = 1 if mask is None else len(mask)
        return self._graph.weight(f"blocks.{index}.attention.bias", (windows, heads, count, count), values)

    def _entered(self, geometry: SwinGeometry, index: int, shape: BlockShape, x: str) -> str:
        op, name = self._graph.op, f"blocks.{index}"
        entry = entry_order(geometry, index, self._size)
        if entry is None:
            return x
        order = self._graph.constant(f"{name}.order", entry.order, np.int64)
        x = op("Gather", f"{name}.entry", x, order, axis=1)
        if not entry.merges:
            return x
        x = op("Reshape", f"{name}.merged", x, self._shape(0, shape.tokens, 2 * shape.width))
        x = self._norm(f"{name}.merge_norm", x, 2 * shape.width)
        return self._linear(f"{name}.merge", x, has_bias=False)

    # ---- layers --------------------------------------------------------------------------------

    def _queries_keys_values(self, name: str, x: str, shape: BlockShape, asking: int | None) -> tuple[str, str, str]:
        """Three (B, N, D), of queries only those that ask, and scaled: (D, K) rows of the linear's left factor each."""
        op, linear, width = self._graph.op, f"{name}.qkv", shape.width
        rank = self._ranks[linear]
        inner, matrix = width, f"{linear}.weight"
        if rank is not None:
            x = op("MatMul", f"{linear}.right.product", x, self._right(linear, width, rank))
            inner, matrix = rank, f"{linear}.left"
        divisors = self._divisors.get(linear)
        found = []
        for number, key in enumerate("qkv"):
            scale = np.float32((width // shape.heads) ** -0.5 if key == "q" else 1.0)

            def rows(tensor: str, number: int = number, scale: np.float32 = scale) -> np.ndarray:
                return self._tensors.read_rows(tensor, number * width, (number + 1) * width, np.float32) * scale

            def values(rows: Callable[[str], np.ndarray] = rows) -> np.ndarray:
                return _times_rows(rows(matrix).T, divisors)

            weight = self._graph.weight(f"{matrix}.{key}", (inner, width), values)
            bias = self._graph.weight(f"{linear}.bias.{key}", (width,), partial(rows, f"{linear}.bias"))
            source = self._tokens(f"{name}.asking", x, 0, asking) if key == "q" and asking is not None else x
            product = op("MatMul", f"{linear}.{key}.product", source, weight)
            found.append(op("Add", f"{linear}.{key}", product, bias))
        return found[0], found[1], found[2]

    def _linear(self, name: str, x: str, scale: str | None = None, has_bias: bool = True) -> str:
        """x W^T + b, times the LayerScale of that name: (B, N, I) -> (B, N, O)."""
        op, rank = self._graph.op, self._ranks[name]
        out, inner = self._geometry.linear_shapes()[name]
        key = f"{name.rpartition('.')[0]}.{scale}"

        def scaled(value: np.ndarray) -> np.ndarray:
            if scale is None:
                return value
            factor = self._tensors.read(key, np.float32)
            return value * (factor[:, None] if value.ndim == 2 else factor)

        divisors = self._divisors.get(name)
        if rank is None:
            weight = self.weight(f"{name}.weight", (inner, out), lambda w: scaled(w).T)
        else:
            x = op("MatMul", f"{name}.right.product", x, self._right(name, inner, rank))
            weight = self.weight(f"{name}.left", (rank, out), lambda w: _times_rows(scaled(w).T, divisors))
        if not has_bias:
            return op("MatMul", name, x, weight)
        return op("Add", name, op("MatMul", f"{name}.product", x, weight), self.weight(f"{name}.bias", (out,), scaled))

    def _right(self, name: str, inner: int, rank: int) -> str:
        divisors = self._divisors.get(name)
        return self.weight(f"{name}.right", (inner, rank), lambda w: w.T if divisors is None else w.T / divisors)

    def _gelu(self, name: str, x: str) -> str:
        """x / 2 (1 + erf(x / sqrt 2))."""
        op, constant = self._graph.op, self._graph.constant
        erf = op("Erf", f"{name}.erf", op("Div", f"{name}.divided", x, constant("sqrt2", math.sqrt(2))))
        gated = op("Mul", f"{name}.gated", x, op("Add", f"{name}.gate", erf, constant("one", 1)))
        return op("Mul", name, gated, constant("half", 0.5))

    def _norm(self, name: str, x: str, width: int) -> str:
        weight, bias = (self.weight(f"{name}.{key}", (width,)) for key in ("weight", "bias"))
        return self._graph.op("LayerNormalization", name, x, weight, bias, axis=-1, epsilon=self._geometry.norm_eps)

    def _tokens(self, name: str, x: str, start: int, stop: int) -> str:
        """(B, N, D) -> tokens `start` to before `stop`."""
        if start == 0 and stop == 2**31:
            return x
        bounds = (self._graph.constant(f"{name}.{key}", [value], np.int64) for key, value in
                  (("start", start), ("stop", stop), ("axis", 1)))  # fmt: skip
        return self._graph.op("Slice", name, x, *bounds)

    def weight(
        self, name: str, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> str:
        """The tensor `name` of the artefact, changed into `shape`."""

        def load() -> np.ndarray:
            value = self._tensors.read(name, np.float32)
            return value if change is None else np.ascontiguousarray(change(value))

        return self._graph.weight(name, shape, load)

    def _shape(self, *lengths: int) -> str:
        """The constant shape; 0 is the length that is there."""
        return self._graph.constant("shape." + "x".join(map(str, lengths)), lengths, np.int64)
