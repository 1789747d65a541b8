"""`wasi-edge evaluate`: how good a model is on photos whose classes are known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wasi_edge.cli import console
from wasi_edge.inference.classifier import Backend, open_classifier


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run or a model folder with a classifier.")],
    photos: Annotated[Path, typer.Argument(metavar="PHOTOS", help="Folder with one folder of photos per class.")],
    backend: Annotated[Backend, typer.Option(help="What computes the prediction.")] = Backend.AUTO,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Measure MODEL on a folder of sorted photos."""
    console.prepare_torch(threads)
    from wasi_edge.inference.evaluate import evaluate_folder
    from wasi_edge.models.locate import resolve_classifier

    classifier = open_classifier(resolve_classifier(model), backend, threads)
    with console.progress_bar("photos") as progress:
        result = evaluate_folder(classifier, photos, on_progress=progress, on_message=console.say)
    if as_json:
        console.print_json(result)
        return
    from wasi_edge.report.terminal import evaluation_table

    console.stdout_console().print(evaluation_table(result))
    if skipped := len(result["skipped_files"]):
        console.say(f"{skipped} files were left out; --json lists them with the reasons")
