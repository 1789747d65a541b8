"""What a report advises, from its figures alone."""

from __future__ import annotations

from typing import Any

import pytest

from wasi_edge.method import Method, Quality
from wasi_edge.report.advice import advice
from wasi_edge.report.html import render_finetune_report
from wasi_edge.training import defaults

LOSSES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.45)


def report(**more: Any) -> dict[str, Any]:
    """A completed run of five epochs that has nothing to say of itself."""
    history = [{"epoch": epoch, "val_loss": 0.5, "val_accuracy": 0.8} for epoch in range(6)]
    values = {"status": "completed", "method": "wasi", "quality": "default", "best_epoch": 3, "epochs_run": 5}
    return values | {"history": history, "best_val_accuracy": 0.8, "head_only_val_accuracy": 0.75} | more


def curve(before: float, after: float) -> list[dict[str, float]]:
    return [{"photos": 160, "accuracy": before}, {"photos": 320, "accuracy": after}]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, []),
        ({"best_epoch": 0}, ["--method head"]),
        ({"best_epoch": 0, "epochs_run": 0, "head_sufficed": True}, ["next to no mistakes"]),
        ({"best_epoch": 0, "method": "head"}, []),
        ({"best_epoch": 0, "status": "interrupted"}, []),  # models are worse than they will be while the rate is high
        ({"best_epoch": 0, "epochs_run": 0}, []),  # interrupted before the first epoch ended
        ({"learning_curve": curve(0.7, 0.78)}, ["from 160 to 320 of them the frozen head went from 70 % to 78 %"]),
        ({"learning_curve": curve(0.775, 0.78)}, ["more detail"]),
        ({"learning_curve": curve(0.95, 0.955), "best_val_accuracy": 0.95}, []),
        ({"learning_curve": curve(0.9, 0.98), "best_val_accuracy": 0.98}, []),
        ({"learning_curve": curve(0.7, 0.78)[:1]}, []),
    ],
)
def test_it_says_what_the_figures_say(more: dict[str, Any], expected: list[str]) -> None:
    said = advice(report(**more))
    assert len(said) == len(expected) and all(part in sentence for part, sentence in zip(expected, said, strict=True))


def test_a_run_that_was_still_learning_at_its_end_says_so() -> None:
    history = [{"epoch": epoch, "val_loss": loss, "val_accuracy": 0.8} for epoch, loss in enumerate(LOSSES)]
    falling = {"history": history, "best_epoch": 5}
    assert "--quality best" in advice(report(**falling))[0]
    assert advice(report(**falling, quality="best")) == advice(report(**falling, status="interrupted")) == []
    assert advice(report(history=history, best_epoch=4)) == []


def test_any_key_may_be_missing_and_the_page_shows_advice_where_there_is_some() -> None:
    assert advice({}) == [] and "<h2>Advice" not in render_finetune_report({})
    page = render_finetune_report(report(learning_curve=curve(0.7, 0.78)))
    assert "<h2>Advice" in page and "More photos would help" in page.replace("\u00a0", " ")


def test_few_photos_are_seen_more_often_and_many_less_often() -> None:
    counts = (20, 100, 400, 1000, 5000)
    for quality in Quality:
        epochs = [defaults.epochs(Method.WASI, quality, count, 16) for count in counts]
        assert epochs == sorted(epochs, reverse=True) and epochs[-1] >= 6
    of_400 = [defaults.epochs(Method.WASI, quality, 400, 16) for quality in Quality]
    assert of_400 == sorted(of_400) and len(set(of_400)) == 3
    assert [defaults.epochs(Method.HEAD, quality, 400, 16) for quality in Quality] == [0, 0, 0]
