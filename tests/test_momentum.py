"""Momentum in a subspace of its own against its dense twin, the truncated SVD of what it stands for."""

from __future__ import annotations

import pytest
import torch
from reference import dense_momentum_step, generator, plain_qr, random, relative_difference
from torch import Tensor

from wasi_edge.subspace.momentum import add_gradient, add_known_part

OUT, IN, RANK, BETA = 18, 14, 4, 0.9


def gradient(seed: int, rank: int = RANK, inner: int = IN) -> tuple[Tensor, Tensor]:
    """P (O, r) whose directions differ in size, U (I, r)."""
    sizes = torch.logspace(0, -1.5, rank, dtype=torch.float64)
    return random(OUT, rank, seed=seed) * sizes, plain_qr(random(inner, rank, seed=seed + 1))


def is_orthonormal(basis: Tensor, tolerance: float) -> bool:
    error = basis.T @ basis - torch.eye(basis.shape[1], dtype=basis.dtype)
    return float(error.abs().max()) < tolerance


@pytest.mark.parametrize("rank", [4, 9])  # of a gradient and momentum together: fewer and more than there are inputs
def test_it_follows_the_truncated_svd_step_by_step(rank):
    momentum, basis = gradient(0, rank)
    dense = momentum @ basis.T
    for step in range(1, 6):
        left, directions = gradient(10 * step, rank)
        dense, _ = dense_momentum_step(dense, None, left @ directions.T, BETA, rank)
        add_gradient(momentum, basis, left, directions, BETA)
        assert relative_difference(momentum @ basis.T, dense) < 1e-12
        assert is_orthonormal(basis, 1e-13)


def test_between_moves_what_the_basis_sees_is_added():
    momentum, basis = gradient(0)
    dense, kept = momentum @ basis.T, basis.clone()
    for step in range(1, 4):
        left, directions = gradient(10 * step)
        dense, _ = dense_momentum_step(dense, kept, left @ directions.T, BETA, RANK)
        add_known_part(momentum, basis, left, directions, BETA)
        assert torch.equal(basis, kept)
        assert relative_difference(momentum @ basis.T, dense) < 1e-13


def test_gradients_in_its_own_subspace_of_lower_rank_or_zero_leave_the_basis_orthonormal():
    momentum, basis = gradient(0)
    others = [
        (gradient(10)[0], basis.clone()),
        (torch.zeros(OUT, RANK, dtype=torch.float64), gradient(20)[1]),
        (gradient(30)[0] * torch.tensor([1.0, 0, 0, 0]), gradient(30)[1]),
    ]
    for left, directions in others:
        dense, _ = dense_momentum_step(momentum @ basis.T, None, left @ directions.T, BETA, RANK)
        add_gradient(momentum, basis, left, directions, BETA)
        assert relative_difference(momentum @ basis.T, dense) < 1e-12
        assert is_orthonormal(basis, 1e-13)


def test_a_momentum_that_is_zero_takes_the_first_gradient():
    momentum, basis = torch.zeros(OUT, RANK, dtype=torch.float64), gradient(0)[1]
    left, directions = gradient(10)
    add_gradient(momentum, basis, left, directions, BETA)
    assert relative_difference(momentum @ basis.T, (1 - BETA) * left @ directions.T) < 1e-13


def test_rounding_does_not_add_up_over_a_thousand_steps():
    momentum, basis = (part.float() for part in gradient(0))
    generated = generator(1)
    for _ in range(1000):
        left = torch.randn(OUT, RANK, generator=generated)
        directions = plain_qr(basis + 0.3 * torch.randn(IN, RANK, generator=generated))
        before = momentum.double() @ basis.double().T
        dense, _ = dense_momentum_step(before, None, left.double() @ directions.double().T, BETA, RANK)
        add_gradient(momentum, basis, left, directions, BETA)
    assert is_orthonormal(basis, 1e-5)
    assert relative_difference(momentum @ basis.T, dense) < 1e-4


@pytest.mark.parametrize("add", [add_gradient, add_known_part])
def test_shapes_that_do_not_match_are_refused(add):
    momentum, basis = gradient(0)
    with pytest.raises(ValueError, match=r"expected momentum \(O, r\)"):
        add(momentum, basis, gradient(10, inner=IN - 1)[0], gradient(10, inner=IN - 1)[1], BETA)
