"""The page of `wasi-edge evaluate`, from the dictionary that is also its JSON: how often the model is right on photos
whose classes are known, what it takes for what, and the photos on which it is most surely wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wasi_edge.report import words
from wasi_edge.report.page import document, folded, glued, mapping, section, table
from wasi_edge.report.sections import ReportPhoto, class_by_class, mix_ups, photo_gallery, skipped_files
from wasi_edge.report.svg import escape, finite

_SHOWN_ELSEWHERE = {
    "confusion", "hardware", "labels", "most_confused", "most_wrong", "per_class", "skipped_files", "versions",
}  # fmt: skip


def render_evaluation_report(result: Mapping[str, Any], photos: Sequence[ReportPhoto] = ()) -> str:
    """The whole page; `photos` are some of those that were looked at, with what the model said."""
    count = finite(result.get("num_images")) or 0
    headline = f"{words.percent(result.get('accuracy'))} of {words.counted(count, 'photo')} recognised"
    subject = "".join(f" · {escape(result[key])}" for key in ("model", "photos") if result.get(key))
    header = f"<p class='eyebrow'>wasi-edge evaluation{subject}</p><h1>{glued(headline)}</h1><p>{_spread(result)}</p>"
    plain = {key: value for key, value in result.items() if key not in _SHOWN_ELSEWHERE}
    machine = [row for key in ("hardware", "versions") for row in words.figures(mapping(result.get(key)))]
    details = folded("Settings and figures", table(("", ""), words.figures(plain)))
    details += folded("Machine and versions", table(("", ""), machine))
    body = (
        photo_gallery("Photos as the model saw them", photos)
        + mix_ups(result.get("confusion"), result.get("labels") or ())
        + class_by_class(result)
        + skipped_files(result)
        + section("In detail", details)
    )
    footer = "Made on your own machine; nothing left it. Its figures are in evaluation.json."
    return document(glued(headline), header, body, footer)


def _spread(result: Mapping[str, Any]) -> str:
    """How sure the accuracy is, and the mean over classes."""
    accuracy, count = finite(result.get("accuracy")), finite(result.get("num_images"))
    parts = []
    if accuracy is not None and count:
        low, high = words.wilson_interval(accuracy, count)
        parts.append(f"With so many photos, the share of all such photos lies between {words.percent(low)} and "
                     f"{words.percent(high)} (95 %).")  # fmt: skip
    if (balanced := finite(result.get("balanced_accuracy"))) is not None:
        parts.append(f"The mean over classes is {words.percent(balanced)}.")
    return glued(" ".join(parts))
