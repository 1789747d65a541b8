"""A weight in two factors (O, K), (K, I), what is carried along with them, and how both are made orthonormal.

`weight.py` says what is carried, and why, and brings it up to date.

Letters: `L` left, `R` right, `G` = L^T L, `H` = R R^T, `C` Cholesky factor of G.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wasi_edge.subspace.orthonormal import CHUNK_ROWS, gram

MAX_CONDITION = 1e3  # of either Gram matrix: beyond it the pair is made orthonormal again
BREAKDOWN = 5e-4  # over the precision: a condition of either beyond it makes the cheap formulas useless for this step
BREAKDOWN_CONDITION = 1e12  # of G in float64: beyond it Householder reflections take over


@dataclass(slots=True, eq=False)
class WeightFactors:
    """A weight `left @ right` and what is carried along with it.

    Attributes
    ----------
    left : Tensor, shape (O, K), float32 or float64
    right : Tensor, shape (K, I)
    carried : Tensor, shape (2 K + 3, K), all of the same dtype
        One above the other: the inverses of both Gram matrices, `scale`, and the diagonals of both Gram matrices.
    """

    left: Tensor
    right: Tensor
    carried: Tensor

    @property
    def left_inverse(self) -> Tensor:
        """`(left^T left)^{-1}`, (K, K), symmetric. NaN where the matrix is (close to) singular."""
        return self.carried[: self.carried.shape[1]]

    @property
    def right_inverse(self) -> Tensor:
        """The inverse of `right right^T` for `right` with its rows divided by `scale`, (K, K), symmetric; or NaN."""
        rank = self.carried.shape[1]
        return self.carried[rank : 2 * rank]

    @property
    def scale(self) -> Tensor:
        """(K,), lengths of right's rows when they were last measured."""
        return self.carried[-3]

    @property
    def left_squares(self) -> Tensor:
        """(K,), squared lengths of left's columns."""
        return self.carried[-2]

    @property
    def right_squares(self) -> Tensor:
        """(K,), squared lengths of right's rows in units of `scale`."""
        return self.carried[-1]

    @property
    def norm(self) -> float:
        """Frobenius norm of the weight when the pair was last made orthonormal (exactly then)."""
        return float(torch.linalg.vector_norm(self.scale))


def carried_shape(rank: int) -> tuple[int, int]:
    """Shape of `WeightFactors.carried`."""
    return 2 * rank + 3, rank


def weight_factors(left: Tensor, right: Tensor) -> WeightFactors:
    """Return the state of a pair (O, K), (K, I): the same tensors, not copied, with what is carried measured anew.

    In the factors' dtype: meant for pairs that are not far from orthonormal.

    Raises
    ------
    ValueError
        If the factors' shapes or dtypes do not match, or are 16-bit.
    """
    _check_dtype(left, right)
    _check_pair(left, right)
    factors = WeightFactors(left, right, left.new_empty(carried_shape(left.shape[1])))
    _measure(factors)
    return factors


def _measure(factors: WeightFactors) -> None:
    """Fill `carried` from left and right."""
    left_gram, right_gram = factors.left.T @ factors.left, factors.right @ factors.right.T
    scale = right_gram.diagonal().sqrt()
    right_gram /= scale.outer(scale)
    factors.scale.copy_(scale)
    factors.left_squares.copy_(left_gram.diagonal())
    factors.right_squares.copy_(right_gram.diagonal())
    limit = breakdown_condition(left_gram.dtype)
    for products, inverse in ((left_gram, factors.left_inverse), (right_gram, factors.right_inverse)):
        lengths = products.diagonal().sqrt()
        cholesky, info = torch.linalg.cholesky_ex(products / lengths.outer(lengths))
        if int(info) != 0 or not _condition_from(cholesky) <= limit:
            inverse.fill_(torch.nan)
        else:
            inverse.copy_(torch.cholesky_inverse(cholesky).div_(lengths.outer(lengths)))


def start_anew(carried: Tensor, scale: Tensor) -> None:
    """Fill `carried` for a pair that is orthonormal: L^T L = 1, R R^T = diag(scale)^2."""
    rank = carried.shape[1]
    carried.zero_()
    carried[:rank].fill_diagonal_(1.0)
    carried[rank : 2 * rank].fill_diagonal_(1.0)
    carried[-3] = scale
    carried[-2:] = 1.0


