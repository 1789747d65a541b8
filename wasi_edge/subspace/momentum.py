"""Momentum of gradients that arrive as P U^T, in factors of its own.

Momentum is M V^T with M (O, r), V (I, r) orthonormal; a gradient is P U^T with P (O, r'), U (I, r') orthonormal in the
basis of its own batch. Kept in the basis of the newest batch instead, momentum loses at every step what the next batch
does not see: with a basis that follows each batch that is a fifth of its energy, and ten steps of memory become five.
"""

from __future__ import annotations

import torch
from torch import Tensor

# times the precision of the factors, added to the squares of what a basis has beyond another: it may have nothing
_RIDGE = 16


def add_gradient(momentum: Tensor, basis: Tensor, gradient_left: Tensor, gradient_basis: Tensor, beta: float) -> None:
    """Make M V^T the best rank-r approximation of `beta M V^T + (1 - beta) P U^T`, in place.

    With C = V^T U, E = U - V C and S S^T = E^T E (Cholesky) the sum is T B^T, T = [beta M + (1 - beta) P C^T,
    (1 - beta) P S] (O, r + r'), B = [V, E S^{-T}] with orthonormal columns; W (r + r', r) holds the eigenvectors of
    T^T T of its r largest eigenvalues. B W is made orthonormal once more by QR and T W follows it, so that V stays so
    where U brings nothing new and B is not, and the product is exact all the same.

    Parameters
    ----------
    momentum, basis : Tensor, shapes (O, r), (I, r)
        Changed in place, together.
    gradient_left, gradient_basis : Tensor, shapes (O, r'), (I, r')
        Both bases orthonormal; r + r' may exceed I.
    beta : float
        What is left of the old momentum.

    Raises
    ------
    ValueError
        If shapes do not match.
    """
    _check(momentum, basis, gradient_left, gradient_basis)
    rank, overlap = momentum.shape[1], basis.T @ gradient_basis
    new = torch.addmm(gradient_basis, basis, overlap, alpha=-1)  # E (I, r')
    gram = (new.T @ new).double()
    gram.diagonal().add_(_RIDGE * torch.finfo(basis.dtype).eps)
    mixing = torch.linalg.cholesky(gram)
    known = torch.addmm(momentum, gradient_left, overlap.T, beta=beta, alpha=1 - beta)
    wide = torch.cat((known, (1 - beta) * gradient_left @ mixing.to(basis.dtype)), 1)
    directions = torch.linalg.eigh((wide.T @ wide).double()).eigenvectors[:, -rank:]
    into_new = torch.linalg.solve_triangular(mixing.T, directions[rank:], upper=True)
    directions, into_new = directions.to(basis.dtype), into_new.to(basis.dtype)
    turned, triangle = torch.linalg.qr(basis @ directions[:rank] + new @ into_new)
    torch.mm(wide, directions @ triangle.T, out=momentum)
    basis.copy_(turned)


def add_known_part(momentum: Tensor, basis: Tensor, gradient_left: Tensor, gradient_basis: Tensor, beta: float) -> None:
    """Make M `beta M + (1 - beta) P U^T V`, in place: as `add_gradient` with V as it is, for a tenth of the time.

    Raises
    ------
    ValueError
        If shapes do not match.
    """
    _check(momentum, basis, gradient_left, gradient_basis)
    momentum.addmm_(gradient_left, gradient_basis.T @ basis, beta=beta, alpha=1 - beta)


def _check(momentum: Tensor, basis: Tensor, gradient_left: Tensor, gradient_basis: Tensor) -> None:
    if (
        momentum.shape[1] != basis.shape[1]
        or gradient_left.shape[1] != gradient_basis.shape[1]
        or momentum.shape[0] != gradient_left.shape[0]
        or basis.shape[0] != gradient_basis.shape[0]
    ):
        shapes = ", ".join(str(tuple(part.shape)) for part in (momentum, basis, gradient_left, gradient_basis))
        raise ValueError(f"expected momentum (O, r), basis (I, r), gradient (O, r'), its basis (I, r'), got {shapes}")
