"""Slow, obvious twins of `wasi_edge.subspace`: dense matrices, unfoldings, Householder QR. For tests only.

They follow arXiv 2510.09160 as printed and use as much memory as they like. Nothing here imports the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices of 50 rows gain nothing from threads, which wait on one another on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def plain_qr(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix, mode="reduced").Q


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    """Autograd's gradients of `function(*inputs)`."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    return torch.autograd.grad(function(*leaves), leaves, dy)


def subspace_difference(first: Tensor, second: Tensor) -> float:
    """Distance between the projectors onto two orthonormal bases."""
    first, second = first.double(), second.double()
    return float(torch.linalg.matrix_norm(first @ first.T - second @ second.T))


def matrix_with_spectrum(out_features: int, in_features: int, values: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Factors (O, K), (K, I) in float64 of a matrix with these singular values, deliberately not rotated."""
    rank = len(values)
    left = plain_qr(random(out_features, rank, seed=seed))
    right = values[:, None] * plain_qr(random(in_features, rank, seed=seed + 1)).T
    mix = plain_qr(random(rank, rank, seed=seed + 2))
    return left @ mix, mix.T @ right


def dense_wsi_step(
    weight: Tensor, left: Tensor, gradient: Tensor, learning_rate: float, decay: float
) -> tuple[Tensor, Tensor]:
    """The paper's step on the dense weight: returns (W of rank K, orthonormal left)."""
    updated = (1.0 - learning_rate * decay) * weight - learning_rate * gradient
    new_left = plain_qr(updated @ (updated.T @ left))
    return new_left @ (new_left.T @ updated), new_left


def naive_factored_step(
    left: Tensor, right: Tensor, gradient_left: Tensor, basis: Tensor, learning_rate: float, decay: float
) -> tuple[Tensor, Tensor]:
    """The obvious factored step, all in the factors' dtype: Y = W+ W+^T L, one Cholesky-QR, R+ = L+^T W+."""
    c = 1.0 - learning_rate * decay
    q = c * right.T @ (left.T @ left) - learning_rate * basis @ (gradient_left.T @ left)
    y = c * left @ (right @ q) - learning_rate * gradient_left @ (basis.T @ q)
    cholesky, info = torch.linalg.cholesky_ex(y.T @ y)
    if int(info) != 0:
        return torch.full_like(left, torch.nan), right
    new_left = torch.linalg.solve_triangular(cholesky, y.T, upper=False).T
    new_right = c * (new_left.T @ left) @ right - learning_rate * (new_left.T @ gradient_left) @ basis.T
    return new_left, new_right


def dense_momentum_step(
    momentum: Tensor, basis: Tensor | None, gradient: Tensor, beta: float, rank: int
) -> tuple[Tensor, Tensor]:
    """Momentum (O, I) of a subspace of `rank` directions (I, rank): of all that there are, or of `basis` alone where it
    stays."""
    if basis is None:
        left, values, right = torch.linalg.svd(beta * momentum + (1 - beta) * gradient, full_matrices=False)
        return left[:, :rank] * values[:rank] @ right[:rank], right[:rank].T
    return beta * momentum + (1 - beta) * gradient @ basis @ basis.T, basis


def dense_polar_factor(matrix: Tensor, rank: int, floor: float) -> Tensor:
    """Of a matrix (O, I) of so many directions: every singular value one, but those below `floor` of the largest."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * (values / (values + floor * values[0]))[:rank] @ right[:rank]


def unfold(x: Tensor, mode: int) -> Tensor:
    return x.movedim(mode, 0).reshape(x.shape[mode], -1)


def dense_asi_refresh(x: Tensor, mode: int, factor: Tensor) -> Tensor:
    unfolding = unfold(x, mode)
    return plain_qr((unfolding @ unfolding.T) @ factor)


def dense_reconstruction(x: Tensor, factors: tuple[Tensor | None, ...]) -> Tensor:
    """x projected onto the factors' spans, mode by mode, on the unfoldings."""
    for mode, factor in enumerate(factors):
        if factor is not None:
            rest = [size for index, size in enumerate(x.shape) if index != mode]
            x = (factor @ (factor.T @ unfold(x, mode))).reshape(x.shape[mode], *rest).movedim(0, mode)
    return x


def dense_weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def dense_regression(
    x: Tensor, y: Tensor, weight: Tensor, rank: int, shrinkage: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The map (O, I) of rank K and the bias (O,) of `s * (x W^T + b)` nearest to y, shrunk towards W, by definition.

    The map B that minimises sum |y - B x|^2 + rho |B - s W|^2 (centred, rho the mean variance times `shrinkage`), then
    its truncation in the metric of the inputs.
    """
    scale = torch.ones(len(weight), dtype=x.dtype) if scale is None else scale
    inputs, outputs = x - x.mean(0), y - y.mean(0)
    covariance = inputs.T @ inputs / len(x)
    rho = shrinkage * float(covariance.diagonal().mean())
    damped = covariance + rho * torch.eye(x.shape[1], dtype=x.dtype)
    free = (outputs.T @ inputs / len(x) + rho * scale[:, None] * weight) @ torch.linalg.inv(damped)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    left, singular, right = torch.linalg.svd(free @ root, full_matrices=False)
    low = (left[:, :rank] * singular[:rank]) @ right[:rank] @ torch.linalg.pinv(root)
    return low / scale[:, None], (y.mean(0) - low @ x.mean(0)) / scale
