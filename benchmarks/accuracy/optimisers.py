"""The optimiser study: which rule learns best from the same small gradients, by epoch, by second and by byte.

    python -m benchmarks.accuracy.optimisers [--processes N] [--rounds 10]

The embedded model, WASI at its own epsilon, six epochs, each rule of `rules` at three to six rates on a fold of each
set; then each at the rate with the lowest loss on two more folds. Schedule and the decay of rates towards the first
block are those that were chosen for our rule. Steps of all rules are timed interleaved afterwards. Stopped and started
again, it goes on.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from benchmarks.accuracy.datasets import folds
from benchmarks.accuracy.learn import Variant, learn, settings_of
from benchmarks.accuracy.processes import answer, parsed, work_through
from benchmarks.accuracy.rules import RULES, learning_by, state_bytes
from benchmarks.accuracy.studies import WASI, Source
from benchmarks.accuracy.study import Job, Store, paired_difference, this_machine, write_table
from wasi_edge.bench.contestant import Contestant, Entry, free_choices
from wasi_edge.bench.subject import Subject, find_subject
from wasi_edge.bench.timing import interleave
from wasi_edge.chunks import TURNS
from wasi_edge.errors import WasiEdgeError
from wasi_edge.method import Method
from wasi_edge.training.defaults import BATCH, GRADIENT_RANK
from wasi_edge.training.trainer import SubspaceTrainer

SETS = (Source("clothing", 112), Source("flowers", 84), Source("cifar10", 84, 100, 1000))
RATES = {
    "polar factor of momentum": (6e-5, 1.2e-4, 2.4e-4, 4.8e-4),
    "normalised momentum": (1.2e-4, 2.4e-4, 4.8e-4),
    "sgd": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "momentum": (3e-2, 1e-1, 3e-1),
    "adam on p": (2e-5, 4e-5, 8e-5, 1.6e-4, 3.2e-4, 6.4e-4),
    "adamw in factors": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4),
}
FIRST_FOLD, OTHER_FOLDS = 0, (1, 2)
Chosen = Mapping[str, Sequence[float]]


def main() -> None:
    """Learn what is missing, time, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="of the timing")
    given = parsed(parser)
    if given.answer:
        answer(jobs(RATES, (FIRST_FOLD, *OTHER_FOLDS)))
        return
    store = Store("optimisers", this_machine())
    work = partial(work_through, processes=given.processes, say=partial(print, flush=True), apart=given.processes > 1)
    work(store, jobs(RATES, (FIRST_FOLD,)))
    best = {rule: best_rate(store, rule) for rule in RATES}
    work(store, jobs({rule: [rate] for rule, rate in best.items()}, OTHER_FOLDS))
    ratios = _step_ratios(given.rounds)
    rows = [_row(store, rule, rate, ratios[rule], (FIRST_FOLD,)) for rule, rates in RATES.items() for rate in rates]
    every = (FIRST_FOLD, *OTHER_FOLDS)
    for rule, rate in best.items():
        rows.append(_row(store, rule, rate, ratios[rule], every) | against(store, best, rule, every))
    write_table("optimisers", rows)


def jobs(chosen: Chosen, numbers: Iterable[int]) -> Iterator[Job]:
    """One run of every rule, rate and set, on folds of these numbers."""
    for number, source in itertools.product(numbers, SETS):
        subject = find_subject("default", source.size)
        for rule, rates in chosen.items():
            for rate in rates:
                variant = _variant(rate)
                settings = settings_of(variant, subject, **source.settings, rule=rule)
                run = partial(_run, source, subject, rule, variant, number)
                yield Job(source.name, _label(rule, rate), number, run, settings)


def _variant(rate: float) -> Variant:
    """Classifier, norms, biases and embeddings learn by AdamW at the same rates whatever the rule of the linears;
    nothing decays, since that would go with the rate."""
    usual = WASI.recipe
    dense, head = usual.dense_rate / rate, usual.head_rate / rate
    return replace(WASI, learning_rate=rate, dense_rate=dense, head_rate=head, weight_decay=0.0)


def _label(rule: str, rate: float) -> str:
    return f"{rule}, {rate:g}"


