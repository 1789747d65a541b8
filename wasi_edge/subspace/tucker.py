"""Activations kept small for the weight gradient (ASI, arXiv 2510.09160): Tucker form, warm-started bases.

The weight gradient of `y = x W^T` is `dW = dy^T x`, so x has to survive from forward to backward. It is kept

    x ~ S x_1 U_1 x_2 U_2 ... x_n U_n,   S = x x_1 U_1^T ... x_n U_n^T

with orthonormal factors `U_m` (n_m, r_m), each refreshed by one warm-started subspace iteration per step,
`U_m <- orth(X_(m) X_(m)^T U_m)`, never forming an (n_m, n_m) matrix. A factor None stands for the identity:
that mode is not compressed. One implementation serves any number of modes (ViT: 3, Swin: 4).

Where we deviate from the paper:

- The gradient is returned as `P` with `dW ~ P U_n^T`: the last mode is not multiplied out, so neither a dense
  dW nor the reconstructed x exists. Clipping needs no more: `||P U_n^T||_F = ||P||_F`.
- `refresh_basis` may weight tokens: `U <- orth(x^T diag(w) x U)` with w the mean of |dy|^2 there: what
  matters is the error of `dy^T x` and not of x.

Letters: `x` activations, `S` core, `U` factor or basis, `I` in features (size of the last mode), `O` out
features, `T` tokens, `r` ranks, `P` the left part of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wasi_edge.subspace.orthonormal import gram, orthonormalise
from wasi_edge.subspace.ranks import rank_for_explained_variance

CHUNK_COLUMNS = 256


class Tucker(NamedTuple):
    """A tensor as a core and one factor a mode; None where a mode is not compressed.

    Attributes
    ----------
    core : Tensor, shape (r_1, ..., r_n), with r_m = n_m where factor m is None
    factors : tuple of (Tensor of shape (n_m, r_m), orthonormal columns) or None, one a mode
    """

    core: Tensor
    factors: tuple[Tensor | None, ...]


def initial_basis(features: int, rank: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a random orthonormal basis (features, rank), drawn from the generator, on its device.

    Raises
    ------
    ValueError
        If not 1 <= rank <= features.
    """
    if not 1 <= rank <= features:
        raise ValueError(f"expected a rank between 1 and {features} features, got {rank}")
    draws = torch.randn(features, rank, generator=generator, dtype=dtype, device=generator.device)
    return orthonormalise(draws)


def refresh_basis(x: Tensor, basis: Tensor, token_weight: Tensor | None = None, iterations: int = 1) -> Tensor:
    """Return `orth(x^T diag(w) x U)`, a warm-started subspace iteration on the last mode.

    Parameters
    ----------
    x : Tensor, shape (T, I)
    basis : Tensor, shape (I, r)
        The last step's basis, kept unchanged.
    token_weight : Tensor, shape (T,), optional
        Not negative; only its proportions matter. None weighs all tokens alike.
    iterations : int
        At least 1.

    Returns
    -------
    Tensor, shape (I, r), orthonormal columns

    Raises
    ------
    ValueError
        If shapes do not match or iterations is below 1.
    """
    _check_tokens(x, basis)
    if token_weight is not None and token_weight.shape != x.shape[:1]:
        raise ValueError(f"expected a weight for each of {len(x)} tokens, got {tuple(token_weight.shape)}")
    if iterations < 1:
        raise ValueError(f"expected at least 1 iteration, got {iterations}")
    for _ in range(iterations):
        projected = x @ basis  # (T, r)
        if token_weight is not None:
            projected *= token_weight[:, None]
        basis = orthonormalise(x.T @ projected)
    return basis


