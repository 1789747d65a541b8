"""The page a run leaves behind: `report.html`, from the dictionary that is also `report.json`.

One file that asks nothing of the network (its frame is in `page.py`): styles, plots and photos are
inline. Photos are re-encoded from the cached pixels, so no EXIF and no GPS can come along. A photo's,
a class's or a file's name is somebody else's text: everything passes through `escape`. Any key may
be missing, since a run can stop anywhere; a section without its figures is left out.
"""

from __future__ import annotations

import base64
import io
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wasi_edge.atomic import sync_folder
from wasi_edge.report import svg
from wasi_edge.report import terminal as words
from wasi_edge.report.page import document, folded, glued, mapping, section, table
from wasi_edge.report.svg import escape, finite
from wasi_edge.units import format_size

_MAX_RIGHT, _MAX_WRONG, _THUMBNAIL = 12, 12, 192
_MAX_SKIPPED_SHOWN, _MAX_MEMORY_POINTS, _MATRIX_BESIDE_TEXT = 100, 300, 12
_SCORES = ("class", "photos", "recognised", "right when said")
_SHOWN_ELSEWHERE = {
    "classes", "confusion", "continued_from", "error", "hardware", "history", "memory_samples",
    "per_class", "plan", "skipped_files", "versions",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class ReportPhoto:
    """A held-out photo as the model saw it; `probability` is that of `predicted_label`."""

    pixels: np.ndarray  # (S, S, 3) uint8
    true_label: str
    predicted_label: str
    probability: float
    name: str


# ---- the page ----------------------------------------------------------------------------------


def render_finetune_report(report: Mapping[str, Any], photos: Sequence[ReportPhoto] = ()) -> str:
    """The whole page for one run; `photos` are held-out photos with their predictions, right and wrong."""
    status = str(report.get("status") or "")
    eyebrow = "".join(f" · {escape(report[key])}" for key in ("model", "method") if report.get(key))
    sections = (
        _tiles(report),
        _continuation(report),
        _usage(report),
        _curves(report),
        _photos(photos),
        _confusion(report),
        _per_class(report),
        _memory(report),
        _skipped(report),
        _details(report),
    )
    headline = glued(words.headline(report))
    state = escape(words.STATUS_WORDS.get(status, status))
    header = (
        f"<p class='eyebrow'>wasi-edge report{eyebrow}</p>"
        f"<h1>{headline}</h1><p class='status {escape(status)}'>{state}</p>"
    )
    footer = "Made on your own machine; nothing left it. Its figures are in report.json."
    return document(headline, header, "".join(sections), footer)


def write_report(path: str | os.PathLike[str], html: str) -> None:
    """Write `html` so that `path` holds the old page or the new one, whole, even after a power cut."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors="replace") as file:
            file.write(html)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


# ---- sections: each a string, empty where the report has nothing for it ------------------------


def _tiles(report: Mapping[str, Any]) -> str:
    return f"<section class='tiles'>{''.join(map(_tile, words.key_figures(report)))}</section>"


def _continuation(report: Mapping[str, Any]) -> str:
    since = mapping(report.get("continued_from"))
    before = words.percent(since.get("old_class_accuracy_before"))
    groups = (
        ("known before", since.get("old_classes"), before, "old_class_accuracy"),
        ("new this time", since.get("new_classes"), "–", "new_class_accuracy"),
    )
    rows = [(what, words.names_text(of), was, words.percent(since.get(key))) for what, of, was, key in groups if of]
    absent = escape(words.names_text(since.get("absent_classes") or ()))
    note = f"<p>Without photos this time: {absent}. Kept, but not tested here.</p>" if absent else ""
    groups_table = table(("", "classes", "accuracy before", "accuracy now"), rows)
    return section("Since the last run", groups_table + note)


def _usage(report: Mapping[str, Any]) -> str:
    run, status = shlex.quote(svg.printable(report.get("out") or "RUN")), report.get("status")
    commands = []
    if status in ("interrupted", "failed"):
        commands.append(("go on where it stopped", f"wasi-edge finetune PHOTOS --out {run} --resume"))
    if status != "planned" and (status != "failed" or words.accuracy_of(report) is not None):
        commands += [
            ("name what is on a photo", f"wasi-edge predict {run} photo.jpg"),
            ("test it on more photos", f"wasi-edge evaluate {run} OTHER_PHOTOS"),
            ("teach it next month's photos, new classes too", f"wasi-edge finetune NEW_PHOTOS --model {run}"),
        ]
    rows = "".join(f"<dt>{why}</dt><dd>{_command(command)}</dd>" for why, command in commands)
    where = "" if report.get("out") else "<p class='note'>RUN is the folder this page lies in.</p>"
    return section("How to use it", f"<dl>{rows}</dl>{where}" if rows else "")


def _command(command: str) -> str:
    """A command that breaks between its words, not inside "--model"."""
    return f"<code>{' '.join(f'<span>{escape(word)}</span>' for word in command.split(' '))}</code>"


def _curves(report: Mapping[str, Any]) -> str:
    history = [entry for entry in report.get("history") or () if finite(entry.get("epoch")) is not None]
    if not any(entry["epoch"] > 0 for entry in history):
        return ""
    head = finite(report.get("head_only_val_accuracy"))
    lines = [("head alone", 100 * head)] if head is not None else []
    accuracies = [_series(history, "held-out photos", "val_accuracy", 100.0),
                  _series(history, "training photos", "train_accuracy", 100.0)]  # fmt: skip
    losses = [_series(history, "held-out photos", "val_loss"),
              _series(history, "training photos", "train_loss")]  # fmt: skip
    known = [y for curve in accuracies for y in curve.ys if y is not None] + [level for _, level in lines]
    floor = max(0.0, 10 * math.floor((min(known, default=0.0) - 3) / 10))
    accuracy = svg.line_chart(accuracies, "epoch", "accuracy, %", (floor, 100.0), lines)
    loss = svg.line_chart(losses, "epoch", "loss")
    note = "Epoch 0 is the head alone, fitted in closed form before the first gradient step."
    grid = f"<div class='grid'><figure>{accuracy}</figure><figure>{loss}</figure></div>"
    return section("How it learned", f"{grid}<p class='note'>{note}</p>")


def _photos(photos: Sequence[ReportPhoto]) -> str:
    wrong = [photo for photo in photos if photo.true_label != photo.predicted_label]
    wrong.sort(key=lambda photo: -(finite(photo.probability) or 0.0))
    by_class: dict[str, list[ReportPhoto]] = {}
    for photo in photos:
        if photo.true_label == photo.predicted_label:
            by_class.setdefault(photo.true_label, []).append(photo)
    right = [photo for turn in zip_longest(*by_class.values()) for photo in turn if photo is not None]
    galleries = "".join(
        f"<h3>{title}</h3><div class='gallery'>{''.join(map(_photo, shown))}</div>"
        for title, shown in (
            ("Wrong, the surest mistakes first", wrong[:_MAX_WRONG]),
            ("Right", right[:_MAX_RIGHT]),
        )
        if shown
    )
    return section("Photos it never trained on", galleries)


def _photo(photo: ReportPhoto) -> str:
    wrong = photo.true_label != photo.predicted_label
    said = f"<b>{escape(photo.predicted_label)}</b> <span>{words.percent(photo.probability)}</span>"
    caption = f"✗ said {said}<br>is <b>{escape(photo.true_label)}</b>" if wrong else f"✓ {said}"
    alt = f"{photo.name}: a photo of {photo.true_label}, taken for {photo.predicted_label}"
    return (
        f"<figure class='{'wrong' if wrong else 'right'}' title='{escape(photo.name)}'>"
        f"<img src='{_data_uri(photo.pixels)}' alt='{escape(alt)}' loading='lazy'>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _data_uri(pixels: np.ndarray) -> str:
    """A small JPEG made from the pixels alone: whatever the photo's file carried stays behind."""
    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _confusion(report: Mapping[str, Any]) -> str:
    matrix = report.get("confusion")
    if not matrix or not any(finite(value) for row in matrix for value in row):
        return ""
    classes = [str(name) for name in report.get("classes") or ()]
    names = classes + [f"class {i}" for i in range(len(classes), max(map(len, matrix)))]
    mixed = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j and n]
    mixed.sort(key=lambda found: -found[0])
    items = "".join(
        f"<li>{number} of <b>{escape(names[i])}</b> taken for <b>{escape(names[j])}</b></li>"
        for count, i, j in mixed[:5]
        if (number := words.counted(count, "photo"))
    )
    mix_ups = f"<h3>Most frequent mix-ups</h3><ul>{items}</ul>" if items else "<p>Not one mix-up.</p>"
    plot = f"<figure class='scroll'>{svg.confusion_matrix(matrix, classes)}</figure>"
    layout = "grid" if len(matrix) <= _MATRIX_BESIDE_TEXT else "stack"
    return section("What it mixes up", f"<div class='{layout}'>{plot}<div>{mix_ups}</div></div>")


