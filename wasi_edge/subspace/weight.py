"""The weight of a linear layer in two factors, and its update without a dense matrix (WSI, arXiv 2510.09160).

A weight `W = L R` is held as `L` (O, K) and `R` (K, I). An optimiser step with learning rate `eta`, decoupled
decay `lambda` and the factored gradient `P U^T` would give `W+ = c L R - eta P U^T`, of rank K + r, with
`c = 1 - eta * lambda`. WSI returns to rank K by one warm-started subspace iteration:

    L+ = basis of span(W+ W+^T L),   R+ = argmin_R ||W+ - L+ R||_F.

The paper forms `W+`. Where we deviate: only the product `L+ R+` matters, so L need not be orthonormal, and
with `G = L^T L` and `H = R R^T` carried along the same product costs O(K r (O + I)) + K^3. With `A = L^T P`,
`Q = R U`, `D = P^T P` and `U^T U = I` (required: both `A0` and `H+` use it),

    W+ W+^T L = L A0 + P B0,   A0 = c (c H G - eta Q A^T),   B0 = -eta (c Q^T G - eta A^T)
    L+ = L + P E,              E = B0 A0^{-1}
    R+ = c R + X F,            X = (L+^T L+)^{-1} L+^T P,    F = -(c E R + eta U^T)

and G+, H+ follow by expanding `L+^T L+` and `R+ R+^T`. The (K, K) and (r, K) algebra is float64, the products
with an O or an I in them have the factors' dtype. L, R, G and H are one state: they change together, in
`update_weight`, or are made together, in `orthonormal_pair` and `weight_factors`.

L drifts from orthonormal; rebuild with `orthonormal_pair` when its condition is beyond `MAX_CONDITION` and every few
hundred steps. It also rotates the pair until H is diagonal: row j of R then has length s_j, so that rounding
in float32 is relative to each singular direction and not to the largest one.

Letters: `L` left, `R` right, `G` left_gram, `H` right_gram, `P` gradient_left, `U` basis, `O` out features,
`I` in features, `K` rank of the weight, `r` rank of the gradient, `c` what decay leaves of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wasi_edge.subspace.orthonormal import CHUNK_ROWS, gram

MAX_CONDITION = 1e3  # of G: beyond it the pair is made orthonormal again
BREAKDOWN_CONDITION = 1e12  # of G+: beyond it the cheap formulas are not used for this step


@dataclass(slots=True, eq=False)
class WeightFactors:
    """A weight `left @ right` with the Gram matrices of its factors.

    Attributes
    ----------
    left : Tensor, shape (O, K), float32 or float64
    right : Tensor, shape (K, I), same dtype
    left_gram : Tensor, shape (K, K), float64
        `left^T left`, symmetric.
    right_gram : Tensor, shape (K, K), float64
        `right right^T`, symmetric.
    """

    left: Tensor
    right: Tensor
    left_gram: Tensor
    right_gram: Tensor


def grams(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return `left^T left` and `right right^T`, both (K, K) float64, for left (O, K) and right (K, I).

    Summed in float64 a few hundred rows at a time; no float64 copy of a whole factor is made.

    Raises
    ------
    ValueError
        If the factors' shapes do not match.
    """
    _check_pair(left, right)
    return gram(left), gram(right.T)


def pack_grams(left_gram: Tensor, right_gram: Tensor, out: Tensor | None = None) -> Tensor:
    """Return two symmetric matrices (K, K) in one of (K, K + 1): half the memory of holding both.

    On and below the diagonal stands the left one; above it, one column to the right, the upper triangle of
    the right one. `out` is filled and returned if given.
    """
    rank = left_gram.shape[0]
    packed = left_gram.new_empty(rank, rank + 1) if out is None else out
    packed[:, :rank].copy_(left_gram.tril())
    packed[:, rank].zero_()
    packed[:, 1:].add_(right_gram.triu())  # where there is nothing yet but zeros
    return packed


