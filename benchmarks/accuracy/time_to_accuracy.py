"""How long WASI takes for what vanilla reaches: epochs of `against_vanilla`, seconds of epochs timed here.

    python -m benchmarks.accuracy.time_to_accuracy [--data clothing] [--rounds 12]

The curve of a row is the test accuracy, after each epoch, of the model that `finetune` would keep so far, mean over the
splits. The accuracy asked for is the highest of vanilla's curve less one point. Steps of all rows are timed
interleaved, on as many threads as torch takes; the head's pass over the training photos counts, validation does not,
and where the dense network is converted first, so does the conversion. A row whose runs did not look at the test photos
after every epoch has no curve, only the seconds of all its epochs, and where that is vanilla no row has one; delete its
runs and make them again. A row without runs is left out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from statistics import fmean
from typing import Any

from benchmarks.accuracy.converted import converted
from benchmarks.accuracy.datasets import random_split
from benchmarks.accuracy.learn import Variant, kept_epochs
from benchmarks.accuracy.studies import (
    CALIBRATION,
    CLAIM_SETS,
    CONVERTED,
    DENSE_MODEL,
    EPSILON,
    REPEATS,
    against_vanilla,
    claim_rows,
)
from benchmarks.accuracy.study import Store, this_machine, write_table
from wasi_edge.bench.contestant import Contestant, Entry, free_choices
from wasi_edge.bench.subject import Subject, find_subject
from wasi_edge.bench.timing import interleave
from wasi_edge.method import Method
from wasi_edge.training.defaults import BATCH

MARGIN = 0.01


def main() -> None:
    """Time, reckon, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="clothing", choices=[source.name for source in CLAIM_SETS])
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    source = next(source for source in CLAIM_SETS if source.name == given.data)
    store = Store("against_vanilla", this_machine())
    store.expect(against_vanilla([source.name], REPEATS["against_vanilla"]))
    variants = {row: variant for row, variant in claim_rows(source).items() if variant.method != "head"}
    runs = {row: store.of(given.data, row).values() for row in variants}
    histories = {row: [run["history"] for run in found] for row, found in runs.items() if found}
    photos, conversion = source.photos(), 0.0
    split = random_split(photos, 0)
    train, count = split.train, len(split.val)
    if "vanilla" not in histories:
        parser.error(f"vanilla has no runs on {given.data}; make study-against_vanilla makes them")
    curves = {row: curve(found, count) for row, found in histories.items() if all_tested(found)}
    with ExitStack() as held:
        dense, default = (find_subject(model, source.size) for model in (DENSE_MODEL, "default"))
        subjects = {row: dense if row == "vanilla" else default for row in histories}
        if CONVERTED in histories:
            factored = converted(DENSE_MODEL, photos, train, CALIBRATION, EPSILON, source.size)
            subjects[CONVERTED], conversion = held.enter_context(factored)
        seconds = _seconds(subjects, variants, len(train), given.rounds)
    target = max(curves["vanilla"]) - MARGIN if "vanilla" in curves else math.inf
    rows = []
    for row in histories:
        reached = first_reaching(curves.get(row, []), target)
        start, step = seconds[row]
        start += conversion if row == CONVERTED else 0.0
        epoch = math.ceil(len(train) / BATCH) * step
        found: dict[str, Any] = {"row": row, "seconds of a step": step}
        found["seconds of all epochs"] = start + variants[row].epochs * epoch
        if row in curves:
            found |= {"best": max(curves[row]), "epochs": reached}
            found["seconds"] = None if reached is None else start + reached * epoch
            found["test after each epoch"] = [round(value, 4) for value in curves[row]]
        rows.append(found)
    asked = f"seconds to {target:.4f}" if "vanilla" in curves else "vanilla has no curve"
    converting_took = f"; conversion {conversion:.0f} s" if CONVERTED in histories else ""
    write_table(f"time_to_accuracy-{source.name}", rows, f"{given.data}: {asked}{converting_took}")


def all_tested(histories: Sequence[Sequence[dict[str, Any]]]) -> bool:
    """Whether there are runs, each with a test accuracy after every epoch."""
    return bool(histories) and all("test" in entry for history in histories for entry in history)


def curve(histories: Sequence[Sequence[dict[str, Any]]], photos: int) -> list[float]:
    """After each epoch, from 0: test accuracy of the model that `finetune` would keep so far, of so many validation
    `photos`; mean over runs.

    Raises ValueError for runs that are not `all_tested`.
    """
    if not all_tested(histories):
        raise ValueError("expected runs with test accuracies after every epoch; delete these rows and run them again")
    found = []
    for history in histories:
        found.append([history[epoch]["test"] for epoch in kept_epochs(history, photos)])
    return [fmean(tests) for tests in zip(*found, strict=True)]


def first_reaching(accuracies: Sequence[float], target: float) -> int | None:
    """The first epoch with at least that accuracy."""
    return next((epoch for epoch, accuracy in enumerate(accuracies) if accuracy >= target), None)


def _seconds(
    subjects: Mapping[str, Subject], variants: Mapping[str, Variant], photos: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """Of the head's pass over the training photos, and of a step, by row; `vanilla` is one of them."""
    built = {}
    for row, subject in subjects.items():
        method = Method(variants[row].method)
        entry = Entry(row, method, EPSILON if method.has_factors else None)
        choices = free_choices(BATCH, variants[row].trained_blocks(subject.geometry.depth), variants[row].gradient_rank)
        built[row] = Contestant(subject, entry, choices, BATCH, 0, variants[row].recipe)
    steps = interleave({row: contestant.step for row, contestant in built.items()}, rounds, warm_up=2)
    passes = interleave({row: contestant.infer for row, contestant in built.items()}, rounds)
    # in vanilla's seconds: ratios of neighbours hold on a machine that others use
    step, forward = steps["vanilla"].median_seconds, passes["vanilla"].median_seconds
    return {row: (forward / passes[row].speedup * photos / BATCH, step / steps[row].speedup) for row in subjects}


if __name__ == "__main__":
    main()