def _per_class(report: Mapping[str, Any]) -> str:
    rows = words.per_class_rows(report)
    if not rows:
        return ""
    rows.sort(key=lambda row: 2.0 if row[2] is None else row[2])
    cells = [
        (name, svg.number_text(support), words.percent(recall), words.percent(precision))
        for name, precision, recall, support in rows
    ]
    note = (
        "<p class='note'>Weakest class first. Recognised: the share of its photos that were found (recall). "
        "Right when said: of the photos given this name, the share that bear it (precision).</p>"
    )
    return section("Class by class", table(_SCORES, cells, numeric=True) + note)


def _memory(report: Mapping[str, Any]) -> str:
    samples = [
        (seconds, rss / 2**20)
        for seconds, rss in report.get("memory_samples") or ()
        if finite(seconds) is not None and finite(rss) is not None
    ]
    plots = []
    if samples:
        # Of each stretch the highest is kept: thinning must not hide a peak.
        stretch = math.ceil(len(samples) / _MAX_MEMORY_POINTS)
        starts = range(0, len(samples), stretch)
        kept = [(samples[i][0], max(rss for _, rss in samples[i : i + stretch])) for i in starts]
        scale, unit = (60.0, "minutes") if samples[-1][0] >= 180 else (1.0, "seconds")
        curve = svg.Series("resident", [s / scale for s, _ in kept], [m for _, m in kept])
        levels = [
            (name, round(value / 2**20))
            for name, key in (("budget", "budget_bytes"), ("planned peak", "planned_peak_rss_bytes"))
            if (value := finite(report.get(key))) is not None
        ]
        top = max([m for _, m in kept] + [level for _, level in levels])
        chart = svg.line_chart([curve], unit, "memory, MB", (0.0, 1.06 * top), levels)
        plots.append(f"<figure>{chart}</figure>")
    items = mapping(report.get("plan")).get("memory") or ()
    bars = [(str(item.get("item", "?")), finite(item.get("bytes"))) for item in items]
    if bars:
        bars.sort(key=lambda bar: -(bar[1] or 0.0))
        chart = svg.bar_chart(bars, "Planned memory by use", format_size)
        plots.append(f"<figure><figcaption>What the plan set aside</figcaption>{chart}</figure>")
    return section("Memory", f"<div class='grid'>{''.join(plots)}</div>" if plots else "")


