"""`preprocess.py` as nodes of ONNX: upright photos in, what the network sees out, for programs that have no Pillow.

    uint8 (B, H, W, 3) -> short side to `resize_side`, antialiased -> middle (S, S) -> (x / 255 - mean) / std

All photos of a batch have one size. Values are rounded after the resize as Pillow does; it also rounds between the two
directions, and `open_photo` reduces large photos by whole factors first, so single values differ by one or two of 255.
"""

from __future__ import annotations

import numpy as np

from wasi_edge.errors import ArtefactError
from wasi_edge.export.graph import Graph
from wasi_edge.preprocessing import Preprocessing

# Pillow's kernels in ONNX's words
_MODES = {
    "bilinear": {"mode": "linear", "exclude_outside": 1},
    "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1},
}


def add_preprocessing(graph: Graph, preprocessing: Preprocessing, photos: str) -> str:
    """Add it to `graph`; returns the name of the pixels float32 (B, 3, S, S). Raises ArtefactError for an interpolation
    that ONNX does not have with antialiasing."""
    if preprocessing.interpolation not in _MODES:
        raise ArtefactError(
            f"photos are shrunk by {preprocessing.interpolation!r} here, which ONNX has not got; "
            "export without --with-preprocessing"
        )
    op = graph.op
    x = op("Transpose", "photos.planes", photos, perm=[0, 3, 1, 2])
    x = op("Cast", "photos.float", x, to=1)
    lengths = op("Shape", "photos.lengths", x, start=2, end=4)
    resized = _resized_lengths(graph, preprocessing, lengths)
    axes = [2, 3]
    x = op(
        "Resize", "photos.resized", x, "", "", resized, axes=axes, antialias=1, **_MODES[preprocessing.interpolation]
    )
    x = op(
        "Clip",
        "photos.clipped",
        op("Round", "photos.rounded", x),
        _float(graph, "black", 0),
        _float(graph, "white", 255),
    )
    start = _offsets(graph, preprocessing, resized)
    side = _int(graph, "crop.side", [preprocessing.image_size])
    stop = op("Add", "crop.stop", start, side)
    x = op("Slice", "photos.middle", x, start, stop, _int(graph, "crop.axes", axes))
    mean, std = (np.asarray(values, np.float32).reshape(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    x = op("Mul", "photos.scaled", x, graph.constant("photos.scale", 1 / (255 * std)))
    return op("Sub", "photos.normalised", x, graph.constant("photos.shift", mean / std))


def _resized_lengths(graph: Graph, preprocessing: Preprocessing, lengths: str) -> str:
    """(height, width) after the resize: the short one `resize_side`, the other in proportion, rounded down."""
    op, side = graph.op, preprocessing.resize_side
    wanted = _int(graph, "resize.side", [side])
    if preprocessing.squash:
        return _int(graph, "resize.sides", [side, side])
    short = op("ReduceMin", "photos.short", lengths, keepdims=1)
    return op("Div", "photos.resized_lengths", op("Mul", "photos.long_by_side", lengths, wanted), short)


def _offsets(graph: Graph, preprocessing: Preprocessing, resized: str) -> str:
    """(top, left) of the middle, as `shrink` and `center_view` find it: long sides are cut to twice the short first."""
    op, side = graph.op, preprocessing.resize_side
    two = _int(graph, "two", [2])
    kept = op("Min", "photos.kept", resized, _int(graph, "resize.most", [2 * side]))
    cut = op("Div", "photos.cut", op("Sub", "photos.excess", resized, kept), two)
    margin = op("Sub", "crop.margin", kept, _int(graph, "crop.side", [preprocessing.image_size]))
    if preprocessing.even_offset:  # ONNX rounds halves to even numbers, as Python does
        half = op("Mul", "crop.half", op("Cast", "crop.margin.float", margin, to=1), _float(graph, "half", 0.5))
        offset = op("Cast", "crop.offset", op("Round", "crop.rounded", half), to=7)
    else:
        offset = op("Div", "crop.offset", margin, two)
    return op("Add", "crop.start", cut, offset)


def _int(graph: Graph, name: str, values: list[int]) -> str:
    return graph.constant(name, values, np.int64)


def _float(graph: Graph, name: str, value: float) -> str:
    return graph.constant(name, value, np.float32)
