"""`wasi-edge export`: a model as one ONNX file, for other programs and for predicting without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wasi_edge.cli import console
from wasi_edge.cli.options import require
from wasi_edge.errors import UsageError


def export(
    model: Annotated[str, typer.Argument(metavar="RUN", help="A run, or a model folder with a classifier.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="The file to write.")],
    int8: Annotated[
        bool, typer.Option("--int8", help="Weights and activations in 8 bits, checked on the run's held-out photos.")
    ] = False,
    max_drop: Annotated[
        float, typer.Option(help="With --int8: accuracy that may be lost, as a fraction; two photos always may.")
    ] = 0.01,
    with_preprocessing: Annotated[
        bool, typer.Option("--with-preprocessing", help="Take photos of any size and give probabilities.")
    ] = False,
    photos: Annotated[
        Path | None, typer.Option(help="With --int8: where the folder that was trained on lies now, if it has moved.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Write the model in RUN as one ONNX file."""
    require("--max-drop", max_drop, 0 <= max_drop <= 1, "between 0 and 1")
    if out.suffix.lower() != ".onnx":
        raise UsageError(f"{out}: expected a name that ends in .onnx")
    if not int8 and photos is not None:
        raise UsageError("--photos goes with --int8: nothing else looks at photos")
    from wasi_edge.memory.malloc import count_threads, tune_malloc
    from wasi_edge.memory.process import MemoryWatch
    from wasi_edge.models.locate import resolve_model

    tune_malloc()
    folder = resolve_model(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with MemoryWatch() as watch:
        result = _carry_out(folder, out, int8, max_drop, with_preprocessing, photos, count_threads(threads))
    result["peak_rss_bytes"] = watch.peak_rss_bytes
    if as_json:
        console.print_json(result)
        return
    from wasi_edge.report.terminal import export_table

    console.stdout_console().print(export_table(result))


def _carry_out(
    folder: Path, out: Path, int8: bool, max_drop: float, with_preprocessing: bool, photos: Path | None, threads: int
) -> dict[str, Any]:
    from wasi_edge.artefact import open_artefact
    from wasi_edge.export.check import checked_export
    from wasi_edge.export.graph import OPSET

    quantised, check = None, None
    with open_artefact(folder) as artefact:
        if int8:
            from wasi_edge.export.int8 import write_int8
            from wasi_edge.export.photos import read_run_photos

            quantised = write_int8(
                artefact, out, read_run_photos(folder, photos), max_drop, with_preprocessing, threads, console.say
            )
        else:
            check = checked_export(artefact, out, with_preprocessing)
    return {
        "status": "completed",
        "out": str(out),
        "file_bytes": out.stat().st_size,
        "opset": OPSET,
        "with_preprocessing": with_preprocessing,
        **({} if check is None else check.to_dict()),
        "int8": quantised,
    }
