"""The page a run leaves behind: `report.html`, from the dictionary that is also `report.json`.

One file that asks nothing of the network (its frame is in `page.py`): styles, plots and photos are
inline. A name is somebody else's text: everything passes through `escape`. Any key may
be missing, since a run can stop anywhere; a section without its figures is left out.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from wasi_edge.report import svg, words
from wasi_edge.report.advice import advice
from wasi_edge.report.page import document, folded, glued, mapping, section, table
from wasi_edge.report.sections import ReportPhoto, class_by_class, mix_ups, photo_gallery, skipped_files
from wasi_edge.report.svg import escape, finite
from wasi_edge.units import format_size

_MAX_MEMORY_POINTS = 300
_SHOWN_ELSEWHERE = {
    "classes", "confusion", "continued_from", "error", "hardware", "history", "learning_curve",
    "memory_samples", "per_class", "plan", "skipped_files", "versions",
}  # fmt: skip


# ---- the page ----------------------------------------------------------------------------------


def render_finetune_report(report: Mapping[str, Any], photos: Sequence[ReportPhoto] = ()) -> str:
    """The whole page for one run; `photos` are held-out photos with their predictions, right and wrong."""
    status = str(report.get("status") or "")
    eyebrow = "".join(f" · {escape(report[key])}" for key in ("model", "method") if report.get(key))
    sections = (
        _tiles(report),
        _continuation(report),
        _advice(report),
        _usage(report),
        _curves(report),
        photo_gallery("Photos it never trained on", photos),
        mix_ups(report.get("confusion"), report.get("classes") or ()),
        class_by_class(report),
        _memory(report),
        skipped_files(report),
        _details(report),
    )
    headline = glued(words.headline(report))
    state = escape(words.status_text(report))
    header = (
        f"<p class='eyebrow'>wasi-edge report{eyebrow}</p>"
        f"<h1>{headline}</h1><p class='status {escape(status)}'>{state}</p>"
    )
    footer = "Made on your own machine; nothing left it. Its figures are in report.json."
    return document(headline, header, "".join(sections), footer)


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


def _advice(report: Mapping[str, Any]) -> str:
    items = "".join(f"<li>{glued(sentence)}</li>" for sentence in advice(report))
    return section("Advice", f"<ul>{items}</ul>" if items else "")


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
