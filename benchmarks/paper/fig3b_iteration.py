"""Fig. 3b: does one warm-started subspace iteration a step lose against a full SVD a step?

    python -m benchmarks.paper.fig3b_iteration

ViT-S/14 truncated at each epsilon, `clothing` at 112 px, WASI with its own rule; the same runs again where the moved
weight is formed densely and truncated by its SVD whenever it moves. FLOPs: of a step's weight subspaces, as counted for
the paper's iteration, for ours, and for a thin SVD of every weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.accuracy.datasets import fixed_split, load_photos
from benchmarks.accuracy.learn import ONE_RATE, Variant, learn, settings_of
from benchmarks.accuracy.studies import DENSE_MODEL
from benchmarks.accuracy.study import Job
from benchmarks.paper import formulas
from benchmarks.paper.figures import EPSILONS, open_store, write_plot, write_table
from wasi_edge.bench.flops import update_flops
from wasi_edge.bench.subject import Subject, find_subject
from wasi_edge.chunks import TURNS
from wasi_edge.report.svg import Series, line_chart
from wasi_edge.subspace.factors import WeightFactors
from wasi_edge.training import factor_update
from wasi_edge.training.defaults import GRADIENT_RANK

DATA, SIZE, EPOCHS, SEEDS = "clothing", 112, 3, 1
STEPS = ("iteration", "svd")


def main() -> None:
    """Run what is missing, then draw."""
    store = open_store("fig3b")
    subject = find_subject(DENSE_MODEL, SIZE)
    jobs = [
        Job(
            f"epsilon {epsilon}",
            step,
            seed,
            partial(_run, subject, epsilon, step, seed),
            settings_of(_variant(epsilon), subject, data=DATA),
        )
        for seed in range(SEEDS)
        for epsilon in EPSILONS
        for step in STEPS
    ]
    store.run(jobs)
    rows = []
    for epsilon in EPSILONS:
        shapes, ranks = subject.geometry.linear_shapes(), subject.ranks(epsilon)
        costs = [(out, inner, rank) for name, (out, inner) in shapes.items() if (rank := ranks[name]) is not None]
        row: dict[str, Any] = {"epsilon": epsilon}
        for step in STEPS:
            runs = store.of(f"epsilon {epsilon}", step).values()
            row[f"{step} val"] = sum(run["best"]["val"] for run in runs) / len(runs)
            row[f"{step} loss"] = sum(run["history"][-1]["val_loss"] for run in runs) / len(runs)
            row[f"{step} test"] = sum(run["best"]["test"] for run in runs) / len(runs)
        row["GFLOP, paper's iteration"] = sum(formulas.iteration(*cost) for cost in costs) / TURNS / 1e9
        row["GFLOP, ours"] = sum(update_flops(*cost, GRADIENT_RANK) for cost in costs) / 1e9
        row["GFLOP, thin SVD"] = sum(formulas.thin_svd(out, inner) for out, inner, _ in costs) / TURNS / 1e9
        rows.append(row)
    write_table("fig3b", rows, f"{DATA}, {SIZE} px, {EPOCHS} epochs, {SEEDS} seed(s)")
    curves = [Series(step, EPSILONS, [row[f"{step} loss"] for row in rows]) for step in STEPS]
    write_plot("fig3b-loss", line_chart(curves, "epsilon", "validation loss, last epoch"))
    names = ("thin SVD", "paper's iteration", "ours")
    curves = [Series(name, EPSILONS, [row[f"GFLOP, {name}"] for row in rows]) for name in names]
    write_plot("fig3b-flops", line_chart(curves, "epsilon", "GFLOP a step"))


def _run(subject: Subject, epsilon: float, step: str, seed: int) -> dict[str, Any]:
    photos = load_photos(DATA, subject.preprocessing)
    with _svd_steps() if step == "svd" else _as_it_is():
        return learn(subject, photos, fixed_split(DATA, photos), _variant(epsilon), seed)


def _variant(epsilon: float) -> Variant:
    return Variant(epsilon=epsilon, epochs=EPOCHS, **ONE_RATE)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _svd_steps() -> Iterator[None]:
    """The weight is moved densely, and its K largest singular triplets are kept."""
    with mock.patch.object(factor_update, "update_weight", _svd_step):
        yield


def _svd_step(
    factors: WeightFactors, gradient_left: Tensor, basis: Tensor, learning_rate: float, weight_decay: float
) -> float:
    weight = (1 - learning_rate * weight_decay) * factors.left @ factors.right
    weight.addmm_(gradient_left, basis.t(), alpha=-learning_rate)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    rank = factors.left.shape[1]
    factors.left.copy_(left[:, :rank])
    factors.right.copy_(values[:rank, None] * right[:rank])
    # the norm that rates are relative to is carried, and renewed when the iteration's would be
    return 1.0


if __name__ == "__main__":
    main()
