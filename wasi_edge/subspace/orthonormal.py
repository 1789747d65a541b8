"""Orthonormal bases of tall, thin matrices, and Gram matrices in float64.

Bases come from LAPACK's Householder QR. Cholesky-QR (two products and an (r, r) factorisation), which is often said to
be the faster one, took 1.3 to 2.3 times as long for r = 32 once its Gram matrix is summed in float64, and needs a
second pass where columns are far from orthogonal; the figures are in notes/LOG.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ROWS = 512


def gram(matrix: Tensor) -> Tensor:
    """Return `matrix^T matrix` (r, r) in float64 for a matrix (m, r), converting a few rows at a time."""
    if matrix.dtype == torch.float64:
        return matrix.T @ matrix
    total = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in matrix.split(CHUNK_ROWS):
        wide = rows.double()
        total.addmm_(wide.T, wide)
    return total


def orthonormalise(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis of the column space of a tall matrix.

    Parameters
    ----------
    matrix : Tensor, shape (m, r), m >= r >= 1
        Any real floating dtype; 16-bit input is computed in float32. May be rank deficient.

    Returns
    -------
    Tensor, shape (m, r), same dtype
        Orthonormal columns. The leading columns span those of `matrix`; where the matrix is rank deficient,
        the missing directions are arbitrary but orthonormal.

    Raises
    ------
    ValueError
        If the matrix is not two-dimensional, is wider than tall, or holds NaN or infinity.
    """
    if matrix.ndim != 2 or not 1 <= matrix.shape[1] <= matrix.shape[0]:
        raise ValueError(f"expected a matrix (m, r) with m >= r >= 1, got shape {tuple(matrix.shape)}")
    if not bool(matrix.isfinite().all()):
        raise ValueError("cannot orthonormalise a matrix that holds NaN or infinity")
    narrow = matrix.dtype not in (torch.float32, torch.float64)
    columns = torch.linalg.qr(matrix.float() if narrow else matrix, mode="reduced").Q
    return columns.to(matrix.dtype).contiguous()
