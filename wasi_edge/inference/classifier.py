"""What predicting and evaluating need of a model, and how one is opened. Torch comes with its backend."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from wasi_edge.errors import UsageError
from wasi_edge.preprocessing import Preprocessing

if TYPE_CHECKING:  # the command line reads `Backend` at every start, and needs neither numpy nor Pillow for it
    import numpy as np


class Classifier(Protocol):
    """Anything that gives label probabilities of photos."""

    labels: list[str]
    preprocessing: Preprocessing

    def probabilities(self, batch: np.ndarray) -> np.ndarray:
        """uint8 (B, S, S, 3) -> float32 (B, C)."""


class Backend(enum.StrEnum):
    """What computes a prediction."""

    AUTO = "auto"
    ONNX = "onnx"
    TORCH = "torch"


def open_classifier(folder: Path, backend: Backend = Backend.AUTO) -> Classifier:
    """The model in `folder`. UsageError for a backend that is not there, ArtefactError for a bad model."""
    if backend is Backend.ONNX:
        raise UsageError(
            "--backend onnx needs a model.onnx, which comes with `wasi-edge export` in a later version; "
            "leave --backend away or write --backend torch"
        )
    from wasi_edge.inference.torch_backend import TorchClassifier

    return TorchClassifier(folder)
