"""A run in plain words: what the terminal and the HTML pages both say of a report's keys.

Names that come from somebody's folders go through `printable`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from wasi_edge.report.svg import finite, number_text, printable
from wasi_edge.units import format_duration, format_size

STATUS_WORDS = {
    "completed": "finished",
    "early_stopped": "stopped early: more epochs no longer helped",
    "time_limit": "stopped at the time limit",
    "interrupted": "interrupted, and saved",
    "failed": "failed",
    "planned": "planned, not run",
}
ClassRow = tuple[str, float | None, float | None, int]  # name, precision, recall, support


class KeyFigure(NamedTuple):
    """One of the few figures a run is judged by; `share` is how much of its limit it used."""

    label: str
    value: str
    note: str
    share: float | None = None


def percent(fraction: object) -> str:
    """A fraction in whole percent; near 0 and 1 with a decimal, never rounded up to a perfect 100 %."""
    value = finite(fraction)
    if value is None:
        return "–"
    value *= 100
    if 99 < value < 100:
        return f"{math.floor(value * 10 + 1e-6) / 10:g} %"
    return f"{value:.1f} %" if 0 < value < 1 else f"{value:.0f} %"


def wilson_interval(fraction: float, count: float) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion measured on `count` photos (Wilson's score)."""
    z2 = 1.96**2
    centre = (fraction + z2 / (2 * count)) / (1 + z2 / count)
    half = 1.96 * math.sqrt(fraction * (1 - fraction) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def counted(number: float, noun: str) -> str:
    """ "1 class", "5 classes", "130 held-out photos"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number_text(number)} {noun}{'es' if noun.endswith('s') else 's'}"


def names_text(names: object, most: int = 12) -> str:
    """Names joined by commas, the tail of a long list counted."""
    if not isinstance(names, (list, tuple, set)):
        return printable(names)
    shown = [printable(name) for name in list(names)[:most]]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def epochs_text(report: Mapping[str, Any]) -> str:
    """ "2.5 of 8 epochs"."""
    run, planned = finite(report.get("epochs_run")), finite(report.get("epochs_planned"))
    if planned and run != planned:
        return f"{number_text(round(run or 0.0, 1))} of {counted(planned, 'epoch')}"
    return counted(round(run or 0.0, 1), "epoch")


def status_text(report: Mapping[str, Any]) -> str:
    """How the run ended, in words."""
    status = str(report.get("status") or "")
    if status == "early_stopped" and report.get("head_sufficed"):
        return "finished: the frozen head is enough"
    return STATUS_WORDS.get(status, status)


def accuracy_of(report: Mapping[str, Any]) -> float | None:
    """The saved model's held-out accuracy, from the best of the keys that carry it."""
    keys = ("best_val_accuracy", "final_val_accuracy", "head_only_val_accuracy")
    return next((value for key in keys if (value := finite(report.get(key))) is not None), None)


def headline(report: Mapping[str, Any]) -> str:
    """What the run came to, in one plain sentence."""
    status, accuracy = report.get("status"), accuracy_of(report)
    classes, held_out = len(report.get("classes") or ()), finite(report.get("num_val_images"))
    what = f"your {counted(classes, 'class')}" if classes else "your classes"
    clauses = []
    if status == "failed":
        clauses.append(f"the run failed: {report['error']}" if report.get("error") else "the run failed")
    elif status == "interrupted":
        clauses.append(f"interrupted after {epochs_text(report)}")
    elif status == "planned":
        clauses.append(f"a plan for {what}; nothing was trained")
    stopped = bool(clauses)
    if accuracy is not None:
        on = f" on {counted(held_out, 'photo')} it never trained on" if held_out else ""
        verb = "so far it recognises" if stopped else "recognises"
        clauses.append(f"{verb} {what} with {percent(accuracy)} accuracy{on}")
    elif not stopped:
        trained = finite(report.get("num_train_images"))
        source = f" from {counted(trained, 'photo')}" if trained else ""
        clauses.append(f"learned {what}{source}, with no photos held back to test it on")
    if seconds := finite(report.get("train_seconds")):
        clauses.append(format_duration(seconds))
    budget = finite(report.get("budget_bytes"))
    if peak := finite(report.get("peak_rss_bytes")):
        clauses.append(f"peak {format_size(peak)}" + (f" of a {format_size(budget)} budget" if budget else ""))
    sentence = "; ".join(printable(clause).rstrip(".") for clause in clauses)
    return sentence[:1].upper() + sentence[1:] + "."


def key_figures(report: Mapping[str, Any]) -> list[KeyFigure]:
    """The figures at the top of the page and of the terminal's summary, those that are known."""
    return [figure for part in _KEY_FIGURES if (figure := part(report)) is not None]


def _accuracy_figure(report: Mapping[str, Any]) -> KeyFigure | None:
    accuracy, held_out = accuracy_of(report), finite(report.get("num_val_images"))
    if accuracy is None:
        return None
    note = ""
    if held_out and 0 <= accuracy <= 1:
        low, high = wilson_interval(accuracy, held_out)
        note = f"on {counted(held_out, 'held-out photo')}; likely range {100 * low:.0f} to {100 * high:.0f} %"
    return KeyFigure("Accuracy", percent(accuracy), note)


def _gain_figure(report: Mapping[str, Any]) -> KeyFigure | None:
    accuracy, head = accuracy_of(report), finite(report.get("head_only_val_accuracy"))
    if accuracy is None or head is None or report.get("method") == "head":
        return None
    points = round(100 * (accuracy - head), 1) or 0.0
    return KeyFigure("Fine-tuning gained", f"{points:+g} points", f"the head alone: {percent(head)}")


def _memory_figure(report: Mapping[str, Any]) -> KeyFigure | None:
    peak, planned = finite(report.get("peak_rss_bytes")), finite(report.get("planned_peak_rss_bytes"))
    budget, swap = finite(report.get("budget_bytes")), finite(report.get("peak_swap_bytes"))
    if peak is None:
        return None
    notes = [f"of a {format_size(budget)} budget"] if budget else []
    notes += [f"{format_size(planned)} planned"] if planned else []
    notes += [f"and {format_size(swap)} swapped"] if swap else []
    share = (peak + (swap or 0.0)) / budget if budget else None
    return KeyFigure("Peak memory", format_size(peak), "; ".join(notes), share)


def _time_figure(report: Mapping[str, Any]) -> KeyFigure | None:
    seconds, planned = finite(report.get("train_seconds")), finite(report.get("planned_seconds"))
    if seconds is None:
        return None
    notes = [f"{format_duration(planned)} planned"] if planned else []
    notes += [f"{rate:.3g} photos/s"] if (rate := finite(report.get("images_per_second"))) else []
    return KeyFigure("Training time", format_duration(seconds), "; ".join(notes))


def _photos_figure(report: Mapping[str, Any]) -> KeyFigure | None:
    trained, held_out = finite(report.get("num_train_images")), finite(report.get("num_val_images"))
    if trained is None:
        return None
    skipped = len(report.get("skipped_files") or ())
    note = f"{held_out or 0:.0f} held back to test" + (f"; {skipped} skipped" if skipped else "")
    return KeyFigure("Photos learned from", f"{trained:.0f}", note)


def _epochs_figure(report: Mapping[str, Any]) -> KeyFigure | None:
    """How long it trained, and which epoch is kept."""
    if report.get("epochs_run") is None:
        return None
    best = finite(report.get("best_epoch"))
    note = "" if best is None else f"best after epoch {number_text(best)}" if best else "the head alone was best"
    return KeyFigure("Training", epochs_text(report), note)


_KEY_FIGURES = (
    _accuracy_figure, _gain_figure, _memory_figure, _time_figure, _photos_figure, _epochs_figure
)  # fmt: skip


def label_text(key: object) -> str:
    """A key as a label without its unit, which the figure beside it carries."""
    label = printable(key).removesuffix("_bytes")
    if label.endswith("_seconds"):
        label = label.removesuffix("seconds") + "time"
    return label.replace("_", " ")


def figure_text(key: object, value: object) -> str:
    """A value as text, its unit read from the key's suffix."""
    name, number = str(key), finite(value)
    if value is None or (number is None and isinstance(value, float)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if number is not None:
        if name.split("_")[-1] == "bytes":
            return format_size(number)
        if name.endswith("seconds"):
            return format_duration(number)
        return percent(number) if name.endswith("accuracy") else number_text(number)
    if isinstance(value, Mapping):
        return ", ".join(f"{label} {text}" for label, text in figures(value))
    if isinstance(value, (list, tuple)):
        return names_text([figure_text("", item) for item in value]) or "none"
    return printable(value)


def figures(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(label, text) of every entry, units read from the key's suffix, nested dictionaries flattened."""
    rows: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            rows += figures(value, f"{prefix}{label_text(key)} · ")
        else:
            rows.append((prefix + label_text(key), figure_text(key, value)))
    return rows


def per_class_rows(result: Mapping[str, Any]) -> list[ClassRow]:
    """Every class's scores, from `per_class` (by name, or a list with `class`), else from `confusion`."""
    given, classes = result.get("per_class"), [str(name) for name in result.get("classes") or ()]
    if isinstance(given, Mapping):
        return [_class_row(name, scores) for name, scores in given.items()]
    if given:
        return [_class_row(scores.get("class") or scores.get("label"), scores) for scores in given]
    matrix, rows = result.get("confusion") or [], []
    for i, row in enumerate(matrix):
        right, support, said = row[i], int(sum(row)), sum(other[i] for other in matrix)
        name = classes[i] if i < len(classes) else f"class {i}"
        rows.append((name, right / said if said else None, right / support if support else None, support))
    return rows


def _class_row(name: object, scores: Mapping[str, Any]) -> ClassRow:
    support = int(finite(scores.get("support")) or 0)
    recall = finite(scores.get("recall")) if support else None
    return str(name), finite(scores.get("precision")), recall, support
