"""The dense network in factors: as `finetune` converts it, on the photos that it is then trained on, and as a user does
with `wasi-edge convert`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.accuracy.datasets import Photos
from wasi_edge.bench.subject import Subject, find_subject
from wasi_edge.conversion import convert as whole
from wasi_edge.conversion import regression
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


@contextmanager
def simpler(plain_ranks: bool, truncated: bool) -> Iterator[None]:
    """Within, conversions do less with the photos, at the same number of parameters: the ranks are those that epsilon
    gives each linear, or factors are those of the dense weight in the metric of the inputs, with its mean outputs."""
    with ExitStack() as changed:
        if plain_ranks:
            changed.enter_context(mock.patch.object(whole, "_spread", lambda ranks, *_: ranks))
        if truncated:
            as_it_is = mock.patch.object(regression, "_regressed_weight", lambda weight, c, _: weight.to(c.dtype))
            changed.enter_context(as_it_is)
        yield


@contextmanager
def converted_by_command(
    model: str, calibration: list[Path], epsilon: float, size: int, budget: str
) -> Iterator[tuple[Subject, dict[str, Any]]]:
    """`model` as `wasi-edge convert` makes it in a process of its own, calibrated on these files if there are any.

    With it the seconds of wall clock, the peak of resident memory (VmHWM: what `wait4` says is at least the parent's)
    and the parameters stored. Gone afterwards. Raises CalledProcessError where the command fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, own = Path(folder) / "model", Path(folder) / "photos"
        command = [sys.executable, "-m", "wasi_edge", "convert", model, str(out), "--json", "--budget", budget]
        command += ["--epsilon", str(epsilon), "--image-size", str(size)]
        if calibration:
            own.mkdir()
            for number, path in enumerate(calibration):
                shutil.copy(path, own / f"{number:04d}{path.suffix}")
            command += ["--calibrate", str(own)]
        began = time.monotonic()
        with (Path(folder) / "said").open("w") as said:
            subprocess.run(command, stdout=said, check=True)
        told = json.loads((Path(folder) / "said").read_text())
        measured = {
            "seconds": round(time.monotonic() - began, 1),
            "peak_bytes": told["peak_rss_bytes"],
            "calibration_photos": told["calibration_photos"],
            "stored_parameters": told["stored_parameters"],
        }
        yield find_subject(str(out), size), measured
