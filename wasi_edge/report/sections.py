"""Sections that the pages of a run and of an evaluation have in common: photos, mix-ups, classes, skipped files.

Photos are re-encoded from pixels, so no EXIF and no GPS can come along. A photo's, a class's or a file's name is
somebody else's text: everything passes through `escape`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from PIL import Image

from wasi_edge.report import svg, words
from wasi_edge.report.page import section, table
from wasi_edge.report.svg import escape, finite

_MAX_RIGHT, _MAX_WRONG, _THUMBNAIL = 12, 12, 192
_MAX_SKIPPED_SHOWN, _MATRIX_BESIDE_TEXT = 100, 12
_SCORES = ("class", "photos", "recognised", "right when said")


@dataclass(frozen=True, eq=False)
class ReportPhoto:
    """A held-out photo as the model saw it; `probability` is that of `predicted_label`."""

    pixels: np.ndarray  # (S, S, 3) uint8
    true_label: str
    predicted_label: str
    probability: float
    name: str


def photo_gallery(title: str, photos: Sequence[ReportPhoto]) -> str:
    """Some wrong, the surest first, and some right ones, of every class in turn."""
    wrong = [photo for photo in photos if photo.true_label != photo.predicted_label]
    wrong.sort(key=lambda photo: -(finite(photo.probability) or 0.0))
    by_class: dict[str, list[ReportPhoto]] = {}
    for photo in photos:
        if photo.true_label == photo.predicted_label:
            by_class.setdefault(photo.true_label, []).append(photo)
    right = [photo for turn in zip_longest(*by_class.values()) for photo in turn if photo is not None]
    galleries = "".join(
        f"<h3>{heading}</h3><div class='gallery'>{''.join(map(_photo, shown))}</div>"
        for heading, shown in (
            ("Wrong, the surest mistakes first", wrong[:_MAX_WRONG]),
            ("Right", right[:_MAX_RIGHT]),
        )
        if shown
    )
    return section(title, galleries)


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


def mix_ups(matrix: Sequence[Sequence[Any]] | None, labels: Sequence[object]) -> str:
    """The confusion matrix as a picture, and its largest entries in words."""
    if not matrix or not any(finite(value) for row in matrix for value in row):
        return ""
    classes = [str(name) for name in labels]
    names = classes + [f"class {i}" for i in range(len(classes), max(map(len, matrix)))]
    mixed = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j and n]
    mixed.sort(key=lambda found: -found[0])
    items = "".join(
        f"<li>{number} of <b>{escape(names[i])}</b> taken for <b>{escape(names[j])}</b></li>"
        for count, i, j in mixed[:5]
        if (number := words.counted(count, "photo"))
    )
    found = f"<h3>Most frequent mix-ups</h3><ul>{items}</ul>" if items else "<p>Not one mix-up.</p>"
    plot = f"<figure class='scroll'>{svg.confusion_matrix(matrix, classes)}</figure>"
    layout = "grid" if len(matrix) <= _MATRIX_BESIDE_TEXT else "stack"
    return section("What it mixes up", f"<div class='{layout}'>{plot}<div>{found}</div></div>")


def class_by_class(report: Mapping[str, Any]) -> str:
    """Precision and recall, the weakest class first."""
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


def skipped_files(report: Mapping[str, Any]) -> str:
    """Paths under the reason that they share."""
    by_reason: dict[str, list[str]] = {}
    for item in report.get("skipped_files") or ():
        by_reason.setdefault(str(item.get("reason") or "no reason given"), []).append(str(item.get("path")))
    parts = []
    for reason, paths in sorted(by_reason.items(), key=lambda group: -len(group[1])):
        shown = "".join(f"<li>{escape(path)}</li>" for path in paths[:_MAX_SKIPPED_SHOWN])
        rest = len(paths) - _MAX_SKIPPED_SHOWN
        more = f"<li>and {rest} more, in the JSON file</li>" if rest > 0 else ""
        summary = f"{words.counted(len(paths), 'file')}: {escape(reason)}"
        parts.append(f"<details><summary>{summary}</summary><ul class='paths'>{shown}{more}</ul></details>")
    return section("What was skipped, and why", "".join(parts))
