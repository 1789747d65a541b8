"""The last step of a run: its model once more as `model.onnx`, after torch has given its memory back.

What training held is free by then, and nothing here uses torch: the file is written a weight at a time, and compared
with answers that the trained network gave before, in a second process where the plan's peak leaves room for it.
"""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wasi_edge.artefact import open_artefact
from wasi_edge.atomic import write_json_atomic
from wasi_edge.inference.onnx_metadata import ONNX_NAME
from wasi_edge.memory.libraries import release_library_pages
from wasi_edge.memory.malloc import release_free_memory
from wasi_edge.memory.process import MemoryWatch, read_memory
from wasi_edge.training.request import Events


class Sample(NamedTuple):
    """What the network answered: views uint8 (B, S, S, 3) and logits float32 (B, C); None where it saw them rounded."""

    views: np.ndarray
    logits: np.ndarray | None


def add_onnx(report: dict[str, Any], out: Path, sample: Sample, watch: MemoryWatch, events: Events) -> dict[str, Any]:
    """Write `out`/model.onnx and return the report that says so, which is on disk by then. A file that cannot be made
    is a message: the run is complete without it."""
    gc.collect()
    release_free_memory()
    release_library_pages()
    events.stage("writing model.onnx", 1)
    try:
        from wasi_edge.export.check import export_beside

        with open_artefact(out) as artefact:
            available = report["planned_peak_rss_bytes"] - read_memory().rss_bytes
            check = export_beside(artefact, out / ONNX_NAME, sample.views, sample.logits, available)
        found = {"file": ONNX_NAME, "bytes": (out / ONNX_NAME).stat().st_size, **check.to_dict()}
        if check.difference is None:
            again = f"wasi-edge export {out} {out / ONNX_NAME}"
            events.message(f"{ONNX_NAME} is written, not compared with the model: {check.reason}; {again} compares")
    except Exception as error:  # nothing that goes wrong here may cost a run that is complete
        with contextlib.suppress(OSError):
            (out / ONNX_NAME).unlink(missing_ok=True)  # of an earlier stop, and so of other weights
        found = {"file": None, "error": str(error)}
        events.message(f"no {ONNX_NAME}: {error or type(error).__name__}; the run is complete without it")
    report = {
        **report,
        "onnx": found,
        "peak_rss_bytes": watch.peak_rss_bytes,
        "peak_swap_bytes": watch.peak_swap_bytes,
    }
    write_json_atomic(out / "report.json", report)
    return report
