"""Exported networks beside torch: one photo at a time, every contestant in a process of its own, in turn.

    python -m benchmarks.onnx_speed [--model vit_base_patch16_224] [--epsilon 0.8] [--rounds 7]

torch: the vanilla network. onnx dense, onnx factored: the files that `export` writes of the dense weights and of their
factors. onnx dense int8, onnx factored int8: the same in eight bits. A process times itself after two calls that do not
count, since threads of libraries wait for work in a loop and would take turns with those of another.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from wasi_edge.memory.hardware import hardware, integer_instructions
from wasi_edge.memory.malloc import count_threads, settle_threads

_CLASSES, _CALLS = 10, 8
CONTESTANTS = ("torch", "onnx dense", "onnx factored", "onnx dense int8", "onnx factored int8")


def main() -> None:
    """The comparison; a child of it with `--contestant`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--epsilon", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contestant", choices=[*CONTESTANTS, "write"])
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.contestant == "write":
        _write(given.model, given.epsilon, given.folder)
    elif given.contestant:
        print(json.dumps(_measure(given.contestant, given.model, given.folder)))
    else:
        _compare(given.model, given.epsilon, given.rounds)


def _compare(model: str, epsilon: float, rounds: int) -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        _child("write", model, epsilon, folder)
        sizes = {path.stem: path.stat().st_size for path in Path(folder).iterdir()}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
        for _ in range(rounds):
            for name in CONTESTANTS:
                found[name].append(json.loads(_child(name, model, epsilon, folder)))
    print(f"{model}, epsilon {epsilon:g}, {count_threads()} threads, {hardware()['cpu']}: {integer_instructions()}")
    print("contestant | ms a photo | x torch | x onnx dense | file MB | of the dense file | peak MB")
    for name in CONTESTANTS:
        times = [run["ms"] for run in found[name]]
        ratios = []
        for other in ("torch", "onnx dense"):
            shares = [run["ms"] / own for run, own in zip(found[other], times, strict=True)]
            ratios.append(f"{statistics.median(shares):.2f} [{min(shares):.2f} {max(shares):.2f}]")
        size = sizes.get(name, 0)
        peak = max(run["peak_mb"] for run in found[name])
        print(
            f"{name} | {statistics.median(times):.1f} | {' | '.join(ratios)} | {size / 2**20:.0f}"
            f" | {size / sizes['onnx dense']:.3f} | {peak:.0f}"
        )


def _child(contestant: str, model: str, epsilon: float, folder: str) -> str:
    words = ["--model", model, "--epsilon", str(epsilon), "--contestant", contestant, "--folder", folder]
    command = [sys.executable, "-m", "benchmarks.onnx_speed", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _measure(contestant: str, model: str, folder: Path) -> dict[str, float]:
    from wasi_edge.memory.process import read_memory

    if contestant == "torch":
        settle_threads()
        import torch

        from wasi_edge.bench.subject import find_subject
        from wasi_edge.models.vanilla import build_vanilla

        subject = find_subject(model, None)
        network = build_vanilla(subject.geometry, subject.reader(None), subject.image_size, _CLASSES)
        inputs = torch.randn(1, 3, subject.image_size, subject.image_size)

        def call() -> None:
            with torch.inference_mode():
                network(inputs)
    else:
        from wasi_edge.inference.onnx_backend import open_session

        session = open_session(folder / f"{contestant}.onnx", count_threads())
        size = session.get_inputs()[0].shape[2]
        pixels = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)

        def call() -> None:
            session.run(None, {"pixels": pixels})

    call()
    call()
    times = []
    for _ in range(_CALLS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return {"ms": 1000 * statistics.median(times), "peak_mb": read_memory().peak_rss_bytes / 2**20}


def _write(model: str, epsilon: float, folder: Path) -> None:
    from onnx import TensorProto

    from wasi_edge.bench.subject import find_subject
    from wasi_edge.export.graph import Graph, write_model
    from wasi_edge.export.int8 import quantise
    from wasi_edge.export.network import add_network

    subject = find_subject(model, None)
    size = subject.image_size
    for name, kept in (("onnx dense", None), ("onnx factored", epsilon)):
        graph = Graph()
        pixels = graph.input("pixels", TensorProto.FLOAT, ("batch", 3, size, size))
        tensors = _Tensors(subject.reader(kept), subject.geometry.feature_width)
        logits = add_network(graph, subject.geometry, subject.ranks(kept), tensors, size, _CLASSES, pixels)
        graph.output(logits, TensorProto.FLOAT, ("batch", _CLASSES))
        with open(folder / f"{name}.onnx", "wb") as file:
            write_model(file, graph, {})
        quantise(folder / f"{name}.onnx", folder / f"{name} int8.onnx")


class _Tensors:
    """Weights of a bench subject as `add_network` reads them, with a random classifier."""

    def __init__(self, read, features: int) -> None:
        rng = np.random.default_rng(0)
        self._read = read
        self._head = {
            "head.weight": 0.02 * rng.standard_normal((_CLASSES, features), dtype=np.float32),
            "head.bias": np.zeros(_CLASSES, np.float32),
        }

    def read(self, name: str, dtype: type = np.float32) -> np.ndarray:
        return self._head[name] if name in self._head else self._read(name).float().numpy()

    def read_rows(self, name: str, start: int, stop: int, dtype: type = np.float32) -> np.ndarray:
        return self.read(name)[start:stop]


if __name__ == "__main__":
    main()
