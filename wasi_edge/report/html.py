"""The page a run leaves behind: `report.html`, from the dictionary that is also `report.json`.

One file that asks nothing of the network (a content security policy in the page forbids it, too):
styles, plots and photos are inline. Photos are re-encoded from the cached pixels, so no EXIF and
no GPS can come along. A photo's, a class's or a file's name is somebody else's text: everything
passes through `escape`. Any key may be missing, since a run can stop anywhere; a section without
its figures is left out.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wasi_edge.report import svg
from wasi_edge.report import terminal as words
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
    headline = _glued(words.headline(report))
    state = escape(words.STATUS_WORDS.get(status, status))
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'><meta name='referrer' content='no-referrer'>"
        "<meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>wasi-edge: {headline}</title><style>{svg.THEME}{_CSS}</style></head><body><main>"
        f"<header><p class='eyebrow'>wasi-edge report{eyebrow}</p>"
        f"<h1>{headline}</h1><p class='status {escape(status)}'>{state}</p>"
        f"</header>{''.join(sections)}"
        "<footer>Made on your own machine; nothing left it. Its figures are in report.json.</footer>"
        "</main></body></html>\n"
    )


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
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ---- sections: each a string, empty where the report has nothing for it ------------------------


def _tiles(report: Mapping[str, Any]) -> str:
    return f"<section class='tiles'>{''.join(map(_tile, words.key_figures(report)))}</section>"


def _continuation(report: Mapping[str, Any]) -> str:
    since = _mapping(report.get("continued_from"))
    before = words.percent(since.get("old_class_accuracy_before"))
    groups = (
        ("known before", since.get("old_classes"), before, "old_class_accuracy"),
        ("new this time", since.get("new_classes"), "–", "new_class_accuracy"),
    )
    rows = [(what, words.names_text(of), was, words.percent(since.get(key))) for what, of, was, key in groups if of]
    absent = escape(words.names_text(since.get("absent_classes") or ()))
    note = f"<p>Without photos this time: {absent}. Kept, but not tested here.</p>" if absent else ""
    table = _table(("", "classes", "accuracy before", "accuracy now"), rows)
    return _section("Since the last run", table + note)


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
    return _section("How to use it", f"<dl>{rows}</dl>{where}" if rows else "")


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
    return _section("How it learned", f"{grid}<p class='note'>{note}</p>")


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
    return _section("Photos it never trained on", galleries)


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
    return _section("What it mixes up", f"<div class='{layout}'>{plot}<div>{mix_ups}</div></div>")


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
    return _section("Class by class", _table(_SCORES, cells, numeric=True) + note)


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
    items = _mapping(report.get("plan")).get("memory") or ()
    bars = [(str(item.get("item", "?")), finite(item.get("bytes"))) for item in items]
    if bars:
        bars.sort(key=lambda bar: -(bar[1] or 0.0))
        chart = svg.bar_chart(bars, "Planned memory by use", format_size)
        plots.append(f"<figure><figcaption>What the plan set aside</figcaption>{chart}</figure>")
    return _section("Memory", f"<div class='grid'>{''.join(plots)}</div>" if plots else "")


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
    return _section("What was skipped, and why", "".join(parts))


def _details(report: Mapping[str, Any]) -> str:
    settings = {key: value for key, value in report.items() if key not in _SHOWN_ELSEWHERE}
    machine = [row for key in ("hardware", "versions") for row in words.figures(_mapping(report.get(key)))]
    parts = [
        _folded("The plan", _plan(_mapping(report.get("plan")))),
        _folded("Settings and figures", _table(("", ""), words.figures(settings))),
        _folded("Machine and versions", _table(("", ""), machine)),
    ]
    return _section("In detail", "".join(parts))


def _plan(plan: Mapping[str, Any]) -> str:
    """The plan's plain values as one table; a list of dictionaries becomes a table of its own."""
    plain, tables = {}, ""
    for key, value in plan.items():
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
            columns = list(dict.fromkeys(column for item in value for column in item))
            rows = [[words.figure_text(column, item.get(column)) for column in columns] for item in value]
            table = _table([words.label_text(column) for column in columns], rows, numeric=True)
            tables += f"<h3>{escape(words.label_text(key))}</h3>{table}"
        else:
            plain[key] = value
    return _table(("", ""), words.figures(plain)) + tables


# ---- pieces ------------------------------------------------------------------------------------


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if body else ""


