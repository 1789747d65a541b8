"""An ONNX graph under construction, and the file it becomes. No torch, and never more than one weight in memory.

`onnx.helper` makes nodes and everything else that is small. Weights are named with their shape and a way to get their
values; the file is written as protocol buffers are laid out, a weight at a time, since a model in memory and its
serialised twin would take twice its size (ViT-B/16: 400 MB in factors, 690 dense).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper

from wasi_edge.errors import ArtefactError

# the first with an antialiased Resize; ONNX Runtime understands it since 1.14 (February 2023)
OPSET = 18
_IR_VERSION = 8
_LARGEST_BYTES = 2**31 - 1
# (field number << 3 | wire type 2) of what is written by hand
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW = 7 << 3 | 2, 5 << 3 | 2, 9 << 3 | 2


@dataclass(frozen=True)
class Constant:
    """A weight: `load` gives its values, in this shape and type."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], np.ndarray]


class Graph:
    """Nodes in the order of computation; every value is named after the node it comes from."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Constant] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._names: set[str] = set()
        self._known: dict[tuple[Any, ...], str] = {}

    def input(self, name: str, dtype: int, shape: tuple[int | str, ...]) -> str:
        """What goes in; a dimension given by name is open. `dtype`: one of TensorProto's."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return self._unique(name)

    def output(self, value: str, dtype: int, shape: tuple[int | str, ...]) -> None:
        """`value` comes out under its name."""
        self.outputs.append(helper.make_tensor_value_info(value, dtype, shape))

    def op(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        """A node of one output; returns the name of that."""
        return self.ops(kind, name, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, name: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """A node of several outputs."""
        name = self._unique(name)
        values = [name] if outputs == 1 else [self._unique(f"{name}.{number}") for number in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, values, name=name, **attributes))
        return values

    def weight(self, name: str, shape: tuple[int, ...], load: Callable[[], np.ndarray]) -> str:
        """A float32 weight that is read when it is written."""
        self.constants[self._unique(name)] = Constant(shape, np.dtype(np.float32), load)
        return name

    def constant(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        """A small constant, held once however often it is asked for."""
        array = np.asarray(values, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            name = self._known[key] = self._unique(name)
            self.constants[name] = Constant(array.shape, array.dtype, lambda: array)
        return self._known[key]

    def _unique(self, name: str) -> str:
        if name in self._names:
            raise AssertionError(f"two values are called {name}")
        self._names.add(name)
        return name


def write_model(file: BinaryIO, graph: Graph, metadata: Mapping[str, str]) -> None:
    """Write `graph` as one ONNX file. ArtefactError where it is larger than the format allows (2 GB)."""
    model = _skeleton(graph, metadata)
    body = model.graph.SerializeToString()
    model.ClearField("graph")
    heads = {name: _tensor_head(name, constant) for name, constant in graph.constants.items()}
    sizes = {name: len(heads[name]) + _bytes_of(constant) for name, constant in graph.constants.items()}
    total = len(body) + sum(1 + len(_varint(size)) + size for size in sizes.values())
    if total > _LARGEST_BYTES:
        raise ArtefactError(
            f"the model would take {total / 1e9:.1f} GB, an ONNX file may have 2; convert it to smaller factors"
        )
    file.write(model.SerializeToString() + bytes([_MODEL_GRAPH]) + _varint(total) + body)
    for name, constant in graph.constants.items():
        file.write(bytes([_GRAPH_INITIALIZER]) + _varint(sizes[name]) + heads[name])
        file.write(np.ascontiguousarray(_loaded(name, constant)).data)


def outline(graph: Graph) -> onnx.ModelProto:
    """The same model with weights as inputs of known shape, for checkers that would hold them several times; what is
    no float32 is what shapes depend on, and stays."""
    model = _skeleton(graph, {})
    for name, constant in graph.constants.items():
        if constant.dtype == np.float32:
            kind = helper.make_tensor_value_info(name, TensorProto.FLOAT, constant.shape)
            model.graph.input.append(kind)
        else:
            model.graph.initializer.append(onnx.numpy_helper.from_array(constant.load(), name))
    return model


def _skeleton(graph: Graph, metadata: Mapping[str, str]) -> onnx.ModelProto:
    from wasi_edge import __version__

    model = helper.make_model(
        helper.make_graph(graph.nodes, "wasi-edge", graph.inputs, graph.outputs),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="wasi-edge",
        producer_version=__version__,
    )
    helper.set_model_props(model, dict(metadata))
    return model


def _tensor_head(name: str, constant: Constant) -> bytes:
    """Everything of a TensorProto before its values."""
    head = TensorProto(name=name, dims=constant.shape, data_type=helper.np_dtype_to_tensor_dtype(constant.dtype))
    return head.SerializeToString() + bytes([_TENSOR_RAW]) + _varint(_bytes_of(constant))


def _loaded(name: str, constant: Constant) -> np.ndarray:
    values = constant.load()
    if values.shape != constant.shape or values.dtype != constant.dtype:
        raise AssertionError(f"{name}: promised {constant.dtype} {constant.shape}, got {values.dtype} {values.shape}")
    return values


def _bytes_of(constant: Constant) -> int:
    return math.prod(constant.shape) * constant.dtype.itemsize


def _varint(number: int) -> bytes:
    """A length as protocol buffers write it: seven bits a byte, the lowest first."""
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])
