"""`wasi-edge predict`: what photos show, by a model of one's own."""

from __future__ import annotations

import csv
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from wasi_edge.cli import console
from wasi_edge.cli.options import require
from wasi_edge.errors import NoUsableData, UsageError
from wasi_edge.inference.classifier import Backend, open_classifier

# Rows of a table on the screen; a long folder is shown in several, as it goes.
_TABLE_ROWS = 32


class NothingReadable(NoUsableData):
    """Not one photo could be classified; with `--json` the reasons are listed under `results`."""

    def __init__(self, message: str, results: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.details = {"results": results}


def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run or a model folder with a classifier.")],
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH", help="Photos, folders, quoted patterns, or - for a list on standard input."),
    ],
    top_k: Annotated[int, typer.Option(min=1, help="How many labels to give for each photo.")] = 3,
    threshold: Annotated[float, typer.Option(help="A label less sure than this is shown as 'unsure'.")] = 0.0,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV on standard output.")] = False,
    sort_into: Annotated[
        Path | None, typer.Option(help="Copy each photo into a folder of its label below this one.")
    ] = None,
    link: Annotated[
        bool, typer.Option("--link", help="With --sort-into: link to the photos, do not copy them.")
    ] = False,
    backend: Annotated[Backend, typer.Option(help="What computes the prediction.")] = Backend.AUTO,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Classify photos with MODEL."""
    if as_csv and as_json:
        raise UsageError("--csv and --json both want standard output: choose one")
    if link and sort_into is None:
        raise UsageError("--link goes with --sort-into DIR: nothing else makes files")
    require("--threshold", threshold, 0 <= threshold <= 1, "between 0 and 1")
    console.prepare_torch(threads)
    from wasi_edge.inference.predict import iter_photos, predict_paths
    from wasi_edge.models.locate import resolve_classifier

    classifier = open_classifier(resolve_classifier(model), backend, threads, console.say)
    top_k = min(top_k, len(classifier.labels))
    with console.progress_bar("photos", shown=not sys.stdout.isatty()) as progress:
        photos = iter_photos(paths, exclude=sort_into)
        rows = predict_paths(
            classifier, photos, top_k, threshold=threshold, on_progress=lambda done: progress(done, None)
        )
        counted = _Counted(rows if sort_into is None else _sorted_into(sort_into, link, rows))
        if as_json:
            results = [console.json_text(row) for row in counted]
        elif as_csv:
            _write_csv(counted, top_k)
        else:
            _write_tables(counted)
    if counted.labelled == 0:
        what = f"none of the {counted.unreadable} photos can be read" if counted.unreadable else "no photos found"
        raise NothingReadable(f"{what} in {' '.join(paths[:3])}{' ...' if len(paths) > 3 else ''}", counted.errors)
    if as_json:
        console.print_json_list(results)
    elif counted.unreadable:
        console.say(f"{counted.unreadable} of {counted.unreadable + counted.labelled} files could not be read")


class _Counted:
    """Rows passing by: how many carry a label, and those that do not (as long as none does)."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self._rows = rows
        self.labelled = self.unreadable = 0
        self.errors: list[dict[str, Any]] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self._rows:
            if "error" in row:
                self.unreadable += 1
                if self.labelled == 0:
                    self.errors.append(row)
            else:
                self.labelled += 1
                self.errors.clear()
            yield row


def _sorted_into(folder: Path, link: bool, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from wasi_edge.inference.sorting import copy_into, link_into

    key, place = ("linked_to", link_into) if link else ("copied_to", copy_into)
    for row in rows:
        yield row if "error" in row else {**row, key: str(place(folder, row["label"], Path(row["path"])))}


def _write_tables(rows: Iterable[dict[str, Any]]) -> None:
    from wasi_edge.report.terminal import predictions_table

    screen = console.stdout_console()
    waiting: deque[dict[str, Any]] = deque()
    for row in rows:
        waiting.append(row)
        if len(waiting) == _TABLE_ROWS:
            screen.print(predictions_table(list(waiting)))
            waiting.clear()
    if waiting:
        screen.print(predictions_table(list(waiting)))


def _write_csv(rows: Iterable[dict[str, Any]], top_k: int) -> None:
    """path, label, probability, error; then the runners-up, two columns each."""
    others = [f"{key}_{rank}" for rank in range(2, top_k + 1) for key in ("label", "probability")]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["path", "label", "probability", "error", *others])
    for row in rows:
        if "error" in row:
            cells = [row["path"], "", "", row["error"], *("" for _ in others)]
        else:
            runners_up = [cell for label, share in row["top"][1:] for cell in (label, f"{share:.6f}")]
            cells = [row["path"], row["label"], f"{row['probability']:.6f}", "", *runners_up]
        writer.writerow(cells)
