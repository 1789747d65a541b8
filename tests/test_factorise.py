"""Truncation against brute-force oracles in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wasi_edge.conversion import factorise as module
from wasi_edge.conversion.factorise import (
    Moments,
    factorise,
    rank_at,
    singular_values,
    squared_singular_values,
)

SHAPES = [(24, 24), (30, 14), (14, 30)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decaying(out_features: int, in_features: int, *, ratio: float, seed: int = 0) -> Tensor:
    """A float64 weight whose singular values fall geometrically from 1 to 1 / ratio."""
    rank = min(out_features, in_features)
    u = torch.linalg.qr(torch.randn(out_features, rank, generator=generator(seed), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(in_features, rank, generator=generator(seed + 1), dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.tensor(ratio).log10().item(), rank, dtype=torch.float64)
    return (u * values) @ v.T


def inputs(tokens: int, width: int, seed: int = 5) -> Tensor:
    """Anisotropic inputs far from zero mean."""
    mixing = torch.randn(width, width, generator=generator(seed), dtype=torch.float64)
    scales = torch.logspace(1, -2, width, dtype=torch.float64)
    noise = torch.randn(tokens, width, generator=generator(seed + 1), dtype=torch.float64)
    return noise * scales @ mixing + 3 * torch.randn(width, generator=generator(seed + 2), dtype=torch.float64)


def moments_of(x: Tensor, dtype: torch.dtype = torch.float64) -> Moments:
    moments = Moments(x.shape[-1], dtype)
    moments.add(x)
    return moments


def weighted_error(weight: Tensor, factors: module.Factors, covariance: Tensor) -> float:
    difference = weight.double() - factors.left.double() @ factors.right.double()
    return float((difference @ covariance @ difference.T).trace().clamp_min(0).sqrt())


def oracle_error(weight: Tensor, rank: int, covariance: Tensor) -> float:
    """Brute force: the tail of the singular values of W C^{1/2}."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    return float(torch.linalg.svdvals(weight.double() @ root)[rank:].norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 13])
def test_activation_aware_factors_reach_the_dense_oracle(shape, rank):
    weight = decaying(*shape, ratio=100)
    covariance = moments_of(inputs(500, shape[1])).covariance()
    factors = factorise(weight, rank, covariance)
    oracle = oracle_error(weight, rank, covariance)
    assert weighted_error(weight, factors, covariance) == pytest.approx(oracle, rel=1e-6)
    assert oracle < weighted_error(weight, factorise(weight, rank), covariance)


