"""The whole of `wasi-edge export`: which file is written, and what is measured of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from wasi_edge.artefact import open_artefact
from wasi_edge.atomic import sweep_orphans
from wasi_edge.errors import UsageError
from wasi_edge.export.check import Check, checked_export
from wasi_edge.export.graph import OPSET
from wasi_edge.export.int8 import write_int8
from wasi_edge.export.photos import read_run_photos


def export(
    folder: Path,
    out: Path,
    threads: int,
    int8: bool = False,
    max_drop: float = 0.01,
    with_preprocessing: bool = False,
    photos: Path | None = None,
    on_stage: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Write the model in `folder` to `out`; returns what `export --json` prints, but for the memory it took.

    Raises UsageError for a name that is no .onnx, NoUsableData where `int8` has no photos to look at, ArtefactError as
    `checked_export` and `write_int8` do; `out` is then as it was.
    """
    if out.suffix.lower() != ".onnx":
        raise UsageError(f"{out}: expected a name that ends in .onnx")
    quantised, check = None, Check(None, None, "eight bits are compared by accuracy, on the run's photos")
    with open_artefact(folder) as artefact:
        seen = read_run_photos(folder, photos) if int8 else None
        out.parent.mkdir(parents=True, exist_ok=True)
        sweep_orphans(out.parent)
        if seen is not None:
            quantised = write_int8(artefact, out, seen, max_drop, with_preprocessing, threads, on_stage)
        else:
            check = checked_export(artefact, out, with_preprocessing)
    return {
        "status": "completed",
        "out": str(out),
        "file_bytes": out.stat().st_size,
        "opset": OPSET,
        "with_preprocessing": with_preprocessing,
        **check.to_dict(),
        "int8": quantised,
    }
