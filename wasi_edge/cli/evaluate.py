"""`wasi-edge evaluate`: how good a model is on photos whose classes are known."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wasi_edge.cli import console
from wasi_edge.cli.options import require_empty
from wasi_edge.errors import UnreadablePhoto, WasiEdgeError
from wasi_edge.inference.classifier import Backend, Classifier, open_classifier

if TYPE_CHECKING:
    from wasi_edge.inference.evaluate import Gallery


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run or a model folder with a classifier.")],
    photos: Annotated[Path, typer.Argument(metavar="PHOTOS", help="Folder with one folder of photos per class.")],
    backend: Annotated[Backend, typer.Option(help="What computes the prediction.")] = Backend.AUTO,
    out: Annotated[Path | None, typer.Option(help="Folder for evaluation.json and report.html.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Measure MODEL on a folder of sorted photos."""
    if out is not None:
        require_empty(out, "empty this one")
    console.prepare_torch(threads)
    from wasi_edge.inference.evaluate import Gallery, evaluate_folder
    from wasi_edge.models.locate import resolve_classifier

    folder = resolve_classifier(model)
    classifier = open_classifier(folder, backend, threads, console.say)
    with console.progress_bar("photos") as progress:
        gallery = Gallery()
        result = evaluate_folder(classifier, photos, progress, console.say, gallery, _trained_on(folder))
    if out is not None:
        _write_report(out, {"model": model, "photos": str(photos), **result}, gallery, classifier)
    if as_json:
        console.print_json(result)
        return
    from wasi_edge.report.terminal import evaluation_table

    console.stdout_console().print(evaluation_table(result))
    if out is not None:
        console.stdout_console().print(f"report: {out / 'report.html'}", markup=False)
    if skipped := len(result["skipped_files"]):
        console.say(f"{skipped} files were left out; --json lists them with the reasons")


def _trained_on(model: Path) -> set[Path]:
    """The photos that a run was trained on, as far as it says so."""
    from wasi_edge.export.photos import noted_photos

    with contextlib.suppress(WasiEdgeError):
        return {Path(os.path.abspath(photo.path)) for photo in noted_photos(model).train}
    return set()


def _write_report(out: Path, result: dict[str, Any], gallery: Gallery, classifier: Classifier) -> None:
    from wasi_edge.atomic import write_json_atomic
    from wasi_edge.inference.predict import read_view
    from wasi_edge.memory.hardware import hardware, versions
    from wasi_edge.report.evaluation_html import render_evaluation_report
    from wasi_edge.report.page import write_page
    from wasi_edge.report.sections import ReportPhoto

    photos = []
    for answer in gallery.answers:
        with contextlib.suppress(UnreadablePhoto):  # gone since
            view = read_view(answer.path, classifier.preprocessing)
            shown = (answer.true, answer.predicted, answer.probability, answer.path.name)
            photos.append(ReportPhoto(view, *shown))
    result = {**result, "hardware": hardware(), "versions": versions()}
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / "evaluation.json", result)
    write_page(out / "report.html", render_evaluation_report(result, photos))