def _tile(figure: words.KeyFigure) -> str:
    share = figure.share
    width = f"width:{100 * min(1.0, share or 0.0):.1f}%"
    meter = "" if share is None else f"<i class='meter'><i style='{width}'></i></i>"
    text = f"<span>{escape(figure.label)}</span><b>{_glued(figure.value)}</b>{meter}"
    return f"<div class='tile'>{text}<small>{_glued(figure.note)}</small></div>"


def _glued(text: str) -> str:
    """Escaped, with a number and its unit never on two lines."""
    return re.sub(r"(?<=\d) (?=(%|MB|min|s|h|points)\b|%)", "&nbsp;", escape(text))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: bool = False) -> str:
    """A table that scrolls sideways when it must; `numeric` sets all but the first column to the right."""
    if not rows:
        return ""
    titles = "".join(f"<th scope='col'>{escape(title)}</th>" for title in head)
    titles = f"<thead><tr>{titles}</tr></thead>" if any(head) else ""
    body = "".join(
        f"<tr><th scope='row'>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    opening = f"<table class='{'numeric' if numeric else 'plain'}'>"
    return f"<div class='scroll'>{opening}{titles}<tbody>{body}</tbody></table></div>"


def _series(history: Sequence[Mapping[str, Any]], name: str, key: str, scale: float = 1.0) -> svg.Series:
    values = [None if (value := finite(entry.get(key))) is None else scale * value for entry in history]
    return svg.Series(name, [entry["epoch"] for entry in history], values)


_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:1040px;margin:0 auto;padding:clamp(16px,4vw,40px)}
h1{font-size:clamp(1.35rem,3.6vw,2.1rem);line-height:1.25;margin:.2em 0 .5em;text-wrap:balance}
h2{font-size:1.2rem;margin:0 0 .8rem}h3{font-size:1rem;margin:1.2rem 0 .5rem}
.eyebrow,.note,footer,small{color:var(--muted)}.eyebrow{margin:0}.note,footer{font-size:.875rem}
.status{display:inline-block;margin:0 0 1rem;padding:.1rem .7rem;border:1px solid;border-radius:99px;
color:var(--good);font-size:.875rem}.failed,.interrupted{color:var(--bad)!important}.status:empty{display:none}
section:not(.tiles){background:var(--card);border:1px solid var(--edge);border-radius:12px;
padding:clamp(14px,3vw,24px);margin:0 0 16px}section>:last-child{margin-bottom:0}
.tiles{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:12px;margin:0 0 16px}
@media(min-width:720px){.tiles{grid-template-columns:repeat(3,minmax(0,1fr))}}
.tile{background:var(--card);border:1px solid var(--edge);border-radius:12px;padding:12px 14px;
display:flex;flex-direction:column;gap:2px}.tile span{font-size:.875rem}
.tile b{font-size:clamp(1.15rem,5vw,1.45rem);line-height:1.2}.tile small{font-size:.8rem;line-height:1.35}
.meter,.meter i{display:block;height:6px;border-radius:3px}.meter{background:var(--edge);margin:4px 0}
.meter i{background:var(--accent)}figcaption{font-size:.875rem;margin:0 0 .4rem;line-height:1.35}
figure{margin:0;min-width:0}figcaption span{white-space:nowrap}svg{display:block}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:24px;align-items:start}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:12px}
.gallery img{display:block;width:100%;aspect-ratio:1;object-fit:cover;border-radius:8px;
border:3px solid var(--good);margin-bottom:.3rem}.gallery .wrong img{border:3px dashed var(--bad)}
.scroll{overflow-x:auto}ul{margin:0;padding-left:1.2em}.paths{font-size:.875rem;color:var(--muted)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.925rem}.numeric{width:100%}
th,td{padding:.35rem .8rem .35rem 0;border-bottom:1px solid var(--edge);text-align:left;vertical-align:top;
font-weight:400;overflow-wrap:break-word;max-width:24em}thead th,table.plain tbody th{color:var(--muted)}
tr>:last-child{padding-right:0}.numeric th:not(:first-child),.numeric td{text-align:right}
.numeric td{white-space:nowrap}.plain td{min-width:4em}.numeric th:first-child{max-width:10em}
dl{margin:0}dt{color:var(--muted);font-size:.875rem}dd{margin:0 0 .7rem}
code{font:.9rem/1.5 ui-monospace,monospace;background:var(--bg);padding:.15rem .45rem;border-radius:6px;
border:1px solid var(--edge);display:inline-block;max-width:100%}code span{display:inline-block}
details{border-top:1px solid var(--edge);padding:.5rem 0}summary{cursor:pointer}
details>:last-child{margin:.5rem 0}@media print{body{background:#fff}section{break-inside:avoid}}
"""
