"""The optimiser study: which rule learns best from the same small gradients, by epoch, by second and by byte.

    python -m benchmarks.accuracy.optimisers [--processes N] [--rounds 10]

The embedded model, WASI at its own epsilon, one fold of each set, six epochs, each rule of `rules` at rates a factor of
two to four apart. Steps of all rules are timed interleaved afterwards. Stopped and started again, it goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.accuracy.datasets import folds
from benchmarks.accuracy.learn import Variant, learn, settings_of
from benchmarks.accuracy.processes import answer, parsed, work_through
from benchmarks.accuracy.rules import RULES, learning_by, state_bytes
from benchmarks.accuracy.studies import WASI, Source
from benchmarks.accuracy.study import Job, Store, this_machine, write_table
from wasi_edge.bench.contestant import Contestant, Entry, free_choices
from wasi_edge.bench.subject import Subject, find_subject
from wasi_edge.bench.timing import interleave
from wasi_edge.chunks import TURNS
from wasi_edge.method import Method
from wasi_edge.training.defaults import BATCH, GRADIENT_RANK
from wasi_edge.training.trainer import SubspaceTrainer

SETS = (Source("clothing", 112), Source("flowers", 84), Source("cifar10", 84, 100, 1000))
RATES = {
    "polar factor of momentum": (6e-5, 1.2e-4, 2.4e-4),
    "normalised momentum": (1.2e-4, 2.4e-4, 4.8e-4),
    "sgd": (1e-3, 1e-2, 1e-1),
    "momentum": (1e-3, 1e-2, 1e-1),
    "adam on p": (2e-5, 4e-5, 8e-5),
    "adamw in factors": (5e-5, 1e-4, 2e-4),
}


def main() -> None:
    """Learn what is missing, time, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="of the timing")
    parser.add_argument("--fold", type=int, default=0)
    given = parsed(parser)
    todo = list(jobs(given.fold))
    if given.answer:
        answer(todo)
        return
    store = Store("optimisers", this_machine())
    work_through(store, todo, given.processes, partial(print, flush=True), apart=given.processes > 1)
    ratios = _step_ratios(given.rounds)
    rows = [_row(store, rule, rate, ratios[rule], given.fold) for rule, rates in RATES.items() for rate in rates]
    write_table("optimisers", rows)


def jobs(fold: int) -> Iterator[Job]:
    """One run of every rule, rate and set."""
    for source in SETS:
        subject = find_subject("default", source.size)
        for rule, rates in RATES.items():
            for rate in rates:
                variant = replace(WASI, learning_rate=rate)
                settings = settings_of(variant, subject, **source.settings, rule=rule)
                yield Job(
                    source.name, _label(rule, rate), fold, partial(_run, source, subject, rule, variant, fold), settings
                )


def _label(rule: str, rate: float) -> str:
    return f"{rule}, {rate:g}"


def _run(source: Source, subject: Subject, rule: str, variant: Variant, fold: int) -> dict[str, Any]:
    photos, held = source.photos(), []

    def watch(epoch: int, trainer: Any) -> None:
        assert isinstance(trainer, SubspaceTrainer)
        held.append(state_bytes(trainer._factors))

    with learning_by(rule):
        split = folds(source.name, photos, fold)
        result = learn(subject, photos, split, variant, fold, watch)
    return result | {"state_bytes": max(held)}


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


def _row(store: Store, rule: str, rate: float, step_ratio: float, fold: int) -> dict[str, Any]:
    row: dict[str, Any] = {"rule": rule, "rate": rate}
    for source in SETS:
        run = store.of(source.name, _label(rule, rate))[fold]
        row[f"{source.name} val"] = run["best"]["val"]
        row[f"{source.name} loss"] = run["history"][-1]["val_loss"]
        row["state MB"] = run["state_bytes"] / 1e6
    return row | {"step": step_ratio}


if __name__ == "__main__":
    main()
