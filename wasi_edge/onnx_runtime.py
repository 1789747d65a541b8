"""ONNX Runtime, imported so that it reports to nobody.

From 1.29 on its Linux wheels send usage data (graph names, hashes, times, a device identifier kept in the user's
cache) to their maker unless told otherwise before the library is loaded. What runs here stays here.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from wasi_edge.errors import UsageError

_OFF = "ORT_DISABLE_TELEMETRY"


def import_onnxruntime(wanted_by: str = "this", module: str = "onnxruntime") -> Any:
    """`onnxruntime`, or a module of it. Raises UsageError where it is not installed, or not whole."""
    os.environ[_OFF] = "1"
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = 'pip install "wasi-edge[onnxruntime]"'
        if error.name == "onnxruntime":
            raise UsageError(f"{wanted_by} needs ONNX Runtime, an extra: {remedy}") from error
        raise UsageError(
            f"{wanted_by} needs ONNX Runtime, which cannot be imported: {error}; again: {remedy}"
        ) from error
