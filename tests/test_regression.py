"""Reduced-rank regression against its definition, and the spreading of ranks against a slow twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import dense_regression, random, relative_difference
from torch import Tensor

from wasi_edge.conversion import regression
from wasi_edge.conversion.allocate import LOWEST_RANK, allocate_ranks
from wasi_edge.conversion.regression import JointMoments, regress
from wasi_edge.subspace.ranks import break_even_rank

SHAPES = [(24, 24), (30, 14), (14, 30)]


def pairs(out_features: int, in_features: int, tokens: int = 700) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs far from zero mean, outputs that the weight gives of slightly other inputs, and the weight."""
    x = random(tokens, in_features, seed=1) @ random(in_features, in_features, seed=2) + 3.0
    weight = random(out_features, in_features, seed=3)
    y = (x + 0.3 * random(tokens, in_features, seed=4)) @ weight.T + random(out_features, seed=5)
    return x, y, weight


def moments_of(x: Tensor, y: Tensor, dtype: torch.dtype = torch.float64) -> JointMoments:
    moments = JointMoments(x.shape[1], y.shape[1], dtype)
    for inputs, outputs in zip(x.split(300), y.split(300), strict=True):
        moments.add_pairs(inputs, outputs)
    return moments


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_joint_moments_are_means_and_centred_covariances(dtype, tolerance):
    x, y, _ = pairs(14, 30)
    moments = moments_of(x, y, dtype)
    expected = (y - y.mean(0)).T @ (x - x.mean(0)) / len(x)
    assert relative_difference(moments.cross_covariance().double(), expected) < tolerance
    assert relative_difference(moments.output_mean(), y.mean(0)) < tolerance
    assert relative_difference(moments.covariance().double(), torch.cov(x.T, correction=0)) < tolerance
    with pytest.raises(ValueError, match="NaN"):
        moments.add_pairs(x * float("nan"), y)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 13])
def test_factors_and_bias_are_those_of_the_definition(shape, scaled, rank):
    x, y, weight = pairs(*shape)
    scale = 0.1 + random(shape[0], seed=6).abs() if scaled else None
    wanted = y if scale is None else y * scale
    expected, expected_bias = dense_regression(x, wanted, weight, rank, regression.SHRINKAGE, scale)
    (left, right), bias = regress(weight, rank, moments_of(x, wanted), scale)
    assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
    torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=torch.float64))
    assert relative_difference(left @ right, expected) < 1e-6
    assert relative_difference(bias, expected_bias) < 1e-6
    # whatever the rank, the mean output is the one that is wanted
    made = (x @ right.T @ left.T + bias) * (1 if scale is None else scale)
    assert relative_difference(made.mean(0), wanted.mean(0)) < 1e-10


def test_outputs_come_nearer_than_by_truncation_alone():
    x, y, weight = pairs(24, 24)
    wanted = y @ torch.diag(torch.linspace(0.5, 1.5, 24, dtype=torch.float64))  # the layers before have changed
    (left, right), bias = regress(weight, 8, moments_of(x, wanted))
    plain = regression.factorise(weight, 8, torch.cov(x.T, correction=0))
    shift = wanted.mean(0) - plain.left @ (plain.right @ x.mean(0))
    errors = [(a @ b, c) for (a, b), c in (((left, right), bias), ((plain.left, plain.right), shift))]
    ours, theirs = (float((x @ product.T + offset - wanted).norm()) for product, offset in errors)
    assert ours < 0.8 * theirs


def test_inputs_that_never_change_leave_the_weight_as_it_is():
    weight = random(6, 9, seed=7)
    x = torch.ones(50, 9, dtype=torch.float64)
    y = x @ weight.T + 2.0
    (left, right), bias = regress(weight, 6, moments_of(x, y))
    assert relative_difference(left @ right, weight) < 1e-10
    assert relative_difference(x @ (left @ right).T + bias, y) < 1e-10


def test_an_output_that_is_switched_off_gives_finite_factors():
    x, y, weight = pairs(24, 24)
    scale = torch.ones(24, dtype=torch.float64)
    scale[3] = 0.0
    (left, right), bias = regress(weight, 5, moments_of(x, y * scale), scale)
    assert bool(left.isfinite().all() and right.isfinite().all() and bias.isfinite().all())
    assert relative_difference(left.T @ left, torch.eye(5, dtype=torch.float64)) < 1e-10


def test_float32_sums_that_are_no_covariance_are_damped_until_they_are():
    x, y, weight = (value.float() for value in pairs(14, 30, tokens=20))
    x[:, 1] = x[:, 0] * 1e4  # singular, and badly scaled
    (left, right), bias = regress(weight, 5, moments_of(x, y, torch.float32))
    assert left.dtype == right.dtype == bias.dtype == torch.float32
    assert bool(left.isfinite().all() and right.isfinite().all() and bias.isfinite().all())


SHAPES_OF = {"wide": (40, 90), "tall": (90, 40), "square": (50, 50)}


def spectra(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: np.sort(rng.exponential(size=min(s)) ** (2 + i))[::-1] for i, (n, s) in enumerate(SHAPES_OF.items())}


def one_by_one(found: dict[str, np.ndarray], budget: int) -> dict[str, int]:
    """Always the next rank of the linear where it is worth most for each parameter."""
    ranks = dict.fromkeys(found, LOWEST_RANK)
    while True:
        spent = sum(rank * sum(SHAPES_OF[name]) for name, rank in ranks.items())
        open_ones = [n for n in found if ranks[n] < min(len(found[n]), break_even_rank(*SHAPES_OF[n]))]
        if not open_ones:
            return ranks
        best = max(open_ones, key=lambda n: found[n][ranks[n]] / found[n].sum() / sum(SHAPES_OF[n]))
        if spent + sum(SHAPES_OF[best]) > budget:
            return ranks
        ranks[best] += 1


@pytest.mark.parametrize("budget", [0, 3000, 4000, 5500, 10**6])
def test_ranks_go_where_they_are_worth_most(budget):
    found = spectra()
    ranks = allocate_ranks(found, SHAPES_OF, budget)
    assert ranks == one_by_one(found, budget)
    if budget == 10**6:
        assert ranks == {name: break_even_rank(*shape) for name, shape in SHAPES_OF.items()}
    elif budget > 3000:
        assert len(set(ranks.values())) > 1
        assert sum(rank * sum(SHAPES_OF[name]) for name, rank in ranks.items()) <= budget


def test_a_layer_that_gives_nothing_gets_the_lowest_rank():
    found = {**spectra(), "square": np.zeros(50)}
    ranks = allocate_ranks(found, SHAPES_OF, 5000)
    assert ranks["square"] == LOWEST_RANK < ranks["wide"]
