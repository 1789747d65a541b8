"""Which linear keeps how many directions of its inputs? The authors' dynamic programme against simpler rules.

    python -m benchmarks.paper.rank_selection

The embedded model on `clothing`. The relative error of every weight's gradient is measured at each of `RANKS`; under
the memory that one rank of 32 takes as the paper counts it (projection and basis of every input), ranks are chosen by a
dynamic programme as in the paper, by a greedy rule (the cheapest gain first), and evenly. The paper's objective is the
sum of absolute errors over the ranks of all modes; ours is that of squared relative errors, and the last mode's rank
alone is chosen, as that is all the engine compresses. Then the error on photos that chose nothing, and what is learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy.datasets import fixed_split, load_photos
from benchmarks.accuracy.learn import ONE_RATE, Variant, learn, settings_of
from benchmarks.accuracy.study import Job, Store
from benchmarks.paper.figures import open_store, write_plot, write_table
from wasi_edge.bench.gradient import Sample, errors_by_linear, start
from wasi_edge.bench.subject import Subject, find_subject
from wasi_edge.layers.linear import LinearKinds
from wasi_edge.method import Method
from wasi_edge.models.network import VisionTransformer, build_network
from wasi_edge.report.svg import Series, line_chart
from wasi_edge.training.defaults import BATCH, GRADIENT_RANK
from wasi_edge.training.trainer import SubspaceTrainer, Trainer

RANKS = (8, 16, 24, 32, 48, 64)
DATA, SIZE, EPOCHS, SEEDS, BUCKETS = "clothing", 112, 4, 3, 4000
# error[linear][rank], bytes[linear][rank]
Table = Mapping[str, Mapping[int, float]]


def main() -> None:
    """Measure what is missing, choose, compare."""
    store = open_store("rank_selection")
    subject = find_subject("default", SIZE)
    settings = settings_of(Variant(epochs=EPOCHS, **ONE_RATE), subject, data=DATA)
    measured = [Job("errors", f"rank {rank}", 0, partial(_errors, subject, rank, True), settings) for rank in RANKS]
    store.run(measured)
    names = list(subject.geometry.linear_shapes())
    errors = {name: {rank: store.runs[f"errors | rank {rank} | 0"][name] ** 2 for rank in RANKS} for name in names}
    sizes = _sizes(subject)
    budget = sum(sizes[name][GRADIENT_RANK] for name in names)
    choices = {
        "even": dict.fromkeys(names, GRADIENT_RANK),
        "dynamic programme": by_dynamic_programme(errors, sizes, budget),
        "greedy": by_greed(errors, sizes, budget),
    }
    store.run(
        Job("chosen", label, 0, partial(_mean_error, subject, ranks), settings | {"ranks": ranks})
        for label, ranks in choices.items()
    )
    store.run(
        Job("learned", label, seed, partial(_learned, subject, ranks, seed), settings | {"ranks": ranks})
        for seed in range(SEEDS)
        for label, ranks in choices.items()
    )
    write_table("rank_selection", [_row(store, label, ranks, errors, sizes) for label, ranks in choices.items()])
    kinds = ("qkv", "proj", "fc1", "fc2")
    curves = [
        Series(kind, RANKS, [fmean(errors[n][rank] ** 0.5 for n in names if n.endswith(kind)) for rank in RANKS])
        for kind in kinds
    ]
    write_plot("rank-selection", line_chart(curves, "rank", "relative error of dW"))


def by_dynamic_programme(errors: Table, sizes: Table, budget: float) -> dict[str, int]:
    """One rank for each linear: the least sum of `errors` with a sum of `sizes` of at most `budget`, sizes rounded up
    to `BUCKETS` parts of it. Raises ValueError where the smallest ranks do not fit."""
    unit = budget / BUCKETS
    best, taken = np.zeros(BUCKETS + 1), []
    for name, options in errors.items():
        after, choice = np.full(BUCKETS + 1, np.inf), np.zeros(BUCKETS + 1, dtype=int)
        for rank, error in options.items():
            cost = int(np.ceil(sizes[name][rank] / unit - 1e-9))
            if cost > BUCKETS:
                continue
            with_it = np.full(BUCKETS + 1, np.inf)
            with_it[cost:] = best[: BUCKETS + 1 - cost] + error
            better = with_it < after
            after[better], choice[better] = with_it[better], rank
        best = after
        taken.append((name, choice))
    if not np.isfinite(best[-1]):
        raise ValueError("the smallest ranks take more than the budget")
    left, chosen = BUCKETS, {}
    for name, choice in reversed(taken):
        chosen[name] = int(choice[left])
        left -= int(np.ceil(sizes[name][chosen[name]] / unit - 1e-9))
    return {name: chosen[name] for name in errors}


def by_greed(errors: Table, sizes: Table, budget: float) -> dict[str, int]:
    """From the smallest ranks up, always the step with the largest gain for its bytes that still fits."""
    chosen = {name: min(options) for name, options in errors.items()}
    left = budget - sum(sizes[name][rank] for name, rank in chosen.items())
    while True:
        steps = []
        for name, rank in chosen.items():
            for larger in (option for option in errors[name] if option > rank):
                cost = sizes[name][larger] - sizes[name][rank]
                if cost <= left:
                    steps.append(((errors[name][rank] - errors[name][larger]) / cost, name, larger, cost))
        if not steps or max(steps)[0] <= 0:
            return chosen
        _, name, rank, cost = max(steps)
        chosen[name], left = rank, left - cost


def _sizes(subject: Subject) -> dict[str, dict[int, float]]:
    """Bytes of the projection of a batch and of the basis."""
    tokens = BATCH * subject.geometry.tokens(subject.image_size)
    shapes = subject.geometry.linear_shapes()
    return {name: {rank: 4.0 * rank * (tokens + inner) for rank in RANKS} for name, (_, inner) in shapes.items()}


def _errors(subject: Subject, rank: int | Mapping[str, int], of_training: bool) -> dict[str, float]:
    build = partial(_network, subject)
    errors = errors_by_linear(build, rank, _sample(subject, of_training))
    return {name: float(fmean(values)) for name, values in errors.items()}


def _mean_error(subject: Subject, ranks: Mapping[str, int]) -> dict[str, float]:
    return {"error": fmean(_errors(subject, ranks, of_training=False).values())}


def _network(subject: Subject) -> VisionTransformer:
    torch.set_grad_enabled(False)
    ranks, read = subject.ranks(subject.own_epsilon), subject.reader(subject.own_epsilon)
    kinds = LinearKinds.of(Method.WASI)
    return build_network(subject.geometry, ranks, read, subject.image_size, head=False, kinds=kinds)


def _sample(subject: Subject, of_training: bool) -> Sample:
    """160 training photos for the head and 160 that warm bases up and are compared: of training, or those validated."""
    photos = load_photos(DATA, subject.preprocessing)
    split, order = fixed_split(DATA, photos), np.random.default_rng(0)
    train, held_out = order.permutation(split.train), order.permutation(split.val)
    compared = train[160:320] if of_training else np.concatenate([train[320:], held_out])[-160:]
    chosen = np.concatenate([train[:160], compared])
    return Sample(photos.inputs([int(i) for i in chosen]), photos.labels[torch.from_numpy(chosen)])


def _learned(subject: Subject, ranks: Mapping[str, int], seed: int) -> dict[str, Any]:
    photos = load_photos(DATA, subject.preprocessing)

    def watch(epoch: int, trainer: Trainer) -> None:
        if epoch == 0:
            assert isinstance(trainer, SubspaceTrainer)
            start(trainer.model, ranks)

    return learn(subject, photos, fixed_split(DATA, photos), Variant(epochs=EPOCHS, **ONE_RATE), seed, watch)


def _row(store: Store, label: str, ranks: Mapping[str, int], errors: Table, sizes: Table) -> dict[str, Any]:
    runs = store.of("learned", label).values()
    by_kind = {
        f"mean r, {kind}": fmean(rank for name, rank in ranks.items() if name.endswith(kind))
        for kind in ("qkv", "proj", "fc1", "fc2")
    }
    return {
        "rule": label,
        "MB": sum(sizes[name][rank] for name, rank in ranks.items()) / 2**20,
        **by_kind,
        "squared error where chosen": sum(errors[name][rank] for name, rank in ranks.items()),
        "mean error elsewhere": store.runs[f"chosen | {label} | 0"]["error"],
        "val": fmean(run["best"]["val"] for run in runs),
        "val loss": fmean(run["history"][-1]["val_loss"] for run in runs),
        "test": fmean(run["best"]["test"] for run in runs),
    }


if __name__ == "__main__":
    main()
