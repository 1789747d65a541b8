"""What a model answers to given pictures, computed in a process of its own, whose memory is gone when it ends.

    python -m wasi_edge.export.answers torch|onnx MODEL     an array as numpy.save writes it on stdin, answers on stdout

`torch` runs a model folder as `predict` does, on views uint8 (B, S, S, 3); `onnx` an exported file on what its graph
takes, with ONNX Runtime where it is installed, else with the slow evaluator that comes with onnx.
"""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wasi_edge.children import python_command
from wasi_edge.errors import ArtefactError

RUNTIME, REFERENCE = "ONNX Runtime", "onnx's reference evaluator"


def runner() -> str:
    """What computes the answers of an exported file here."""
    return RUNTIME if importlib.util.find_spec("onnxruntime") is not None else REFERENCE


def sample_views(size: int, count: int, seed: int = 0) -> np.ndarray:
    """Smooth pictures in all colours, uint8 (count, size, size, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    smooth = [Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC) for picture in coarse]
    return np.stack([np.asarray(picture) for picture in smooth])


def answers_of(kind: str, model: Path, inputs: np.ndarray) -> np.ndarray:
    """Answers (B, C) from a child process. Raises ArtefactError with its message if it fails."""
    question = io.BytesIO()
    np.save(question, inputs)
    command = python_command("-m", "wasi_edge.export.answers", kind, str(model))
    done = subprocess.run(command, input=question.getvalue(), capture_output=True, check=False)
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ArtefactError(f"{model} could not be run by {'torch' if kind == 'torch' else runner()}: {last[0]}")
    found: np.ndarray = np.load(io.BytesIO(done.stdout))
    return found


def _answers(kind: str, model: Path, inputs: np.ndarray) -> np.ndarray:
    from wasi_edge.memory.malloc import settle_threads, tune_malloc

    tune_malloc()
    threads = settle_threads()
    answer = _torch(model) if kind == "torch" else _onnx(model, threads)
    return np.concatenate([answer(inputs[i : i + 1]) for i in range(len(inputs))])


def _torch(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    from wasi_edge.inference.torch_backend import TorchClassifier
    from wasi_edge.memory.libraries import release_library_pages

    release_library_pages()
    return TorchClassifier(folder).logits


def _onnx(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    if runner() == RUNTIME:
        from wasi_edge.inference.onnx_backend import open_session

        session: Any = open_session(path, threads)
        name = session.get_inputs()[0].name
    else:
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(str(path))
        name = session.input_names[0]
    return lambda batch: session.run(None, {name: batch})[0]


if __name__ == "__main__":
    np.save(sys.stdout.buffer, _answers(sys.argv[1], Path(sys.argv[2]), np.load(io.BytesIO(sys.stdin.buffer.read()))))
