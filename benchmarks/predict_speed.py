"""What `predict` adds to ONNX Runtime alone and to decoding alone, on a run's own kind of photos.

    python -m benchmarks.predict_speed RUN PHOTOS [--count 1000] [--rounds 3]

In turn, each a process of its own: a bare session fed photos that are decoded already (in batches of one, two and
eight), decoding alone with as many threads as `predict` has, and the command `predict --csv` whole. Seconds for `count`
photos (the folder is gone through again where it has fewer), and the highest memory of each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from wasi_edge.inference.onnx_backend import OnnxClassifier, open_session
from wasi_edge.inference.predict import decoded_views, iter_photos, read_view
from wasi_edge.memory.malloc import count_threads
from wasi_edge.memory.process import read_memory
from wasi_edge.preprocess import normalise

_BATCHES = (1, 2, 8)
_DECODED = 64


def main() -> None:
    """The comparison; a child of it with `--part`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", default="")
    given = parser.parse_args()
    photos = list(itertools.islice(itertools.cycle(iter_photos([given.photos])), given.count))
    if given.part:
        print(json.dumps(_part(given.part, given.run, photos)))
        return
    parts = [*(f"session {batch}" for batch in _BATCHES), "decode"]
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in [*parts, "predict"]}
    for _ in range(given.rounds):
        for part in parts:
            command = [sys.executable, "-m", "benchmarks.predict_speed", str(given.run), str(given.photos)]
            command += ["--count", str(given.count), "--part", part]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[part].append(json.loads(done.stdout))
        found["predict"].append(_predict(given.run, photos))
    for part, rounds in found.items():
        seconds, peak = statistics.median(r["seconds"] for r in rounds), max(r["peak_mb"] for r in rounds)
        print(f"{part}: {seconds:.1f} s, {1000 * seconds / given.count:.1f} ms a photo, {peak:.0f} MB at most")
    for batch in _BATCHES:
        shares = [
            p["seconds"] / (s["seconds"] + d["seconds"])
            for p, s, d in zip(found["predict"], found[f"session {batch}"], found["decode"], strict=True)
        ]
        print(f"predict over session {batch} + decode: {statistics.median(shares):.3f} {[round(x, 3) for x in shares]}")


def _part(part: str, run: Path, photos: list[Path]) -> dict[str, Any]:
    classifier = OnnxClassifier(run / "model.onnx", count_threads())
    preprocessing = classifier.preprocessing
    if part == "decode":
        began = time.perf_counter()
        for _ in decoded_views(photos, preprocessing, 6):
            pass
    else:
        batch = int(part.split()[1])
        pixels = normalise(np.stack([read_view(path, preprocessing) for path in photos[:_DECODED]]), preprocessing)
        session = open_session(run / "model.onnx", count_threads())
        began = time.perf_counter()
        for first in range(0, len(photos), batch):
            session.run(None, {"pixels": pixels[first % (_DECODED - batch) :][:batch]})
    return {"seconds": time.perf_counter() - began, "peak_mb": read_memory().peak_rss_bytes / 2**20}


def _predict(run: Path, photos: list[Path]) -> dict[str, Any]:
    words = [sys.executable, "-m", "wasi_edge", "predict", str(run), "-", "--csv", "--backend", "onnx"]
    lines = "".join(f"{path}\n" for path in photos)
    began = time.perf_counter()
    done = subprocess.run(
        ["/usr/bin/time", "-f", "%M", *words], input=lines, capture_output=True, text=True, check=True
    )
    assert len(done.stdout.splitlines()) == len(photos) + 1
    return {"seconds": time.perf_counter() - began, "peak_mb": int(done.stderr.splitlines()[-1]) / 1024}


if __name__ == "__main__":
    main()
