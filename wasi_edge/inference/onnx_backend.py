"""An exported model as a classifier, run by ONNX Runtime (an extra). No torch in the process: it starts in a fraction
of the time and of the memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from wasi_edge.errors import ArtefactError
from wasi_edge.inference.onnx_metadata import OnnxMetadata
from wasi_edge.metrics import softmax
from wasi_edge.onnx_runtime import import_onnxruntime
from wasi_edge.preprocess import normalise


class OnnxClassifier:
    """Label probabilities of photos; as `TorchClassifier`, from a file that `wasi-edge export` wrote."""

    # more at once are hardly faster, and each takes 10 MB (ViT-S at 168 px)
    batch = 2

    def __init__(self, path: str | Path, threads: int) -> None:
        """Read the file. Raises UsageError without ONNX Runtime, ArtefactError where the file is damaged, foreign or
        takes photos instead of pixels."""
        self._session = open_session(path, threads)
        self.metadata = OnnxMetadata.from_properties(self._session.get_modelmeta().custom_metadata_map, str(path))
        if self.metadata.includes_preprocessing:
            raise ArtefactError(
                f"{path} prepares photos itself, for programs that cannot; export once more without "
                "--with-preprocessing for wasi-edge"
            )
        self.labels, self.preprocessing = list(self.metadata.labels), self.metadata.preprocessing
        self._input = self._session.get_inputs()[0].name

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """uint8 (B, S, S, 3) -> float32 (B, C)."""
        found: np.ndarray = self._session.run(None, {self._input: normalise(batch, self.preprocessing)})[0]
        return found

    def probabilities(self, batch: np.ndarray) -> np.ndarray:
        """uint8 (B, S, S, 3) -> float32 (B, C), rows sum to 1."""
        return softmax(self.logits(batch))


def open_session(path: str | Path, threads: int) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU. Raises UsageError without the library, ArtefactError for a file
    that it cannot run."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # it keeps what one call needed, and is no faster here
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base that is public
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ArtefactError(f"{path}: ONNX Runtime cannot run it ({reason}); export it again") from error
