"""The closed-form classifier: ridge regression on the features of the frozen network.

One pass over the photos gives features X (n, F); the head is the weighted least-squares fit of centred one-hot
targets on standardised features with an L2 penalty, chosen among a few by leave-one-out error, which ridge regression
gives without refitting: e_i / (1 - h_i) (Allen 1974, PRESS). With fewer photos than features a small penalty fits every
photo, both terms go to zero, and their quotient alone tells that fit from a good one: 1 - h_i is never rounded up.
Least squares does not give probabilities, so its outputs are multiplied by one number, the temperature that makes the
leave-one-out cross-entropy (of smoothed labels) smallest.

Everything is a function of `FeatureStatistics`, sums over photos. They are stored with a finished run, so that a later
run can fit a head for its new photos and for classes that it has no photos of any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wasi_edge.chunks import HEAD_ROWS

_SMOOTHING = 0.1
# relative to the mean variance of a feature, times the number of photos
_PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0)
# of the mean square of a feature, below which a variance is rounding
_ROUNDING = 1e-7
# of standardised features: constant ones have none, and the penalty must not vanish with it
_LEAST_VARIANCE = 0.1
# 1 - h_i in float64 has an error of that order at the smallest penalty
_LEAST_REMAINDER = 1e-9
# of the largest standard deviation of a feature: one that hardly moves is not blown up
_LEAST_DEVIATION = 1e-4


class Head(NamedTuple):
    """`weight` (C, F) and `bias` (C,), float32."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class FeatureStatistics:
    """Weighted sums over photos, float64: `second` (F, F) of x x^T, `sums` (C, F) of x by class, `counts` (C,).

    Photos are weighted so that each class counts the same in all.
    """

    second: Tensor
    sums: Tensor
    counts: Tensor

    @staticmethod
    def of(features: Tensor, labels: Tensor, num_classes: int, weight: Tensor | None = None) -> FeatureStatistics:
        """Statistics of features (n, F) with labels (n,), photos weighted by `weight` (n,), or by `balance`."""
        weight = balance(labels, num_classes) if weight is None else weight
        width = features.shape[1]
        second = torch.zeros(width, width, dtype=torch.float64)
        sums = torch.zeros(num_classes, width, dtype=torch.float64)
        for rows, classes, share in zip(
            features.split(HEAD_ROWS), labels.split(HEAD_ROWS), weight.split(HEAD_ROWS), strict=True
        ):
            x = rows.double()
            weighted = x * share[:, None]
            second.addmm_(weighted.t(), x)
            sums.index_add_(0, classes, weighted)
        counts = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, labels, weight)
        return FeatureStatistics(second, sums, counts)


def balance(labels: Tensor, num_classes: int, chosen: Tensor | None = None) -> Tensor:
    """Weights (n,) float64 that make every class that occurs count the same; their mean is 1. Of `chosen` photos (n,)
    bool alone if they are given: the others weigh nothing."""
    counted = labels if chosen is None else labels[chosen]
    counts = torch.bincount(counted, minlength=num_classes).double()
    present = int((counts > 0).sum())
    weight = (len(counted) / (present * counts.clamp_min(1)))[labels]
    return weight if chosen is None else weight * chosen


class Fit(NamedTuple):
    """A head, and its accuracy on photos that it was fitted without, each class counted the same."""

    head: Head
    left_out_accuracy: float


def fit_head(features: Tensor, labels: Tensor, num_classes: int, earlier: FeatureStatistics | None = None) -> Head:
    """The head of `fit`."""
    return fit(features, labels, num_classes, earlier).head


