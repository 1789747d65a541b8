"""Fig. 5: accuracy, memory and FLOPs over epsilon on CIFAR-10.

    python -m benchmarks.paper.fig5_epsilon [--repeats N]

ViT-S/14 truncated by plain SVD, as the paper does, on a subset of CIFAR-10 enlarged to 56 px: WSI and WASI over
epsilon, WASI from a calibrated conversion, ASI over the rank that it keeps, truncated SVD with LoRA beside the frozen
factors, vanilla. WSI keeps its inputs whole and learns from as small a gradient as WASI. Memory as the paper counts it;
FLOPs of our products, and as the paper counts them for inputs compressed in their last mode.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import fmean
from typing import Any

from benchmarks.accuracy.converted import converted
from benchmarks.accuracy.datasets import Photos, load_photos, random_split
from benchmarks.accuracy.learn import ONE_RATE, Variant, learn, settings_of
from benchmarks.accuracy.studies import DENSE_MODEL
from benchmarks.accuracy.study import Job, Store
from benchmarks.paper.figures import EPSILONS, open_store, write_plot, write_table
from wasi_edge.bench.flops import paper_count, step_flops
from wasi_edge.bench.subject import Read, Subject, find_subject
from wasi_edge.method import Method
from wasi_edge.report.svg import Series, line_chart
from wasi_edge.report.svg_scatter import Cloud, scatter_chart
from wasi_edge.training import defaults

DATA, SIZE, PER_CLASS, EPOCHS, CALIBRATION = "cifar10", 56, 200, 4, 400
ASI_RANKS = (4, 8, 16, 32, 64)
CALIBRATED = "wasi, calibrated"


def main() -> None:
    """Run what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1)
    repeats = parser.parse_args().repeats
    store = open_store("fig5")
    points = list(_points())
    store.run(
        Job(point.group, point.label, split, partial(_run, point, split), _settings(point))
        for split in range(repeats)
        for point in points
    )
    rows = [_row(store, point) for point in points]
    write_table("fig5", rows, f"{PER_CLASS} photos a class in all, 0.6 of them trained on, {SIZE} px, {EPOCHS} epochs")
    in_factors = [group for group in dict.fromkeys(row["method"] for row in rows) if group not in ("vanilla", "asi")]
    curves = [Series(group, EPSILONS, [row["test"] for row in rows if row["method"] == group]) for group in in_factors]
    vanilla = [("vanilla", row["test"]) for row in rows if row["method"] == "vanilla"]
    write_plot("fig5-accuracy", line_chart(curves, "epsilon", "test accuracy", None, vanilla))
    for key, label in (
        ("memory MB", "memory as counted, MB"),
        ("GFLOP", "training FLOPs of our products, GFLOP a step"),
    ):
        clouds = []
        for group in (*in_factors, "asi", "vanilla"):
            found = [row for row in rows if row["method"] == group]
            clouds.append(Cloud(group, [row[key] for row in found], [1 - row["test"] for row in found]))
        write_plot(f"fig5-{key.split()[0].lower()}", scatter_chart(clouds, label, "test error", front="beaten by none"))


@dataclass(frozen=True)
class _Point:
    group: str
    label: str
    method: Method
    epsilon: float | None
    gradient_rank: int = defaults.GRADIENT_RANK


def _points() -> Iterator[_Point]:
    yield _Point("vanilla", "dense", Method.VANILLA, None)
    for epsilon in EPSILONS:
        for group, method in (("wasi", Method.WASI), ("wsi", Method.WSI), ("svd + lora", Method.LORA)):
            yield _Point(group, f"epsilon {epsilon}", method, epsilon)
        yield _Point(CALIBRATED, f"epsilon {epsilon}", Method.WASI, epsilon)
    for rank in ASI_RANKS:
        yield _Point("asi", f"rank {rank}", Method.ASI, None, rank)


def _variant(point: _Point) -> Variant:
    epsilon = None if point.method is Method.LORA else point.epsilon
    rates = {} if point.method in (Method.VANILLA, Method.LORA) else ONE_RATE
    return Variant(point.method.value, epsilon, epochs=EPOCHS, gradient_rank=point.gradient_rank, **rates)


def _settings(point: _Point) -> dict[str, Any]:
    more = {"truncated": point.epsilon, "data": DATA, "photos_per_class": PER_CLASS}
    if point.group == CALIBRATED:
        more["calibration_photos"] = CALIBRATION
    return settings_of(_variant(point), find_subject(DENSE_MODEL, SIZE), **more)


def _run(point: _Point, split: int) -> dict[str, Any]:
    photos, variant = _photos(), _variant(point)
    parts = random_split(photos, split)
    if point.group != CALIBRATED:
        subject = find_subject(DENSE_MODEL, SIZE)
        subject = _Truncated(**vars(subject), truncated=point.epsilon) if point.method is Method.LORA else subject
        return learn(subject, photos, parts, variant, split)
    with converted(DENSE_MODEL, photos, parts.train, CALIBRATION, point.epsilon or 1.0, SIZE) as (subject, _):
        return learn(subject, photos, parts, variant, split)


@dataclass(frozen=True)
class _Truncated(Subject):
    """The dense network of truncated weights: what LoRA beside frozen factors computes with."""

    truncated: float | None = None

    def reader(self, epsilon: float | None) -> Read:
        dense, factors = super().reader(None), super().reader(self.truncated)

        def read(name: str) -> Any:
            linear, _, key = name.rpartition(".")
            if key == "weight" and linear in self.geometry.linear_shapes():
                return factors(f"{linear}.left") @ factors(f"{linear}.right")
            return dense(name)

        return read


@lru_cache(maxsize=1)
def _photos() -> Photos:
    return load_photos(DATA, find_subject(DENSE_MODEL, SIZE).preprocessing, PER_CLASS)


def _row(store: Store, point: _Point) -> dict[str, Any]:
    runs = store.of(point.group, point.label).values()
    subject = find_subject(DENSE_MODEL, SIZE)
    ranks = subject.ranks(point.epsilon)
    count = paper_count(subject.geometry, SIZE, ranks, point.method, point.gradient_rank, defaults.BATCH)
    lora = defaults.LORA_RANK if point.method is Method.LORA else 0
    flops = step_flops(subject.geometry, SIZE, ranks, point.method, point.gradient_rank, defaults.BATCH, False, lora)
    return {
        "method": point.group,
        "at": point.label,
        "head test": fmean(run["head_test"] for run in runs),
        "test": fmean(run["best"]["test"] for run in runs),
        "val": fmean(run["best"]["val"] for run in runs),
        "memory MB": count["memory_bytes"] / 2**20,
        "memory ratio": count["memory_ratio"],
        "GFLOP": defaults.BATCH * (flops.train + flops.upkeep) / 1e9,
        "GFLOP, paper": (count["train_flops"] + count["upkeep_flops"]) / 1e9,
        # LoRA's runs computed with the truncated weights multiplied out
        "seconds": None if point.method is Method.LORA else fmean(run["history"][-1]["seconds"] for run in runs),
    }


if __name__ == "__main__":
    main()