def orthonormal_pair(left: Tensor, right: Tensor) -> WeightFactors:
    """Return factors of the same product with `left` orthonormal and `right right^T` diagonal, descending.

    That is the truncated SVD of the product: left = U_K, right = S_K V_K^T, new tensors.

    Parameters
    ----------
    left : Tensor, shape (O, K), O >= K
    right : Tensor, shape (K, I)
        float32 or float64. Either factor may be rank deficient.

    Returns
    -------
    WeightFactors

    Raises
    ------
    ValueError
        If shapes or dtypes do not match, the rank exceeds O, or a factor holds NaN or infinity.

    Notes
    -----
    With `G = C C^T` and the eigenvectors V of `C^T H C`: left+ = L C^{-T} V, right+ = V^T C^T R, both
    products rounded once, from float64 chunks. A second pass follows where cond(G) * 2^-53 is visible in
    the dtype.
    """
    return make_orthonormal(left.clone(), right.clone())


def make_orthonormal(left: Tensor, right: Tensor, carried: Tensor | None = None) -> WeightFactors:
    """`orthonormal_pair` in place: `left` and `right` are overwritten and belong to the result, `carried` too.

    Nothing of their size is allocated (unless `left` is close to rank deficient). What is refused stays as it was.
    """
    _check_dtype(left, right)
    _check_pair(left, right)
    left_gram, right_gram = gram(left), gram(right.T)
    if left.shape[0] < left.shape[1]:
        raise ValueError(f"rank {left.shape[1]} exceeds the {left.shape[0]} rows of the left factor")
    if not bool(left_gram.isfinite().all() and right_gram.isfinite().all()):
        raise ValueError("a factor holds NaN or infinity; go back to the last checkpoint")
    precision = torch.finfo(left.dtype).eps
    for is_second in (False, True):
        if is_second:
            left_gram, right_gram = gram(left), gram(right.T)
        condition = condition_estimate(left_gram)
        is_broken = condition > BREAKDOWN_CONDITION
        if is_broken:
            columns, triangle = torch.linalg.qr(left)
            left.copy_(columns)
            triangle = triangle.double()
        else:
            triangle = torch.linalg.cholesky(left_gram).T
        del left_gram  # of the many (K, K) matrices few are to be alive at once
        core = triangle @ right_gram @ triangle.T
        del right_gram
        core = _symmetric(core)
        squares, rotation = torch.linalg.eigh(core)  # ascending
        squares, rotation = squares.flip(0), rotation.flip(1)
        del core
        left_to_basis = rotation if is_broken else torch.linalg.solve_triangular(triangle, rotation, upper=True)
        _multiply_rows(left, left_to_basis)
        del left_to_basis
        _multiply_rows(right.T, triangle.T @ rotation)
        del triangle, rotation
        if condition * 2.0**-53 < 0.1 * precision:
            break
    factors = WeightFactors(left, right, left.new_empty(carried_shape(left.shape[1])) if carried is None else carried)
    start_anew(factors.carried, squares.clamp_min(0).sqrt())
    return factors


def condition_estimate(left_gram: Tensor) -> float:
    """Return a lower estimate of the condition number of a Gram matrix (K, K), float64; inf where singular.

    The squared ratio of the largest to the smallest diagonal entry of its Cholesky factor: K^3 / 3, no
    eigenvalues.
    """
    cholesky, info = torch.linalg.cholesky_ex(left_gram)
    return float("inf") if int(info) != 0 else _condition_from(cholesky)


def _multiply_rows(tall: Tensor, small: Tensor) -> None:
    """tall <- tall @ small in place, each entry rounded once, a few rows in float64 at a time."""
    for rows in tall.split(CHUNK_ROWS):
        rows.copy_(rows.double() @ small)


def breakdown_condition(dtype: torch.dtype) -> float:
    return BREAKDOWN / torch.finfo(dtype).eps


def _condition_from(cholesky: Tensor) -> float:
    diagonal = cholesky.diagonal()
    return float(diagonal.max() / diagonal.min()) ** 2


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T).mul_(0.5)


def _check_pair(left: Tensor, right: Tensor) -> None:
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"expected factors (O, K) and (K, I), got shapes {tuple(left.shape)} and {tuple(right.shape)}")


def _check_dtype(left: Tensor, right: Tensor) -> None:
    if left.dtype != right.dtype or left.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"expected both factors in float32 or both in float64, got {left.dtype} and {right.dtype}; "
            "widen 16-bit factors first"
        )