def refresh_factors(x: Tensor, factors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the factors after one warm-started subspace iteration in every compressed mode.

    Parameters
    ----------
    x : Tensor, shape (n_1, ..., n_m)
    factors : sequence of (Tensor, shape (n_m, r_m)) or None, one a mode

    Raises
    ------
    ValueError
        If a factor does not fit its mode.
    """
    _check_factors(x.shape, factors)
    return tuple(
        None if factor is None else orthonormalise(_unfolding_times_its_transpose(x, mode, factor))
        for mode, factor in enumerate(factors)
    )


def compress(x: Tensor, factors: Sequence[Tensor | None]) -> Tucker:
    """Project x (n_1, ..., n_m) onto the factors; exact where x lies in their span.

    Raises
    ------
    ValueError
        If a factor does not fit its mode.
    """
    _check_factors(x.shape, factors)
    shrinking = sorted(_compressed(factors), key=lambda item: item[1].shape[1] / item[1].shape[0])
    return Tucker(_mode_products(x, ((mode, factor) for mode, factor in shrinking)), tuple(factors))


def reconstruct(tucker: Tucker) -> Tensor:
    """Return the dense tensor (n_1, ..., n_m)."""
    return _mode_products(tucker.core, ((mode, factor.T) for mode, factor in _compressed(tucker.factors)))


def weight_gradient(dy: Tensor, tucker: Tucker) -> Tensor:
    """Return P (O, r_last) with `dy^T x ~ P U_last^T`, without reconstructing x.

    Parameters
    ----------
    dy : Tensor, shape (n_1, ..., n_{m-1}, O)
        Gradient of the layer's output.
    tucker : Tucker
        Of the layer's input (n_1, ..., n_{m-1}, I).

    Returns
    -------
    Tensor, shape (O, r_last)
        Where the last mode is not compressed r_last is I and P is the dense gradient.

    Raises
    ------
    ValueError
        If the leading modes of dy do not match.

    Notes
    -----
    The leading factors are applied either to dy, which shrinks, or to the core, which grows to the size
    (n_1, ..., n_{m-1}, r_last) at most: whichever takes fewer multiplications.
    """
    core, factors = tucker
    _check_leading_modes(dy, tucker)
    leading = _compressed(factors[:-1])
    if leading:
        expanding = [(mode, factor.T) for mode, factor in leading]
        cost_on_dy = _cost(dy.shape, leading) + dy.shape[-1] * core.numel()
        cost_on_core = _cost(core.shape, expanding) + dy.numel() * core.shape[-1]
        if cost_on_dy <= cost_on_core:
            dy = _mode_products(dy, leading)
        else:
            core = _mode_products(core, expanding)
    return dy.reshape(-1, dy.shape[-1]).T @ core.reshape(-1, core.shape[-1])


def saved_bytes(tucker: Tucker) -> int:
    """Return the bytes that the core and the factors hold."""
    return tucker.core.nbytes + sum(factor.nbytes for _, factor in _compressed(tucker.factors))


def mode_ranks(x: Tensor, epsilon: float) -> tuple[int, ...]:
    """Return for each mode of x the smallest rank that explains `epsilon` of its variance.

    From the float64 eigenvalues of each unfolding's smaller Gram matrix; for calibration, not for steps.

    Raises
    ------
    ValueError
        If epsilon does not lie in (0, 1].
    """
    ranks = []
    for mode in range(x.ndim):
        unfolding = x.movedim(mode, 0).reshape(x.shape[mode], -1)
        rows, columns = unfolding.shape
        eigenvalues = torch.linalg.eigvalsh(gram(unfolding if columns <= rows else unfolding.T))
        precision = max(torch.finfo(x.dtype).eps ** 2, torch.finfo(torch.float64).eps)
        noise = len(eigenvalues) * precision * float(eigenvalues[-1])
        eigenvalues = torch.where(eigenvalues > noise, eigenvalues, torch.zeros_like(eigenvalues))
        ranks.append(rank_for_explained_variance(eigenvalues.sqrt().cpu().numpy(), epsilon))
    return tuple(ranks)


def gradient_error(dy: Tensor, x: Tensor, basis: Tensor) -> float:
    """Return `||dy^T x (I - U U^T)||_F / ||dy^T x||_F`, the relative error of dW at this basis.

    Parameters
    ----------
    dy : Tensor, shape (T, O)
    x : Tensor, shape (T, I)
    basis : Tensor, shape (I, r), orthonormal columns

    Returns
    -------
    float
        Between 0 and 1; 0 for a zero gradient. Computed some output features at a time.

    Raises
    ------
    ValueError
        If the shapes do not match.
    """
    _check_tokens(x, basis)
    if dy.ndim != 2 or len(dy) != len(x):
        raise ValueError(f"expected dy ({len(x)}, O), got {tuple(dy.shape)}")
    lost = total = 0.0
    for columns in dy.split(CHUNK_COLUMNS, dim=1):
        gradient = columns.T @ x  # (O', I)
        total += float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2
        gradient.addmm_(gradient @ basis, basis.T, alpha=-1.0)
        lost += float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2
    return math.sqrt(lost / total) if total > 0.0 else 0.0


def _mode_products(tensor: Tensor, matrices: Iterable[tuple[int, Tensor]]) -> Tensor:
    """Multiply each given mode by the transpose of a matrix (n_m, r_m): size n_m becomes r_m."""
    for mode, matrix in matrices:
        tensor = torch.tensordot(tensor, matrix, dims=([mode], [0])).movedim(-1, mode)
    return tensor


def _unfolding_times_its_transpose(x: Tensor, mode: int, factor: Tensor) -> Tensor:
    """Return `X_(m) X_(m)^T U_m` (n_m, r_m)."""
    projected = torch.tensordot(x, factor, dims=([mode], [0]))  # (all other modes, r_m)
    others = [other for other in range(x.ndim) if other != mode]
    return torch.tensordot(x, projected, dims=(others, list(range(x.ndim - 1))))


def _compressed(factors: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
    return [(mode, factor) for mode, factor in enumerate(factors) if factor is not None]


def _cost(shape: Sequence[int], matrices: Iterable[tuple[int, Tensor]]) -> int:
    """Count the multiplications of `_mode_products`."""
    sizes, total = list(shape), 0
    for mode, matrix in matrices:
        total += math.prod(sizes) * matrix.shape[1]
        sizes[mode] = matrix.shape[1]
    return total


def _check_tokens(x: Tensor, basis: Tensor) -> None:
    if x.ndim != 2 or basis.ndim != 2 or x.shape[1] != basis.shape[0]:
        raise ValueError(f"expected x (T, I) and a basis (I, r), got {tuple(x.shape)}, {tuple(basis.shape)}")


def _check_factors(shape: Sequence[int], factors: Sequence[Tensor | None]) -> None:
    if len(factors) != len(shape):
        raise ValueError(f"expected a factor or None for each of {len(shape)} modes, got {len(factors)}")
    for mode, factor in _compressed(factors):
        if factor.ndim != 2 or factor.shape[0] != shape[mode] or not 1 <= factor.shape[1] <= shape[mode]:
            raise ValueError(
                f"expected a factor ({shape[mode]}, r) with 1 <= r <= {shape[mode]} for mode {mode}, "
                f"got {tuple(factor.shape)}"
            )


def _check_leading_modes(dy: Tensor, tucker: Tucker) -> None:
    sizes = [
        core_size if factor is None else factor.shape[0]
        for core_size, factor in zip(tucker.core.shape, tucker.factors, strict=True)
    ]
    if list(dy.shape[:-1]) != sizes[:-1]:
        raise ValueError(f"expected dy with leading modes {sizes[:-1]}, got shape {tuple(dy.shape)}")