def _skipped(report: Mapping[str, Any]) -> str:
    by_reason: dict[str, list[str]] = {}
    for item in report.get("skipped_files") or ():
        by_reason.setdefault(str(item.get("reason") or "no reason given"), []).append(str(item.get("path")))
    parts = []
    for reason, paths in sorted(by_reason.items(), key=lambda group: -len(group[1])):
        shown = "".join(f"<li>{escape(path)}</li>" for path in paths[:_MAX_SKIPPED_SHOWN])
        rest = len(paths) - _MAX_SKIPPED_SHOWN
        more = f"<li>and {rest} more, in report.json</li>" if rest > 0 else ""
        summary = f"{words.counted(len(paths), 'file')}: {escape(reason)}"
        parts.append(f"<details><summary>{summary}</summary><ul class='paths'>{shown}{more}</ul></details>")
    return section("What was skipped, and why", "".join(parts))


def _details(report: Mapping[str, Any]) -> str:
    settings = {key: value for key, value in report.items() if key not in _SHOWN_ELSEWHERE}
    machine = [row for key in ("hardware", "versions") for row in words.figures(mapping(report.get(key)))]
    parts = [
        folded("The plan", _plan(mapping(report.get("plan")))),
        folded("Settings and figures", table(("", ""), words.figures(settings))),
        folded("Machine and versions", table(("", ""), machine)),
    ]
    return section("In detail", "".join(parts))


def _plan(plan: Mapping[str, Any]) -> str:
    """The plan's plain values as one table; a list of dictionaries becomes a table of its own."""
    plain, tables = {}, ""
    for key, value in plan.items():
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
            columns = list(dict.fromkeys(column for item in value for column in item))
            rows = [[words.figure_text(column, item.get(column)) for column in columns] for item in value]
            titles = [words.label_text(column) for column in columns]
            tables += f"<h3>{escape(words.label_text(key))}</h3>{table(titles, rows, numeric=True)}"
        else:
            plain[key] = value
    return table(("", ""), words.figures(plain)) + tables


# ---- pieces ------------------------------------------------------------------------------------


def _tile(figure: words.KeyFigure) -> str:
    share = figure.share
    width = f"width:{100 * min(1.0, share or 0.0):.1f}%"
    meter = "" if share is None else f"<i class='meter'><i style='{width}'></i></i>"
    text = f"<span>{escape(figure.label)}</span><b>{glued(figure.value)}</b>{meter}"
    return f"<div class='tile'>{text}<small>{glued(figure.note)}</small></div>"


def _series(history: Sequence[Mapping[str, Any]], name: str, key: str, scale: float = 1.0) -> svg.Series:
    values = [None if (value := finite(entry.get(key))) is None else scale * value for entry in history]
    return svg.Series(name, [entry["epoch"] for entry in history], values)
