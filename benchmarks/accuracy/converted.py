"""The dense network in factors, calibrated on the photos that it is then trained on: `finetune` from a dense source."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.accuracy.datasets import Photos
from wasi_edge.bench.subject import Subject, find_subject
from wasi_edge.conversion.calibration import spread
from wasi_edge.conversion.convert import Calibration, Settings, convert
from wasi_edge.conversion.sources import open_source
from wasi_edge.preprocess import center_view


@contextmanager
def converted(
    model: str, photos: Photos, train: np.ndarray, at_most: int, epsilon: float, size: int
) -> Iterator[tuple[Subject, float]]:
    """`model` at `epsilon`, calibrated on `at_most` of the photos `train`, and the seconds it took; gone afterwards."""
    chosen = [int(train[i]) for i in spread(len(train), at_most)]
    views = Calibration(len(chosen), lambda index: center_view(photos.read(chosen[index]), photos.preprocessing))
    settings = Settings(epsilon, "float32", size, always_factor=True)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        with open_source(Path(model)) as source:
            convert(source, Path(folder) / "model", settings, views, {}, lambda done, total: None)
        seconds = time.monotonic() - began
        yield find_subject(str(Path(folder) / "model"), size), seconds
