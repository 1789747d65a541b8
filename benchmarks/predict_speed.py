"""What `predict` adds to ONNX Runtime alone and to decoding alone, on a run's own kind of photos.

    python -m benchmarks.predict_speed RUN PHOTOS [--count 1000] [--rounds 10]

In turn, a tenth of the photos each round: a bare session fed photos that are decoded already, in batches of one, two
and eight; decoding alone; and `predict`'s own loop. Then the whole command on all of them, for its memory and start.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from wasi_edge.inference.classifier import Backend, open_classifier
from wasi_edge.inference.onnx_backend import open_session
from wasi_edge.inference.predict import decoded_views, iter_photos, predict_paths, read_view
from wasi_edge.memory.malloc import count_threads, tune_malloc
from wasi_edge.preprocess import normalise

_BATCHES = (1, 2, 8)
_DECODED, _TOGETHER = 64, 8


def main() -> None:
    """The comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    photos = list(itertools.islice(itertools.cycle(iter_photos([given.photos])), given.count))
    tune_malloc()
    parts = _parts(given.run, photos)
    share = max(1, given.count // given.rounds)
    found: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(given.rounds):
        chosen = photos[number * share :][:share]
        for name, work in parts.items():
            work(chosen[:4])  # threads of the one before stop waiting for work
            began = time.perf_counter()
            work(chosen)
            found[name].append((time.perf_counter() - began) / len(chosen))
    for name, seconds in found.items():
        print(f"{name}: {1000 * statistics.median(seconds):.1f} ms a photo")
    for batch in _BATCHES:
        pairs = zip(found["predict"], found[f"session, {batch} at once"], found["decoding"], strict=True)
        shares = [predict / (session + decoding) for predict, session, decoding in pairs]
        middle = statistics.median(shares)
        print(f"predict over session, {batch} at once, and decoding: {middle:.3f} {[round(x, 2) for x in shares]}")
    seconds, peak = _command(given.run, photos)
    first = min(_command(given.run, photos[:1])[0] for _ in range(3))
    print(f"the command, {given.count} photos: {seconds:.1f} s, {peak:.0f} MB; one photo: {first:.2f} s")


def _parts(run: Path, photos: list[Path]) -> dict[str, Callable[[list[Path]], Any]]:
    classifier = open_classifier(run, Backend.ONNX)
    preprocessing = classifier.preprocessing
    pixels = normalise(np.stack([read_view(path, preprocessing) for path in photos[:_DECODED]]), preprocessing)
    session = open_session(run / "model.onnx", count_threads())

    def bare(batch: int) -> Callable[[list[Path]], Any]:
        def work(chosen: list[Path]) -> None:
            for first in range(0, len(chosen), batch):
                session.run(None, {"pixels": pixels[first % (_DECODED - batch) :][:batch]})

        return work

    return {
        **{f"session, {batch} at once": bare(batch) for batch in _BATCHES},
        "decoding": lambda chosen: list(decoded_views(chosen, preprocessing, _TOGETHER)),
        "predict": lambda chosen: list(predict_paths(classifier, chosen)),
    }


def _command(run: Path, photos: list[Path]) -> tuple[float, float]:
    """(seconds, MB at most) of `predict --csv` on the photos."""
    words = [sys.executable, "-m", "wasi_edge", "predict", str(run), "-", "--csv", "--backend", "onnx"]
    timed, lines = ["/usr/bin/time", "-f", "%M", *words], "".join(f"{path}\n" for path in photos)
    began = time.perf_counter()
    done = subprocess.run(timed, input=lines, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    assert len(done.stdout.splitlines()) == len(photos) + 1
    return seconds, int(done.stderr.splitlines()[-1]) / 1024


if __name__ == "__main__":
    main()
