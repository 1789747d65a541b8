"""Runs of a study: each is done once, written down at once, and skipped when the study is started again."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wasi_edge.memory.hardware import hardware, versions

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Job:
    """One run. `group` and `label` name the row it belongs to, `split` the repetition: paired across labels.

    `settings`: everything else its result depends on, as JSON knows it; kept with the result, which counts only as long
    as they are the same.
    """

    group: str
    label: str
    split: int
    work: Callable[[], dict[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Under which its result is kept."""
        return f"{self.group} | {self.label} | {self.split}"


class Store:
    """Results of a study in `results/<name>.json`, each with the number of the machine in `machines` it came from."""

    def __init__(self, name: str, machine: dict[str, Any], folder: Path = RESULTS) -> None:
        self._path, self._machine = folder / f"{name}.json", machine
        self.runs: dict[str, dict[str, Any]] = {}
        self._machines: list[dict[str, Any]] = []
        self._expected: dict[str, Any] = {}
        self._read()

    def run(self, jobs: Iterable[Job], say: Callable[[str], None] = print) -> None:
        """Do what is not there yet, in the order given."""
        for job in self.missing(jobs):
            self.keep(job, job.work(), say)

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Those that are not there yet, in the order given."""
        every = list(jobs)
        self.expect(every)
        return [job for job in every if not self._counts(job.key)]

    def expect(self, jobs: Iterable[Job]) -> None:
        """From now on results of these jobs that were made with other settings do not count."""
        self._expected |= {job.key: json.loads(json.dumps(job.settings)) for job in jobs}

    def keep(self, job: Job, result: dict[str, Any], say: Callable[[str], None]) -> None:
        """Write the result of a job down, beside what another command of the study has written meanwhile."""
        self._read()
        if self._machine not in self._machines:
            self._machines.append(self._machine)
        settings = {"settings": dict(job.settings)} if job.settings else {}
        self.runs[job.key] = result | settings | {"machine": self._machines.index(self._machine)}
        self._write()
        say(f"{job.key}: {_in_short(result)}")

    def of(self, group: str, label: str) -> dict[int, dict[str, Any]]:
        """Results of a row by split."""
        found = {}
        for key, result in self.runs.items():
            in_group, in_label, split = key.split(" | ")
            if (in_group, in_label) == (group, label) and self._counts(key):
                found[int(split)] = result
        return found

    def _counts(self, key: str) -> bool:
        held = self.runs.get(key)
        return held is not None and held.get("settings", {}) == self._expected.get(key, held.get("settings", {}))

    def _read(self) -> None:
        held = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.runs, self._machines = held.get("runs", {}), held.get("machines", [])

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in self.runs.items())
        machines = ",\n".join(map(json.dumps, self._machines))
        fresh.write_text(f'{{"machines": [\n{machines}\n],\n"runs": {{\n{lines}\n}}}}\n')
        os.replace(fresh, self._path)


def this_machine(accelerator: str | None = None) -> dict[str, Any]:
    """Where results come from: what computes, with how much memory and how many threads, and the versions of what
    computes on it."""
    known = hardware()
    machine = {key: known[key] for key in ("machine", "cpu", "cores", "board")}
    machine |= {"memory_gib": round((known["memory_bytes"] or 0) / 2**30), "threads": torch.get_num_threads()}
    return {**machine, **({"accelerator": accelerator} if accelerator else {}), **versions()}


def write_table(name: str, rows: Sequence[Mapping[str, Any]], note: str = "", folder: Path = RESULTS) -> None:
    """A study's table: printed, and written to `<folder>/<name>-table.json` with the machine it came from."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if note:
        print(note)
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(_text(row.get(column)) for column in columns))
    lines = ",\n".join(json.dumps(row) for row in rows)
    folder.mkdir(exist_ok=True)
    text = f'{{"machine": {json.dumps(this_machine())},\n"note": {json.dumps(note)},\n"rows": [\n{lines}\n]}}\n'
    (folder / f"{name}-table.json").write_text(text)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _in_short(result: dict[str, Any]) -> str:
    if "history" not in result:
        return ", ".join(f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, float))
    accuracies = " ".join(f"{entry['val']:.3f}/{entry['val_loss']:.3f}" for entry in result["history"])
    return f"{accuracies}; test {result['best']['test']:.3f}, {result['history'][-1]['seconds']:.0f} s"


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float, int]:
    """Mean of ours - theirs over the splits both have, half of its 95 % interval (Student), and how many they are."""
    both = sorted(ours.keys() & theirs.keys())
    differences = [ours[split] - theirs[split] for split in both]
    if len(differences) < 2:
        return (differences or [float("nan")])[0], float("nan"), len(differences)
    # two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom
    quantiles = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    quantile = quantiles[min(len(differences) - 2, len(quantiles) - 1)]
    return statistics.fmean(differences), quantile * statistics.stdev(differences) / len(differences) ** 0.5, len(both)
