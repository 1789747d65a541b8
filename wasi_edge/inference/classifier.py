"""What predicting and evaluating need of a model, and how one is opened. Torch comes with its backend."""

from __future__ import annotations

import enum
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from wasi_edge.errors import ArtefactError, UsageError
from wasi_edge.inference.onnx_metadata import ONNX_NAME
from wasi_edge.preprocessing import Preprocessing

if TYPE_CHECKING:  # the command line reads `Backend` at every start, and needs neither numpy nor Pillow for it
    import numpy as np

    from wasi_edge.inference.onnx_backend import OnnxClassifier


class Classifier(Protocol):
    """Anything that gives label probabilities of photos; it likes `batch` of them at a time."""

    batch: int
    labels: list[str]
    preprocessing: Preprocessing

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """uint8 (B, S, S, 3) -> float32 (B, C)."""

    def probabilities(self, batch: np.ndarray) -> np.ndarray:
        """uint8 (B, S, S, 3) -> float32 (B, C), rows sum to 1."""


class Backend(enum.StrEnum):
    """What computes a prediction."""

    AUTO = "auto"
    ONNX = "onnx"
    TORCH = "torch"


def open_classifier(
    model: Path,
    backend: Backend = Backend.AUTO,
    threads: int | None = None,
    on_message: Callable[[str], None] = lambda text: None,
) -> Classifier:
    """The model in a folder, or in an exported file. `auto` takes ONNX Runtime where it is installed and the folder's
    `model.onnx` is of the weights beside it, else torch; where that file cannot be used, `on_message` hears why.

    UsageError for a backend that is not there, ArtefactError for a bad model.
    """
    if model.is_file():
        if backend is Backend.TORCH:
            raise UsageError(f"{model} is an exported file, which torch cannot run: name the run that it was made from")
        return _open_onnx(model, threads)
    path = model / ONNX_NAME
    if backend is Backend.ONNX:
        if not path.is_file():
            raise UsageError(f"{model} has no {ONNX_NAME}; make it: wasi-edge export {model} {path}")
        return _open_current(model, threads)
    if backend is Backend.AUTO and importlib.util.find_spec("onnxruntime") is not None and path.is_file():
        try:
            return _open_current(model, threads)
        except (ArtefactError, UsageError) as error:
            on_message(f"torch is taken: {error}")
    from wasi_edge.inference.torch_backend import TorchClassifier

    return TorchClassifier(model, threads)


def _open_current(folder: Path, threads: int | None) -> OnnxClassifier:
    """The folder's exported model. Raises ArtefactError where it is of other weights than those beside it."""
    from wasi_edge.artefact import fingerprint, open_artefact

    with open_artefact(folder) as artefact:
        weights, path = fingerprint(artefact), folder / ONNX_NAME
    found = _open_onnx(path, threads)
    if found.metadata.weights != weights:
        raise ArtefactError(
            f"{path} is of other weights than those beside it; make it again: wasi-edge export {folder} {path}"
        )
    return found


def _open_onnx(path: Path, threads: int | None) -> OnnxClassifier:
    from wasi_edge.inference.onnx_backend import OnnxClassifier
    from wasi_edge.memory.malloc import count_threads, reuse_freed_memory

    classifier = OnnxClassifier(path, count_threads(threads))
    reuse_freed_memory(any_size=True)
    return classifier
