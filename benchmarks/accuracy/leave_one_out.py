"""python -m benchmarks.accuracy.leave_one_out [--tasks clothing-40,...] [--rows ...] [--splits 3] [--table]

Ten tasks (`tasks.py`): what `finetune` could do by default, beside what people would do instead. Every candidate runs
on every task; what is reported for a task is the candidate that is best on the tasks of all *other* data sets, so no
figure comes from photos that chose it. The default is the one that is best on all. Runs what is missing; stop and
start it as you like.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from benchmarks.accuracy.learn import Variant, learn, settings_of
from benchmarks.accuracy.processes import answer, parsed, work_through
from benchmarks.accuracy.rivals import SIZES, rival
from benchmarks.accuracy.studies import DENSE_MODEL
from benchmarks.accuracy.study import Job, Store, paired_difference, this_machine, write_table
from benchmarks.accuracy.tasks import SPLITS, TASKS, Task, find_task
from wasi_edge.bench.subject import find_subject

HEAD, VANILLA = Variant("head"), Variant("vanilla", epochs=10)
# of the dense network, and of the model that ships
REFERENCES: dict[str, tuple[str, Variant]] = {
    "head, dense": (DENSE_MODEL, HEAD),
    "vanilla": (DENSE_MODEL, VANILLA),
    "LoRA": (DENSE_MODEL, Variant("lora", epochs=10)),
    "vanilla, our start": ("default", Variant("vanilla", epochs=12)),
    "head": ("default", HEAD),
}
RIVALS = {f"{name}, frozen": name for name in SIZES}
# lengths: of up to 200 photos --quality fast, default and best take the first, the third and the last, of 400 default
# takes the second
_HALF = Variant(trained_share=0.5, learning_rate=1.2e-4)
CANDIDATES: dict[str, Variant] = {
    "half, 6 epochs": _HALF,
    "half, 8 epochs": replace(_HALF, epochs=8),
    "half, 12 epochs": replace(_HALF, epochs=12),
    "half, 24 epochs": replace(_HALF, epochs=24),
}
OURS = "ours, chosen elsewhere"
# tasks whose classes EfficientNet, or the shipped model, was trained on by name
TAUGHT = ("tiny-a", "tiny-b", "tiny-50", "hymenoptera")


def main() -> None:
    """Do what is missing, choose, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="", help="comma-separated; all if not given")
    parser.add_argument("--rows", default="", help="semicolon-separated labels; all if not given")
    parser.add_argument("--splits", type=int, default=len(SPLITS), help="the first so many")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    given = parsed(parser)
    tasks = [find_task(name) for name in given.tasks.split(",") if name] or list(TASKS)
    rows = [row for row in given.rows.split(";") if row] or [*REFERENCES, *RIVALS, *CANDIDATES]
    every = list(jobs(tasks, rows, SPLITS[: given.splits]))
    if given.answer:
        answer(every)
        return
    store = Store("leave_one_out", this_machine())
    store.expect(every)
    if not given.table:
        work_through(store, every, given.processes, partial(print, flush=True), apart=given.processes > 1)
    write_table("leave_one_out", table(store, tasks))


def jobs(tasks: Sequence[Task], rows: Sequence[str], splits: Sequence[int]) -> Iterator[Job]:
    """Every row of every task and split, split by split."""
    for split in splits:
        for row in rows:
            for task in tasks:
                yield _job(task, row, split)


def _job(task: Task, row: str, split: int) -> Job:
    if row in RIVALS:
        dense = find_subject(DENSE_MODEL, task.size)
        work = partial(rival, RIVALS[row], task, dense.preprocessing, split)
        return Job(task.name, row, split, work, {"network": RIVALS[row], "task": str(task), "head": "ridge"})
    model, variant = REFERENCES.get(row) or ("default", CANDIDATES[row])
    subject = find_subject(model, task.size)

    def run() -> dict[str, Any]:
        photos = task.photos(subject.preprocessing)
        parts = task.split(photos, split)
        return learn(subject, photos, parts, variant, split, test_always=False)

    return Job(task.name, row, split, run, settings_of(variant, subject, task=str(task), head="standardised"))


def tests(store: Store, task: Task, row: str) -> dict[int, float]:
    """Test accuracy of what a run keeps, by split."""
    return {
        split: run["best"]["test"] if "best" in run else run["test"] for split, run in store.of(task.name, row).items()
    }


def chosen(scores: Mapping[str, Mapping[str, float]], tasks: Sequence[Task], without: str) -> str | None:
    """The candidate with the highest mean accuracy over tasks of data other than `without`, of those that ran all such
    tasks that any ran; None where none did. `scores`: by candidate and task."""
    others = [task.name for task in tasks if task.data != without]
    others = [name for name in others if any(name in held for held in scores.values())]
    complete = [label for label, held in scores.items() if others and all(name in held for name in others)]
    return max(complete, key=lambda label: fmean(scores[label][name] for name in others), default=None)


def table(store: Store, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """A row a task: means over splits in percent, ours by the candidate chosen without its data, and by how much that
    is ahead of vanilla and of its own head, paired over splits."""
    scores = {
        label: {task.name: fmean(found.values()) for task in tasks if (found := tests(store, task, label))}
        for label in CANDIDATES
    }
    rows = []
    for task in tasks:
        row: dict[str, Any] = {"task": task.name}
        for label in (*REFERENCES, *RIVALS):
            row[label] = _percent(tests(store, task, label))
        candidate = chosen(scores, tasks, task.data)
        ours = tests(store, task, candidate) if candidate else {}
        row[OURS] = _percent(ours)
        for label in ("vanilla", "head"):
            theirs = tests(store, task, label)
            row[f"- {label}"] = 100 * paired_difference(ours, theirs)[0] if ours.keys() & theirs.keys() else None
        rows.append(row | {"candidate": candidate, "splits": len(ours)})
    rows = [row for row in rows if any(row[label] is not None for label in (*REFERENCES, *RIVALS, OURS))]
    rows.append(_mean_row(rows, f"mean of {len(rows)}"))
    untaught = [row for row in rows if row["task"] in {task.name for task in tasks} - set(TAUGHT)]
    rows.append(_mean_row(untaught, "mean of other classes"))
    for label, held in scores.items():
        rows.append({"task": f"candidate: {label}"} | {OURS: 100 * fmean(held.values()) if held else None})
    return rows


def _percent(found: Mapping[int, float]) -> float | None:
    return 100 * fmean(found.values()) if found else None


def _mean_row(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Means of the columns that every row has a number in."""
    columns = [key for key, value in rows[0].items() if key not in ("task", "candidate", "splits")] if rows else []
    means = {
        key: fmean(row[key] for row in rows) if all(row[key] is not None for row in rows) else None for key in columns
    }
    return {"task": name, **means}


if __name__ == "__main__":
    main()
