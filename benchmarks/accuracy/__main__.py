"""python -m benchmarks.accuracy STUDY [--data clothing,flowers] [--repeats 3] [--processes N] [--table]

Runs what is missing of a study, one run after the other or in several processes, and prints its table; stop and start
it as you like.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from statistics import fmean as _mean
from statistics import stdev

from benchmarks.accuracy.accelerator import compute_on, name_of
from benchmarks.accuracy.datasets import write_fixed_split
from benchmarks.accuracy.processes import answer, parsed, work_through
from benchmarks.accuracy.studies import OTHER_SEEDS, RECIPE_SETS, REPEATS, STUDIES, seeded
from benchmarks.accuracy.study import Store, paired_difference, this_machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=[*STUDIES, "splits"])
    parser.add_argument("--data", default="", help="comma-separated; all of the study's if not given")
    parser.add_argument("--repeats", type=int, help="splits or folds; as many as docs/results.md has if not given")
    parser.add_argument("--device", help="compute there, 'cuda' say, and not on the CPU (see accelerator.py)")
    parser.add_argument("--seed", type=int, default=0, help="of `splits`")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    given = parsed(parser)
    say = partial(print, flush=True)
    datasets = [name for name in given.data.split(",") if name]
    if given.study == "splits":
        for source in RECIPE_SETS:
            if not datasets or source.name in datasets:
                write_fixed_split(source.name, source.photos(), given.seed)
        return
    if given.answer and given.device:
        compute_on(given.device)
    jobs = list(STUDIES[given.study](datasets, given.repeats or REPEATS[given.study]))
    if given.answer:
        answer(jobs)
        return
    try:
        store = Store(given.study, this_machine(name_of(given.device) if given.device and not given.table else None))
    except RuntimeError as error:
        parser.error(str(error))
    store.expect(jobs)
    if not given.table:
        work_through(store, jobs, given.processes, say, apart=given.processes > 1 or given.device is not None)
    _print_table(store, list(dict.fromkeys((job.group, job.label) for job in jobs)))


def _print_table(store: Store, rows: list[tuple[str, str]]) -> None:
    if any("history" not in run for run in store.runs.values()):
        _print_tests(store, rows)
        return
    print("data | variant | head val | best val | val loss | test | against the first | seconds")
    tests = {row: {split: run["best"]["test"] for split, run in store.of(*row).items()} for row in rows}
    for (group, label), against in _against_the_first(tests).items():
        runs = store.of(group, label).values()
        head, value = _mean(run["history"][0]["val"] for run in runs), _mean(run["best"]["val"] for run in runs)
        last_loss, seconds = (_mean(run["history"][-1][key] for run in runs) for key in ("val_loss", "seconds"))
        mean = _mean(tests[group, label].values())
        print(
            f"{group} | {label} | {head:.3f} | {value:.3f} | {last_loss:.4f} | {mean:.4f} | {against} | {seconds:.0f}"
        )
    for group, label in rows:
        _print_seeds(store, group, label)


def _print_tests(store: Store, rows: list[tuple[str, str]]) -> None:
    print("data | variant | test | against the first | what else was measured, mean")
    tests = {row: {split: run["test"] for split, run in store.of(*row).items()} for row in rows}
    for (group, label), against in _against_the_first(tests).items():
        runs = store.of(group, label).values()
        numbers = [key for key, value in next(iter(runs)).items() if isinstance(value, int | float)]
        means = {key: _mean(run[key] for run in runs) for key in numbers if key not in ("test", "machine")}
        others = ", ".join(f"{key} {mean:.4g}" for key, mean in means.items())
        print(f"{group} | {label} | {_mean(tests[group, label].values()):.4f} | {against} | {others}")


def _against_the_first(tests: Mapping[tuple[str, str], dict[int, float]]) -> dict[tuple[str, str], str]:
    """Of every row (group, label) that has results, the paired difference to the first row of its group, in percent."""
    first: dict[str, dict[int, float]] = {}
    found = {}
    for (group, label), values in tests.items():
        if values:
            found[group, label] = _difference(values, first.setdefault(group, values))
    return found


def _difference(ours: dict[int, float], theirs: dict[int, float]) -> str:
    difference, interval, count = paired_difference(ours, theirs)
    return f"{100 * difference:+.2f} +- {100 * interval:.2f} ({count})"


def _print_seeds(store: Store, group: str, label: str) -> None:
    """Of a row whose runs were made again with other seeds: the mean over seeds, split by split, and their spread."""
    seeds = [store.of(group, label), *(store.of(group, seeded(label, more)) for more in OTHER_SEEDS)]
    splits = set.intersection(*map(set, seeds))
    if not splits:
        return
    tests = {split: [runs[split]["best"]["test"] for runs in seeds] for split in splits}
    means = {split: _mean(values) for split, values in tests.items()}
    text = f"{group} | {label}, mean of {len(seeds)} seeds | {_mean(means.values()):.4f}"
    for other in ("head", "vanilla"):
        theirs = {split: run["best"]["test"] for split, run in store.of(group, other).items()}
        text += f" | - {other} {_difference(means, theirs)}"
    print(f"{text} | over seeds +- {100 * _mean(map(stdev, tests.values())):.2f}")


if __name__ == "__main__":
    main()
