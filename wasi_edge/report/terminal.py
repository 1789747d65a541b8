"""A run as rich tables for the terminal, in the words of `words.py`.

The tables must read the same without colour, at 80 columns and in a log file: nothing is said by
colour alone, numbers never wrap, and names that come from somebody's folders go through `printable`
into `Text`, so that neither an escape sequence nor "[red]" in a file's name does anything.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from wasi_edge.report.advice import advice
from wasi_edge.report.svg import finite, printable
from wasi_edge.report.words import (
    accuracy_of,
    counted,
    figures,
    headline,
    key_figures,
    per_class_rows,
    percent,
    status_text,
)
from wasi_edge.units import format_duration, format_size

_BUDGET_KEYS = ("budget_bytes", "seconds")


def plan_table(
    plan: Mapping[str, Any],
    budget_bytes: float | None,
    planned_peak_bytes: float | None,
    planned_seconds: float | None,
) -> RenderableType:
    """The plan before it runs: where the memory goes, against the budget, then every choice made."""
    table = _table(("memory", "left"), ("planned", "right"), ("of the budget", "right"))
    items = [(printable(item.get("item")), finite(item.get("bytes"))) for item in plan.get("memory") or ()]
    for name, size_bytes in items:
        _add(table, name, *_size_and_share(size_bytes, budget_bytes))
    if items:
        table.add_section()
    _add(table, "planned peak", *_size_and_share(planned_peak_bytes, budget_bytes), style="bold")
    _add(table, "budget", *_size_and_share(budget_bytes, None))
    choices = {key: value for key, value in plan.items() if key not in ("memory", "other_budgets")}
    if planned_seconds is not None:
        choices["planned_seconds"] = planned_seconds
    others = [_other_budget(other) for other in plan.get("other_budgets") or ()]
    return Group(table, _pairs(figures(choices)), *([_pairs(others)] if others else []))


def _other_budget(other: Mapping[str, Any]) -> tuple[str, str]:
    """("with 451 MB", "8.3 min: micro batch 8")."""
    changed = [f"{label} {value}" for label, value in figures({k: other[k] for k in other if k not in _BUDGET_KEYS})]
    time = format_duration(finite(other.get("seconds")) or 0.0)
    return f"with {format_size(finite(other.get('budget_bytes')) or 0)}", f"{time}: {', '.join(changed) or 'the same'}"


def summary(report: Mapping[str, Any], out: str) -> RenderableType:
    """What a finished run prints: the headline, the figures behind it and the commands that come next."""
    status = str(report.get("status") or "")
    rows = [("status", printable(status_text(report)))]
    rows += [(label.lower(), f"{value} ({note})" if note else value) for label, value, note, _ in key_figures(report)]
    rows += [("advice", printable(sentence)) for sentence in advice(report)]
    if report.get("skipped_files"):
        rows.append(("why skipped", "the report lists every file and the reason"))
    run = shlex.quote(printable(out))
    if status in ("interrupted", "failed"):
        rows.append(("to go on", f"the same command with --out {run} --resume"))
    if status != "planned" and (status != "failed" or accuracy_of(report) is not None):
        rows.append(("report", printable(f"{out}/report.html")))
        rows.append(("use it", f"wasi-edge predict {run} photo.jpg"))
    return Group(Text(headline(report), style="bold"), _pairs(rows))


def predictions_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line a photo: what it shows, how sure, what else it could be; or why it could not be read."""
    table = _table(("photo", "left"), ("label", "left"), ("sure", "right"), ("or else", "left"))
    for row in rows:
        if row.get("error"):
            _add(table, row.get("path"), f"could not be read: {row['error']}", "–", "")
            continue
        others = [f"{label} {percent(p)}" for label, p in (row.get("top") or ()) if label != row.get("label")]
        _add(table, row.get("path"), row.get("label") or "not sure", percent(row.get("probability")),
             ", ".join(others[:2]))  # fmt: skip
    return table


def evaluation_table(result: Mapping[str, Any]) -> RenderableType:
    """Overall and per-class scores on a folder of photos."""
    number = finite(result.get("num_images"))
    on = f" on {counted(number, 'photo')}" if number is not None else ""
    text = f"Accuracy {percent(result.get('accuracy'))}{on}"
    text += f"; the mean over classes is {percent(result.get('balanced_accuracy'))}."
    table = _table(("class", "left"), ("photos", "right"), ("recall", "right"), ("precision", "right"))
    for name, precision, recall, support in per_class_rows(result):
        _add(table, name, str(support), percent(recall), percent(precision))
    return Group(Text(text, style="bold"), table)


def export_table(result: Mapping[str, Any]) -> RenderableType:
    """What `wasi-edge export` wrote and measured."""
    rows = [("file", f"{printable(result['out'])}, {format_size(result['file_bytes'])}, opset {result['opset']}")]
    if (difference := finite(result.get("logit_difference"))) is not None:
        rows.append(("difference to torch", f"{difference:.1e} of the largest answer, by {result['compared_by']}"))
    elif (reason := result.get("not_compared")) and not result.get("int8"):
        rows.append(("difference to torch", f"not measured: {reason}"))
    if int8 := result.get("int8"):
        photos = counted(int8["num_val_images"], "held-out photo")
        before, after = percent(int8["accuracy_before"]), percent(int8["accuracy_after"])
        rows.append(("accuracy", f"{before} in 32 bits, {after} in 8, on {photos}"))
        faster = int8["ms_before"] / int8["ms_after"]
        rows.append(("a photo", f"{int8['ms_before']:g} ms in 32 bits, {int8['ms_after']:g} in 8: {faster:.2f} times"))
        rows.append(("this CPU has", str(int8["cpu"] or "no integer instructions that it names")))
    rows.append(("peak memory", format_size(result["peak_rss_bytes"])))
    return _pairs(rows)


def doctor_table(findings: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line a finding, its remedy below it."""
    table = _table(("", "left"), ("what", "left"), ("found", "left"))
    for finding in findings:
        _add(table, finding["status"], finding["check"], finding["found"])
        if finding["remedy"]:
            _add(table, "", "", f"-> {finding['remedy']}")
    return table


def info_table(info: Mapping[str, Any]) -> RenderableType:
    """Any dictionary as labels and figures."""
    return _pairs(figures(info))


def _table(*columns: tuple[str, str]) -> Table:
    """A light table whose right-aligned columns never wrap and whose others fold instead of being cut."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title, justify in columns:
        right = justify == "right"
        table.add_column(title, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def _pairs(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=False, overflow="fold", style="dim")
    table.add_column(overflow="fold")
    for label, text in rows:
        _add(table, label, text)
    return table


def _add(table: Table, *cells: object, style: str = "") -> None:
    table.add_row(*(Text(printable(cell)) for cell in cells), style=style)


def _size_and_share(size_bytes: float | None, whole_bytes: float | None) -> tuple[str, str]:
    if size_bytes is None:
        return "–", ""
    return format_size(size_bytes), percent(size_bytes / whole_bytes) if whole_bytes else ""
