"""`wasi-edge export`: a model as one ONNX file, for other programs and for predicting without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    if not int8 and photos is not None:
        raise UsageError("--photos goes with --int8: nothing else looks at photos")
    from wasi_edge.export.run import export as export_model
    from wasi_edge.memory.malloc import count_threads, tune_malloc
    from wasi_edge.memory.process import MemoryWatch
    from wasi_edge.models.locate import resolve_model

    tune_malloc()
    folder = resolve_model(model)
    with MemoryWatch() as watch:
        result = export_model(
            folder, out, count_threads(threads), int8, max_drop, with_preprocessing, photos, console.say
        )
    result["peak_rss_bytes"] = watch.peak_rss_bytes
    if as_json:
        console.print_json(result)
        return
    from wasi_edge.report.terminal import export_table

    console.stdout_console().print(export_table(result))