@pytest.mark.parametrize("shape", SHAPES)
def test_error_on_the_data_itself_is_no_worse_than_plain_svd(shape):
    x = inputs(400, shape[1])
    weight = decaying(*shape, ratio=30)
    moments = moments_of(x)
    errors = {}
    for name, covariance in (("plain", None), ("aware", moments.covariance())):
        left, right = factorise(weight, 6, covariance)
        shift = (weight - left @ right) @ moments.mean()
        errors[name] = float((x @ weight.T - (x @ right.T @ left.T + shift)).norm())
    assert errors["aware"] < 0.9 * errors["plain"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_fewer_tokens_than_channels(shape, tokens):
    """C is singular: the excited directions must be reproduced, and the rest be as plain SVD has it."""
    x = inputs(tokens, shape[1])
    moments = moments_of(x)
    covariance = moments.covariance()
    weight = decaying(*shape, ratio=10)
    rank = 12
    left, right = factorise(weight, rank, covariance)
    torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=torch.float64))
    actual = x @ right.T @ left.T + (weight - left @ right) @ moments.mean()
    torch.testing.assert_close(actual, x @ weight.T, rtol=1e-4, atol=1e-4 * float((x @ weight.T).abs().max()))
    # At most tokens - 1 directions are spoken for; the others catch the most of W that they can.
    tail = float(torch.linalg.svdvals(weight)[rank - tokens + 1 :].norm())
    assert float((weight - left @ right).norm()) <= tail * (1 + 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aware", [False, True])
def test_left_is_orthonormal_and_right_diagonal_descending(shape, dtype, aware):
    weight = decaying(*shape, ratio=1000).to(dtype)
    covariance = moments_of(inputs(100, shape[1])).covariance() if aware else None
    left, right = factorise(weight, 10, covariance)
    assert left.dtype == right.dtype == dtype
    precision = 40 * torch.finfo(dtype).eps
    identity = torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(left.double().T @ left.double(), identity, rtol=0, atol=precision)
    gram = right.double() @ right.double().T
    off_diagonal = gram - torch.diag(gram.diagonal())
    assert float(off_diagonal.abs().max()) < precision * float(gram.max())
    assert bool((gram.diagonal().diff() <= 0).all())


@pytest.mark.parametrize("shape", [(160, 160), (300, 120), (120, 300)])
def test_plain_truncation_is_the_truncated_svd_at_steep_spectra(shape):
    weight = decaying(*shape, ratio=1000).float()
    rank = 100
    left, right = factorise(weight, rank)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    truncated = (u[:, :rank] * s[:rank]) @ vh[:rank]
    product = left.double() @ right.double()
    assert float((product - truncated).norm() / s[rank:].norm()) < 1e-3
    torch.testing.assert_close(right.double().norm(dim=1), s[:rank], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(singular_values(weight), s, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("aware", [False, True])
def test_full_rank_reproduces_the_weight(shape, aware):
    weight = torch.randn(shape, generator=generator())
    covariance = moments_of(inputs(5, shape[1])).covariance() if aware else None
    left, right = factorise(weight, min(shape), covariance)
    torch.testing.assert_close(left @ right, weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_degenerate_weights_and_inputs(shape):
    dead = torch.zeros(shape)
    dead[0, 0] = 2.0
    for covariance in (None, torch.zeros(shape[1], shape[1]), torch.diag(torch.arange(shape[1]) % 2.0)):
        for weight in (torch.zeros(shape), dead):
            left, right = factorise(weight, 5, covariance)
            torch.testing.assert_close(left @ right, weight)
            torch.testing.assert_close(left.T @ left, torch.eye(5), rtol=0, atol=1e-5)


def test_sixteen_bit_weights_give_float32_factors():
    weight = decaying(20, 12, ratio=10).half()
    left, right = factorise(weight, 12)
    assert left.dtype == right.dtype == torch.float32
    torch.testing.assert_close(left @ right, weight.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_squared_singular_values_are_those_of_the_weighted_matrix(shape):
    weight = decaying(*shape, ratio=100)
    covariance = moments_of(inputs(500, shape[1])).covariance()
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    expected = torch.linalg.svdvals(weight @ root).square()
    found = squared_singular_values(weight, covariance)
    assert found.shape == (min(shape),)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected[0]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_moments_are_the_mean_and_the_centred_covariance(dtype, tolerance):
    x = inputs(1000, 16) + 100.0  # a mean far beyond the spread
    moments = Moments(16, dtype)
    for part in x.view(4, 250, 16).split(1):  # batches (1, 250, 16)
        moments.add(part)
    moments.add(x[:0])
    expected = torch.cov(x.T, correction=0)
    assert moments.count == 1000
    torch.testing.assert_close(moments.mean(), x.mean(0), rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
    covariance = moments.covariance()
    torch.testing.assert_close(covariance.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()) * 10)
    assert covariance.dtype == dtype
    torch.testing.assert_close(moments.covariance(consume=True), covariance, rtol=0, atol=0)
    for call in (moments.covariance, lambda: moments.add(x)):
        with pytest.raises(ValueError, match="consumed"):
            call()


def test_moments_leave_their_input_alone_and_are_checked():
    x = inputs(3, 4)
    copy = x.clone()
    moments_of(x)
    assert torch.equal(x, copy)
    empty = Moments(4)
    empty.add(x[:0])
    for call in (empty.mean, empty.covariance):
        with pytest.raises(ValueError, match="no inputs"):
            call()
    with pytest.raises(ValueError, match="expected inputs"):
        empty.add(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="NaN"):
        empty.add(torch.full((2, 4), float("nan")))


@pytest.mark.parametrize("epsilon", [0.3, 0.6, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("shape", SHAPES)
def test_rank_is_the_smallest_that_keeps_epsilon(shape, epsilon):
    weight = decaying(*shape, ratio=50).float()
    squares = torch.linalg.svdvals(weight.double()) ** 2
    by_definition = next(k for k in range(1, len(squares) + 1) if squares[:k].sum() >= epsilon * squares.sum())
    break_even = shape[0] * shape[1] / (shape[0] + shape[1])
    assert rank_at(weight, epsilon) == (by_definition if by_definition < break_even else None)
    left, right = factorise(weight, by_definition)
    kept = float((left @ right).norm() ** 2 / weight.norm() ** 2)
    assert kept >= epsilon - 1e-6


def test_a_layer_beyond_break_even_stays_dense():
    assert rank_at(torch.eye(8), 0.5) is None  # rank 4 = 8 * 8 / 16: no smaller than dense
    assert rank_at(torch.eye(8), 0.37) == 3
    assert rank_at(torch.randn(12, 12, generator=generator()), 1.0) is None


@pytest.mark.parametrize(
    ("rank", "covariance"), [(0, None), (9, None), (3, torch.eye(9)), (3, torch.full((8, 8), float("nan")))]
)
def test_impossible_requests_are_refused(rank, covariance):
    with pytest.raises(ValueError):
        factorise(torch.ones(10, 8), rank, covariance)
    with pytest.raises(ValueError):
        factorise(torch.full((10, 8), float("nan")), 3)