def _run(source: Source, subject: Subject, rule: str, variant: Variant, number: int) -> dict[str, Any]:
    photos, held = source.photos(), []

    def watch(epoch: int, trainer: Any) -> None:
        assert isinstance(trainer, SubspaceTrainer)
        held.append(state_bytes(trainer._factors))

    with learning_by(rule):
        split = folds(source.name, photos, number)
        try:
            result = learn(subject, photos, split, variant, number, watch)
        except (WasiEdgeError, ValueError) as error:  # a gradient or a weight is not finite any more
            return {"diverged": str(error)}
    return result | {"state_bytes": max(held)}


def best_rate(store: Store, rule: str) -> float:
    """The rate whose loss after the last epoch is lowest on the first fold, mean over the sets."""

    def loss(rate: float) -> float:
        return fmean(_last_loss(store.of(source.name, _label(rule, rate))[FIRST_FOLD]) for source in SETS)

    return min(RATES[rule], key=loss)


def _last_loss(run: Mapping[str, Any]) -> float:
    return math.inf if "diverged" in run else run["history"][-1]["val_loss"]


def _step_ratios(rounds: int) -> dict[str, float]:
    """Seconds of a whole step over those of a step by the first rule, at the first set's size."""
    subject = find_subject("default", SETS[0].size)
    steps: dict[str, Callable[[], None]] = {}
    for rule in RULES:
        choices = free_choices(BATCH, WASI.trained_blocks(subject.geometry.depth), GRADIENT_RANK)
        entry = Entry("wasi", Method.WASI, subject.own_epsilon)
        steps[rule] = partial(_step, rule, Contestant(subject, entry, choices, BATCH, 0))
    timed = interleave(steps, rounds, warm_up=2)
    return {rule: 1 / timing.speedup for rule, timing in timed.items()}


def _step(rule: str, contestant: Contestant) -> None:
    """As many steps as linears need to have moved once."""
    with learning_by(rule):
        for _ in range(TURNS):
            contestant.step()


def _row(store: Store, rule: str, rate: float, step_ratio: float, numbers: Sequence[int]) -> dict[str, Any]:
    """Accuracy and loss after the last epoch, means over folds; None where a run diverged."""
    row: dict[str, Any] = {"rule": rule, "rate": rate, "folds": len(numbers)}
    state_megabytes = None
    for source in SETS:
        held = store.of(source.name, _label(rule, rate))
        runs = [held[number] for number in numbers]
        val = loss = None
        if not any("diverged" in run for run in runs):
            val, loss = fmean(run["history"][-1]["val"] for run in runs), fmean(map(_last_loss, runs))
            state_megabytes = max(run["state_bytes"] for run in runs) / 2**20
        row |= {f"{source.name} val": val, f"{source.name} loss": loss}
    return row | {"state MB": state_megabytes, "step": step_ratio}


def against(store: Store, best: Mapping[str, float], rule: str, numbers: Sequence[int]) -> dict[str, Any]:
    """By how much a rule's loss and accuracy after the last epoch are above the default's, each at its best rate: means
    over sets and folds, with half of their 95 % intervals. The mean loss over all epochs says how fast it learns.
    Empty for the default itself, and where one diverged."""
    default = next(iter(best))
    if rule == default:
        return {}
    ours, theirs = (
        [store.of(source.name, _label(each, best[each]))[number] for source in SETS for number in numbers]
        for each in (rule, default)
    )
    if any("diverged" in run for run in (*ours, *theirs)):
        return {}
    row = {}
    for label, kind in (("loss", "val_loss"), ("val", "val")):
        last = [dict(enumerate(run["history"][-1][kind] for run in runs)) for runs in (ours, theirs)]
        row[f"last {label} above ours"], row[f"{label} +-"], _ = paired_difference(*last)
    row["mean loss above ours"] = fmean(_mean_loss(run) for run in ours) - fmean(_mean_loss(run) for run in theirs)
    return row


def _mean_loss(run: Mapping[str, Any]) -> float:
    return fmean(entry["val_loss"] for entry in run["history"][1:])


if __name__ == "__main__":
    main()