def unpack_grams(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left and the right Gram matrix (K, K) of `pack_grams`, exactly as they were."""
    left_gram, right_gram = packed[:, :-1].tril(), packed[:, 1:].triu()
    return left_gram.add_(left_gram.tril(-1).T), right_gram.add_(right_gram.triu(1).T)


def weight_factors(left: Tensor, right: Tensor) -> WeightFactors:
    """Return the state of a pair (O, K), (K, I): the same tensors, not copied, and their Gram matrices.

    Raises
    ------
    ValueError
        If the factors' shapes or dtypes do not match, or are 16-bit.
    """
    _check_dtype(left, right)
    return WeightFactors(left, right, *grams(left, right))


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


def make_orthonormal(left: Tensor, right: Tensor) -> WeightFactors:
    """`orthonormal_pair` in place: `left` and `right` are overwritten and belong to the result.

    Nothing of their size is allocated (unless `left` is close to rank deficient). What is refused stays as it was.
    """
    _check_dtype(left, right)
    left_gram, right_gram = grams(left, right)
    if left.shape[0] < left.shape[1]:
        raise ValueError(f"rank {left.shape[1]} exceeds the {left.shape[0]} rows of the left factor")
    if not bool(left_gram.isfinite().all() and right_gram.isfinite().all()):
        raise ValueError("a factor holds NaN or infinity; go back to the last checkpoint")
    precision = torch.finfo(left.dtype).eps
    for _ in range(2):
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
        rotation = torch.linalg.eigh(core).eigenvectors.flip(1)  # eigh ascends
        del core
        left_to_basis = rotation if is_broken else torch.linalg.solve_triangular(triangle, rotation, upper=True)
        _multiply_rows(left, left_to_basis)
        del left_to_basis
        _multiply_rows(right.T, triangle.T @ rotation)
        del triangle, rotation
        left_gram, right_gram = grams(left, right)
        if condition * 2.0**-53 < 0.1 * precision:
            break
    return WeightFactors(left, right, left_gram, right_gram)


def update_weight(
    factors: WeightFactors, gradient_left: Tensor, basis: Tensor, learning_rate: float, decay: float
) -> float:
    """Apply one WSI step for the gradient `gradient_left @ basis^T`, in place on all four tensors.

    Parameters
    ----------
    factors : WeightFactors
        Changed in place: left (O, K), right (K, I) and both Gram matrices, together.
    gradient_left : Tensor, shape (O, r)
    basis : Tensor, shape (I, r)
        Must have orthonormal columns (`orthonormalise`); assumed, not checked. Any r <= I, also r > K.
    learning_rate : float
    decay : float
        Decoupled weight decay; the old weight is multiplied by `1 - learning_rate * decay`.

    Returns
    -------
    float
        `condition_estimate` of the new left Gram matrix: beyond `MAX_CONDITION` the pair is due for
        `orthonormal_pair`.

    Raises
    ------
    ValueError
        If shapes do not match or the gradient holds NaN or infinity; the state is then unchanged.

    Notes
    -----
    Where `A0` is singular (a zero layer, a rank-deficient right factor) one iteration loses directions; the
    state then becomes the best rank-K approximation of W+ (the limit of the iteration), from QR of `[L, P]`
    and `[R; U^T]` and an SVD of their small product. It is slower, and as dense-free.
    """
    left, right = factors.left, factors.right
    gradient_left, basis = gradient_left.to(left.dtype), basis.to(left.dtype)
    _check_gradient(factors, gradient_left, basis)
    c, eta = 1.0 - learning_rate * decay, learning_rate
    G, H = factors.left_gram, factors.right_gram
    A = (left.T @ gradient_left).double()  # (K, r)
    Q = (right @ basis).double()  # (K, r)
    D = gram(gradient_left)  # (r, r)
    if not all(bool(product.isfinite().all()) for product in (A, Q, D)):
        raise ValueError("the gradient, its basis or the weight holds NaN or infinity; nothing was updated")

    # in place where it can be: of the many (K, K) matrices few are to be alive at once
    A0 = (H @ G).mul_(c).addmm_(Q, A.T, alpha=-eta).mul_(c)
    E = _solve_from_right(A0, -eta * (c * (Q.T @ G) - eta * A.T))  # (r, K)
    del A0
    if E is None:
        return _best_approximation_step(factors, gradient_left, basis, c, eta)
    G_new = torch.addmm(G, A, E).addmm_(E.T, A.T).addmm_(E.T @ D, E)
    G_new = _symmetric(G_new)
    cholesky, info = torch.linalg.cholesky_ex(G_new)
    condition = _condition_from(cholesky)
    if int(info) != 0 or not condition <= BREAKDOWN_CONDITION:
        return _best_approximation_step(factors, gradient_left, basis, c, eta)
    X = torch.cholesky_solve(A + E.T @ D, cholesky)  # (K, r)
    del cholesky
    HE = H @ E.T  # (K, r)
    RF = -c * (c * HE + eta * Q)  # (K, r)
    EQ = E @ Q
    FF = c * c * (E @ HE) + c * eta * (EQ + EQ.T)  # (r, r)
    FF.diagonal().add_(eta * eta)
    H_new = (c * c * H).addmm_(X, RF.T).addmm_(RF, X.T).addmm_(X @ FF, X.T)
    H_new = _symmetric(H_new)

    F = torch.addmm(basis.T, E.to(right.dtype), right, beta=-eta, alpha=-c)  # (r, I), from the old right
    left.addmm_(gradient_left, E.to(left.dtype))
    right.addmm_(X.to(right.dtype), F, beta=c)
    factors.left_gram.copy_(G_new)
    factors.right_gram.copy_(H_new)
    return condition


def condition_estimate(left_gram: Tensor) -> float:
    """Return a lower estimate of the condition number of a Gram matrix (K, K), float64; inf where singular.

    The squared ratio of the largest to the smallest diagonal entry of its Cholesky factor: K^3 / 3, no
    eigenvalues.
    """
    cholesky, info = torch.linalg.cholesky_ex(left_gram)
    return float("inf") if int(info) != 0 else _condition_from(cholesky)


def momentum_to_new_basis(momentum: Tensor, old_basis: Tensor, new_basis: Tensor) -> Tensor:
    """Return a momentum (O, r) kept as `momentum @ old_basis^T`, projected onto `new_basis` (I, r').

    What lies outside the new basis is lost (0.1-7 % a step in training), so this is not exact momentum.

    Raises
    ------
    ValueError
        If the shapes do not match.
    """
    if momentum.shape[1] != old_basis.shape[1] or old_basis.shape[0] != new_basis.shape[0]:
        raise ValueError(
            "expected momentum (O, r), old basis (I, r), new basis (I, r'), got "
            f"{tuple(momentum.shape)}, {tuple(old_basis.shape)}, {tuple(new_basis.shape)}"
        )
    return momentum @ (old_basis.T @ new_basis)


def _solve_from_right(matrix: Tensor, target: Tensor) -> Tensor | None:
    """Return `target @ matrix^{-1}`, or None where a pivot is zero (near zero: the caller sees it in G+).

    Rows are scaled first: those of A0 are graded like s_j^2, which is no defect.
    """
    scale = torch.linalg.vector_norm(matrix, ord=float("inf"), dim=1)
    if not float(scale.min()) > 0.0:
        return None
    factored, pivots, info = torch.linalg.lu_factor_ex(matrix / scale[:, None])
    if int(info) != 0:
        return None
    return torch.linalg.lu_solve(factored, pivots, target, left=False) / scale


def _best_approximation_step(
    factors: WeightFactors, gradient_left: Tensor, basis: Tensor, c: float, eta: float
) -> float:
    """Replace the state by the best rank-K approximation of `c L R - eta P U^T`, orthonormal on the left.

    Returns the condition of the new left Gram matrix, 1.
    """
    rank = factors.left.shape[1]
    columns, core_left = torch.linalg.qr(torch.cat([factors.left, gradient_left], dim=1))
    rows, core_right = torch.linalg.qr(torch.cat([factors.right.T * c, basis * -eta], dim=1))
    outer, values, inner = torch.linalg.svd(core_left.double() @ core_right.double().T, full_matrices=False)
    if len(values) < rank:
        raise ValueError(f"rank {rank} exceeds a dimension of the weight, {len(values)}")
    dtype = factors.left.dtype
    factors.left.copy_(columns @ outer[:, :rank].to(dtype))
    factors.right.copy_((values[:rank, None] * inner[:rank]).to(dtype) @ rows.T)
    left_gram, right_gram = grams(factors.left, factors.right)
    factors.left_gram.copy_(left_gram)
    factors.right_gram.copy_(right_gram)
    return 1.0


def _multiply_rows(tall: Tensor, small: Tensor) -> None:
    """tall <- tall @ small in place, each entry rounded once, a few rows in float64 at a time."""
    for rows in tall.split(CHUNK_ROWS):
        rows.copy_(rows.double() @ small)


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


def _check_gradient(factors: WeightFactors, gradient_left: Tensor, basis: Tensor) -> None:
    rows, columns = factors.left.shape[0], factors.right.shape[1]
    rank = basis.shape[-1]
    if gradient_left.shape != (rows, rank) or basis.shape != (columns, rank) or not 1 <= rank <= columns:
        raise ValueError(
            f"expected a gradient ({rows}, r) and a basis ({columns}, r) with 1 <= r <= {columns}, got "
            f"{tuple(gradient_left.shape)} and {tuple(basis.shape)}"
        )