def accuracy_of_half(features: Tensor, labels: Tensor, num_classes: int) -> tuple[int, float]:
    """How many every second photo of each class are, and the accuracy on the others of a head fitted to them."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(num_classes):
        chosen[(labels == label).nonzero().flatten()[::2]] = True
    return int(chosen.sum()), fit(features, labels, num_classes, chosen=chosen).left_out_accuracy


def fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    earlier: FeatureStatistics | None = None,
    chosen: Tensor | None = None,
    standardised: bool = True,
) -> Fit:
    """Head (C, F) for features (n, F) with labels (n,), or for `chosen` of them (n,) bool alone; `standardised`, or as
    they are.

    `earlier` are the statistics of photos that are no longer there (of an earlier run, over the same C classes);
    of their classes those without photos now are fitted from the statistics alone.
    """
    weight = balance(labels, num_classes, chosen)
    now = FeatureStatistics.of(features, labels, num_classes, weight)  # ours: its second moments are overwritten below
    if earlier is not None:
        now = merge_statistics(now, earlier)
        del earlier  # as large as what follows
    total = now.counts.sum()
    mean = now.sums.sum(0) / total
    prior = now.counts / total
    # photos that are all alike leave rounding errors for a scatter
    floor = _ROUNDING * float(now.second.diagonal().mean()) + 1e-30
    # cross[c] = sum_i w_i (x_i - mean) (y_ic - prior_c)
    cross = now.sums - now.counts[:, None] * mean
    scatter = now.second.addr_(mean, mean, alpha=-float(total))
    scale = _standardise(scatter, floor) if standardised else torch.ones_like(mean)
    cross = cross * scale
    targets = torch.nn.functional.one_hot(labels, num_classes).double() - prior

    best: tuple[float, Tensor, Tensor] | None = None
    for penalty in _PENALTIES:
        factor = _regularised_cholesky(scatter, penalty)
        solution = torch.cholesky_solve(cross.t(), factor).t()  # (C, F)
        left_out = torch.empty_like(targets)
        for rows in torch.arange(len(features)).split(HEAD_ROWS):
            x = features[rows].double().sub_(mean).mul_(scale)
            energy = torch.linalg.solve_triangular(factor, x.t(), upper=False).square_().sum(0)
            leverage = weight[rows] * (energy + 1 / total)
            residual = targets[rows] - x @ solution.t()
            left_out[rows] = targets[rows] - residual / (1 - leverage).clamp_min(_LEAST_REMAINDER)[:, None]
        error = float((weight[:, None] * (left_out - targets).square()).sum())
        if best is None or error < best[0]:
            best = error, solution, left_out
        del factor
    assert best is not None
    _, solution, answers = best
    sharpness = _best_sharpness(answers + prior, labels, weight)
    full = sharpness * solution * scale
    bias = sharpness * prior - full @ mean
    unseen = balance(labels, num_classes, None if chosen is None else ~chosen)
    accuracy = float((unseen * ((answers + prior).argmax(1) == labels)).sum() / unseen.sum().clamp_min(1e-12))
    return Fit(Head(full.float(), bias.float()), accuracy)


def _standardise(scatter: Tensor, floor: float) -> Tensor:
    """The inverse deviations (F,) of the features, by which the scatter (F, F) is scaled in place."""
    deviation = scatter.diagonal().clamp_min(floor).sqrt()
    scale = 1 / deviation.clamp_min(_LEAST_DEVIATION * float(deviation.max()))
    scatter.mul_(scale[:, None]).mul_(scale)
    return scale


def _regularised_cholesky(scatter: Tensor, penalty: float) -> Tensor:
    """The lower Cholesky factor of scatter (F, F) + penalty * (mean eigenvalue) * I.

    One matrix of that size is made, and one by the library; an eigendecomposition, once for all penalties, would hold
    five in all.
    """
    factor = scatter.clone()
    factor.diagonal().add_(penalty * max(float(scatter.diagonal().mean()), _LEAST_VARIANCE))
    return torch.linalg.cholesky(factor, out=factor)


def merge_statistics(now: FeatureStatistics, earlier: FeatureStatistics) -> FeatureStatistics:
    """Sums of both, a class that occurs in both counted once, with today's photos. Overwrites the second moments of
    `now`."""
    absent = (now.counts == 0) & (earlier.counts > 0)
    if not bool(absent.any()):
        return now
    # the scatter within classes is shared: take as much of the earlier one as the absent classes weigh
    share = earlier.counts[absent].sum() / earlier.counts.sum()
    typical = now.counts[now.counts > 0].mean()
    factor = typical / earlier.counts[absent].mean()
    present = earlier.counts > 0
    # within classes: all but what lies between them; then between the absent ones
    second = now.second.add_(earlier.second, alpha=float(factor * share))
    for classes, amount in ((present, -factor * share), (absent, factor)):
        sums = earlier.sums[classes]
        second.addmm_(sums.t() / earlier.counts[classes], sums, alpha=float(amount))
    sums, counts = now.sums.clone(), now.counts.clone()
    sums[absent] = factor * earlier.sums[absent]
    counts[absent] = factor * earlier.counts[absent]
    return FeatureStatistics(second, sums, counts)


def _best_sharpness(outputs: Tensor, labels: Tensor, weight: Tensor) -> float:
    """The factor on `outputs` (n, C) with the smallest weighted cross-entropy, among powers of 2^(1/4).

    Against smoothed targets: where leave-one-out makes no mistake (few photos, many features), the plain
    cross-entropy falls without end, and a head a hundred times too sharp would drown the first steps in its gradient.
    """
    candidates = [2 ** (step / 4) for step in range(-4, 33)]
    losses = [
        float(
            (
                weight
                * torch.nn.functional.cross_entropy(
                    outputs * factor, labels, reduction="none", label_smoothing=_SMOOTHING
                )
            ).sum()
        )
        for factor in candidates
    ]
    return candidates[min(range(len(losses)), key=losses.__getitem__)]
