"""Orthonormal bases of tall, thin matrices.

Cholesky-QR: with the Gram matrix `G = X^T X = C C^T`, `Q = X C^{-T}` has orthonormal columns and spans what
`X` spans. It is two matrix products and an (r, r) factorisation, where Householder reflections pass over the
whole matrix column by column. It loses accuracy with the condition of `X`, so here

- the Gram matrix is summed in float64, in chunks (no float64 copy of `X`);
- columns are scaled to unit length first, so that grading alone costs nothing;
- the pass is repeated while the Cholesky diagonal says that the columns were far from orthonormal
  ("CholeskyQR2", Yamamoto et al. 2015);
- Householder QR takes over where Cholesky fails or the columns are nearly dependent (also zero columns): it
  completes the basis with arbitrary orthonormal columns.

Letters: `X` (m, r) input, `Q` (m, r) result, `G` (r, r) Gram matrix, `C` its lower Cholesky factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ROWS = 512
MAX_PASSES = 3
# Ratios of the Cholesky diagonal of the scaled Gram matrix. 1 means orthogonal columns.
REPEAT_RATIO = 2.0
HOUSEHOLDER_RATIO = 1e5
SMALLEST_NORM = 1e-30  # of a column; below it the scaling would overflow in float32


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
    narrow = matrix.dtype not in (torch.float32, torch.float64)
    columns = matrix.float() if narrow else matrix
    for _ in range(MAX_PASSES):
        products = gram(columns)
        if not bool(products.isfinite().all()):
            raise ValueError("cannot orthonormalise a matrix that holds NaN or infinity")
        norms = products.diagonal().sqrt()
        if float(norms.min()) < SMALLEST_NORM:
            columns = _householder(columns)
            break
        cholesky, info = torch.linalg.cholesky_ex(products / norms.outer(norms))
        pivots = cholesky.diagonal()
        ratio = float(pivots.max() / pivots.min()) if int(info) == 0 else float("inf")
        if not ratio < HOUSEHOLDER_RATIO:
            columns = _householder(columns)
            break
        # Q = X diag(1 / norms) C^{-T}
        identity = torch.eye(len(norms), dtype=torch.float64, device=matrix.device)
        inverse = torch.linalg.solve_triangular(cholesky, identity, upper=False).T / norms[:, None]  # (r, r)
        columns = columns @ inverse.to(columns.dtype)
        if ratio < REPEAT_RATIO:
            break
    return columns.to(matrix.dtype)


def _householder(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix, mode="reduced").Q
