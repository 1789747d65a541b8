"""Terminal output reads the same without colour, in 80 columns, with hostile names and missing figures."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from wasi_edge.report.terminal import evaluation_table, info_table, plan_table, predictions_table, summary
from wasi_edge.report.words import (
    counted,
    epochs_text,
    figure_text,
    figures,
    headline,
    label_text,
    per_class_rows,
    percent,
    wilson_interval,
)

MB = 2**20
HOSTILE = "[red]x[/red]\x1b[31m<b>"
PLAN = {"micro_batch": 4, "keep": "compact", "memory": [{"item": "libraries", "bytes": 238 * MB}]}


def shown(renderable: RenderableType, width: int = 80) -> str:
    """What a log file gets: no terminal, no colour."""
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=False, no_color=True).print(renderable)
    text = stream.getvalue()
    assert "\x1b" not in text and all(len(line) <= width for line in text.splitlines())
    return text


def test_plan_table_sets_the_parts_against_the_budget() -> None:
    text = shown(plan_table(PLAN, 512 * MB, 446 * MB, 510.0))
    for part in ("238 MB", "46 %", "446 MB", "87 %", "512 MB", "micro batch", "compact", "8.5 min"):
        assert part in text, part


def test_plan_table_without_figures() -> None:
    assert "planned peak" in shown(plan_table({}, None, None, None))


def test_summary_names_the_next_command_quoted() -> None:
    report = {
        "status": "early_stopped",
        "classes": ["a", "b"],
        "best_val_accuracy": 0.86,
        "num_val_images": 20,
        "head_only_val_accuracy": 0.79,
        "peak_rss_bytes": 423 * MB,
        "budget_bytes": 512 * MB,
        "skipped_files": [{"path": "x", "reason": "y"}],
        "num_train_images": 80,
    }
    text = shown(summary(report, "my runs/1"))
    assert "wasi-edge predict 'my runs/1' photo.jpg" in text and "86 % accuracy on 20 photos" in text
    assert "stopped early" in text and "+7 points (the head alone: 79 %)" in text and "1 skipped" in text


@pytest.mark.parametrize("status", ["completed", "interrupted", "failed", "planned", "time_limit", None])
def test_summary_of_an_empty_report(status: str | None) -> None:
    text = shown(summary({"status": status}, "run"))
    assert ("predict" in text) == (status not in ("failed", "planned"))
    assert ("--resume" in text) == (status in ("failed", "interrupted"))


def test_predictions_show_errors_in_their_row() -> None:
    rows: list[dict[str, Any]] = [
        {"path": "p.jpg", "label": "cat", "probability": 0.93, "top": [["cat", 0.93], ["dog", 0.05]]},
        {"path": "q.jpg", "label": None, "probability": 0.4, "top": []},
        {"path": "broken.jpg", "error": "not an image"},
    ]
    text = shown(predictions_table(rows))
    for part in ("93 %", "dog 5 %", "not sure", "could not be read"):
        assert part in text, part


def test_hostile_names_are_printed_not_obeyed() -> None:
    row = {"path": HOSTILE, "label": HOSTILE, "probability": 1.0, "top": [[HOSTILE + "2", 0.0]]}
    for renderable in (
        predictions_table([row]),
        info_table({HOSTILE: HOSTILE}),
        evaluation_table({"per_class": {HOSTILE: {"precision": 1.0, "recall": 1.0, "support": 1}}}),
        plan_table({"memory": [{"item": HOSTILE, "bytes": 1}]}, 1, 1, 1),
        summary({"status": "failed", "error": HOSTILE}, HOSTILE),
    ):
        assert "[red]x[/red]" in shown(renderable, width=200)


def test_long_names_fold_and_numbers_stay_whole() -> None:
    row = {"path": "folder/" * 40, "label": "c" * 100, "probability": 0.871, "top": []}
    assert "87 %" in shown(predictions_table([row]))


def test_evaluation_table_from_either_form_of_scores() -> None:
    scores: dict[str, dict[str, Any]] = {
        "cat": {"precision": 0.9, "recall": 0.5, "support": 10},
        "dog": {"precision": None, "support": 0},
    }
    whole = {"accuracy": 0.5, "balanced_accuracy": 0.5, "num_images": 10}
    by_name = shown(evaluation_table({**whole, "per_class": scores}))
    listed = [{"class": name, **values} for name, values in scores.items()]
    assert by_name == shown(evaluation_table({**whole, "per_class": listed}))
    assert "Accuracy 50 % on 10 photos" in by_name and "90 %" in by_name and "–" in by_name
    assert "–" in shown(evaluation_table({}))


def test_scores_are_counted_from_the_confusion_matrix() -> None:
    rows = per_class_rows({"classes": ["a", "b", "c"], "confusion": [[3, 1, 0], [2, 2, 0], [0, 0, 0]]})
    assert rows == [("a", 0.6, 0.75, 4), ("b", 2 / 3, 0.5, 4), ("c", None, None, 0)]


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.905, "90 %"),
        (1.0, "100 %"),
        (0.9999, "99.9 %"),
        (0.0, "0 %"),
        (0.004, "0.4 %"),
        (None, "–"),
        (float("nan"), "–"),
        (0.999, "99.9 %"),
    ],
)
def test_percent_never_rounds_up_to_perfect(fraction: float | None, text: str) -> None:
    assert percent(fraction) == text


def test_interval_contains_the_proportion_and_narrows() -> None:
    low, high = wilson_interval(0.9, 130)
    assert (round(low, 3), round(high, 3)) == (0.836, 0.941)
    assert wilson_interval(1.0, 5)[0] > 0.5 and wilson_interval(0.0, 5)[1] < 0.5


def test_words() -> None:
    assert counted(1, "class") == "1 class" and counted(2, "class") == "2 classes" and counted(0, "photo") == "0 photos"
    assert epochs_text({"epochs_run": 8.0, "epochs_planned": 8}) == "8 epochs"
    assert epochs_text({"epochs_run": None, "epochs_planned": 8}) == "0 of 8 epochs"
    assert headline({})[-1] == "."
    assert label_text("planned_seconds") == "planned time" and label_text("peak_rss_bytes") == "peak rss"
    assert figure_text("x_bytes", 5 * MB) == "5 MB" and figure_text("x", float("nan")) == "–"
    assert figures({"a": {"b_bytes": MB}, "c": [], "d": True}) == [
        ("a · b", "1 MB"),
        ("c", "none"),
        ("d", "yes"),
    ]


def test_plan_table_says_what_other_budgets_would_change() -> None:
    other = {"budget_bytes": 451 * MB, "seconds": 498.0, "micro_batch": 8, "weight_bits": 32}
    text = shown(plan_table({**PLAN, "other_budgets": [other]}, 384 * MB, 371 * MB, 660.0))
    assert "with 451 MB" in text and "8.3 min: micro batch 8, weight bits 32" in text
    assert "other budgets" not in text
