"""What would help: sentences from a run's own figures, for somebody who does not know what an epoch is. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wasi_edge.report.svg import finite
from wasi_edge.report.words import accuracy_of, percent

# points of accuracy that twice as many photos brought, from which more photos are worth the trouble, and below which
# they are not
_WORTHWHILE, _IDLE = 0.02, 0.01
# accuracies above which there is next to nothing to be gained, and below which there is much
_HIGH, _LOW = 0.97, 0.9
# of the loss three quarters through the run, below which its end was still learning
_FALLING = 0.97


def advice(report: Mapping[str, Any]) -> list[str]:
    """None, one or more sentences about the run of `report`, whatever keys it lacks."""
    parts = (_head_is_enough(report), _still_learning(report), _more_photos(report))
    return [sentence for sentence in parts if sentence]


def _head_is_enough(report: Mapping[str, Any]) -> str | None:
    if report.get("method") == "head" or finite(report.get("best_epoch")) != 0:
        return None
    if report.get("head_sufficed"):
        return "The frozen head makes next to no mistakes, so nothing was trained: the network stays as it was."
    if finite(report.get("epochs_run")) and report.get("status") in ("completed", "early_stopped"):
        return (
            "Training made nothing better of the frozen head, which is kept: --method head gives the same in a "
            "fraction of the time."
        )
    return None


def _still_learning(report: Mapping[str, Any]) -> str | None:
    losses = [finite(entry.get("val_loss")) for entry in report.get("history") or ()]
    last = len(losses) - 1
    if (
        report.get("status") != "completed"
        or report.get("quality") == "best"
        or finite(report.get("best_epoch")) != last
    ):
        return None
    before = losses[3 * last // 4] if last > 3 else None
    if before is None or losses[last] is None or losses[last] > _FALLING * before:  # type: ignore[operator]
        return None
    return "It was still learning at the end: a longer run (--quality best, or more --epochs) may know more."


def _more_photos(report: Mapping[str, Any]) -> str | None:
    points = [
        (finite(point.get("photos")), finite(point.get("accuracy"))) for point in report.get("learning_curve") or ()
    ]
    known = [(photos, accuracy) for photos, accuracy in points if photos is not None and accuracy is not None]
    reached = accuracy_of(report)
    if len(known) < 2 or reached is None or reached >= _HIGH:
        return None
    (few, before), (many, after) = known[0], known[-1]
    went = f"from {few:.0f} to {many:.0f} of them the frozen head went from {percent(before)} to {percent(after)}"
    if after - before >= _WORTHWHILE:
        return f"More photos would help: {went}."
    if after - before < _IDLE and reached < _LOW:
        return (
            f"More photos of the same kind would help little ({went}): try more detail (--image-size) or another "
            f"network (--model)."
        )
    return None
