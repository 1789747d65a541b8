"""The weight of a linear layer in two factors, and its update without a dense matrix (WSI, arXiv 2510.09160).

A weight `W = L R` is held as `L` (O, K) and `R` (K, I). An optimiser step with learning rate `eta`, decoupled
decay `lambda` and the factored gradient `P U^T` would give `W+ = c L R - eta P U^T`, of rank K + r, with
`c = 1 - eta * lambda`. WSI returns to rank K by one warm-started subspace iteration:

    L+ = basis of span(W+ W+^T L),   R+ = argmin_R ||W+ - L+ R||_F.

The paper forms `W+`. Where we deviate: only the product `L+ R+` matters, so L need not be orthonormal. With
`G = L^T L`, `H = R R^T`, `A = L^T P`, `Q = R U`, `D = P^T P` and `U^T U = I` (required), the same product is

    W+ W+^T L = L A0 + P B0,   A0 = c (c H G - eta Q A^T),   B0 = -eta (c Q^T G - eta A^T)
    L+ = L + P E,              E = B0 A0^{-1}
    R+ = c R + X F,            X = (L+^T L+)^{-1} L+^T P,    F = -(c E R + eta U^T)

Everything here is a change of rank r or 2 r, so what is carried along is not G and H but their inverses, and no
(K, K) matrix is ever factorised or multiplied by another (Sherman, Morrison and Woodbury; f = eta / c):

    a = H^{-1} Q,   b = H^{-1} G^{-1} A,   S = (1 - f b^T Q)^{-1},   C = f^2 (1 - a^T Q) S
    E^T = b C^T - f a,   H E^T = G^{-1} A C^T - f Q,   R F^T = -c^2 G^{-1} A C^T,   H^{-1} R F^T = -c^2 b C^T
    G+ = G + [A, E^T] [[0, 1], [1, D]] [A, E^T]^T,   H+ = c^2 H + [X, R F^T] [[F F^T, 1], [1, 0]] [X, R F^T]^T

H is carried as that of R with its rows divided by `scale`, the singular values when the pair was last made orthonormal.
Both inverses are then close to the identity, whatever the spread of the singular values, and float32 is enough for them
(a test holds the product against a float64 oracle). They drift with L and R: `orthonormal_pair` starts anew, when a
condition is beyond `MAX_CONDITION` and every few hundred steps. L, R and what is carried are one state: they change
together, in `update_weight`, or are made together, in `orthonormal_pair` and `weight_factors`.

Letters: `L` left, `R` right, `G`, `H` Gram matrices, `P` gradient_left, `U` basis, `O` out features, `I` in features,
`K` rank of the weight, `r` rank of the gradient, `c` what decay leaves of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wasi_edge.subspace.factors import WeightFactors, breakdown_condition, start_anew


def update_weight(
    factors: WeightFactors, gradient_left: Tensor, basis: Tensor, learning_rate: float, decay: float
) -> float:
    """Apply one WSI step for the gradient `gradient_left @ basis^T`, in place on all tensors.

    Parameters
    ----------
    factors : WeightFactors
        Changed in place: left (O, K), right (K, I) and what is carried with them, together.
    gradient_left : Tensor, shape (O, r)
    basis : Tensor, shape (I, r)
        Must have orthonormal columns (`orthonormalise`); assumed, not checked. Any r <= I, also r > K.
    learning_rate : float
    decay : float
        Decoupled weight decay; the old weight is multiplied by `1 - learning_rate * decay`.

    Returns
    -------
    float
        A lower estimate of the larger condition of both Gram matrices, that of right with scaled rows: beyond
        `MAX_CONDITION` the pair is due for `orthonormal_pair`.

    Raises
    ------
    ValueError
        If shapes do not match or the gradient holds NaN or infinity; the state is then unchanged.

    Notes
    -----
    Where `A0` is singular (a zero layer, a rank-deficient right factor) one iteration loses directions, and where one
    step changes the weight beyond recognition the inverses lose their digits; the
    state then becomes the best rank-K approximation of W+ (the limit of the iteration), from QR of `[L, P]`
    and `[R; U^T]` and an SVD of their small product. It is slower, and as dense-free.
    """
    left, right = factors.left, factors.right
    gradient_left, basis = gradient_left.to(left.dtype), basis.to(left.dtype)
    _check_gradient(factors, gradient_left, basis)
    c, eta = 1.0 - learning_rate * decay, learning_rate
    A = left.T @ gradient_left  # (K, r)
    Q = right @ basis  # (K, r)
    D = gradient_left.T @ gradient_left  # (r, r)
    if not all(bool(product.isfinite().all()) for product in (A, Q, D)):
        raise ValueError("the gradient, its basis or the weight holds NaN or infinity; nothing was updated")
    step = _Step(factors, A, Q, D, basis, c, eta) if c > 0 else None
    if step is None or not step.condition <= breakdown_condition(left.dtype):
        return _best_approximation_step(factors, gradient_left, basis, c, eta)
    left.addmm_(gradient_left, step.E)
    right.addmm_(step.X, step.F, beta=c)
    step.carry(factors)
    return step.condition


class _Step:
    """E, X and F of the module's formulas, and the larger condition of both Gram matrices after them.

    What comes in stays as it is until `carry`. A hat is a matrix (K, r) with its rows divided by `scale`.
    """

    def __init__(
        self, factors: WeightFactors, A: Tensor, Q: Tensor, D: Tensor, basis: Tensor, c: float, eta: float
    ) -> None:
        f, self._decay = eta / c, c * c
        inverse_scale = factors.scale.reciprocal()[:, None]
        one = torch.eye(A.shape[1], dtype=A.dtype)
        NA = factors.left_inverse @ A
        NA_hat, Q_hat = NA * inverse_scale, Q * inverse_scale
        a_hat, b_hat = torch.hsplit(factors.right_inverse @ torch.cat((Q_hat, NA_hat), 1), 2)  # a, b times scale
        C = f * f * _solved((one - f * (b_hat.T @ Q_hat)).T, one - a_hat.T @ Q_hat).T  # 1 - a^T Q is symmetric
        bC = b_hat @ C.T
        ET = torch.sub(bC, a_hat, alpha=f).mul_(inverse_scale)  # (K, r)
        self.E = ET.T

        ED = ET @ D
        NE = factors.left_inverse @ ET
        ANA, ANE, ENE = A.T @ NA, A.T @ NE, ET.T @ NE
        self._left_change = torch.cat((NA, NE), 1)
        projected = torch.cat((ANA + ANE @ D, ANE.T + ENE @ D))  # [A, E^T]^T G^{-1} (A + E^T D)
        core = _square(ANA - D, ANE + one, ANE.T + one, ENE)
        solved = _solved(core, torch.cat((projected, self._left_change.T), 1))
        self._left_solved = solved[:, len(one) :]
        self.X = torch.addmm(NA, NE, D).addmm_(self._left_change, solved[:, : len(one)], alpha=-1.0)

        self.F = torch.addmm(basis.T, self.E, factors.right, beta=-eta, alpha=-c)  # (r, I), from the old right
        FF = self.F @ self.F.T
        X_hat, RF_hat = self.X * inverse_scale, NA_hat @ C.T * -self._decay
        VX, VRF = factors.right_inverse @ X_hat / self._decay, -bC  # H^{-1} X and H^{-1} R F^T times scale / c^2
        XVRF = X_hat.T @ VRF + one
        self._right_change = torch.cat((VX, VRF), 1)
        core = _square(X_hat.T @ VX, XVRF, XVRF.T, RF_hat.T @ VRF - FF)
        self._right_solved = _solved(core, self._right_change.T)

        self._left_squares = factors.left_squares + (2 * A + ED).mul_(ET).sum(1)
        self._right_squares = self._decay * factors.right_squares + (2 * RF_hat + X_hat @ FF).mul_(X_hat).sum(1)
        self.condition = self._condition(factors)

    def _condition(self, factors: WeightFactors) -> float:
        """Largest diagonal entry of each Gram matrix times that of its inverse: not above their condition."""
        left_lost = (self._left_solved * self._left_change.T).sum(0)
        right_lost = (self._right_solved * self._right_change.T).sum(0)
        left = factors.left_inverse.diagonal() - left_lost
        right = factors.right_inverse.diagonal() / self._decay - right_lost
        diagonals = torch.stack((left, right, self._left_squares, self._right_squares))
        if not (float(diagonals.min()) > 0 and bool(torch.isfinite(self.X.sum() + self.F.sum() + diagonals.sum()))):
            return float("inf")
        left_inverse, right_inverse, left_square, right_square = diagonals.amax(1).tolist()
        return max(left_inverse * left_square, right_inverse * right_square)

    def carry(self, factors: WeightFactors) -> None:
        """Bring what is carried up to date."""
        factors.left_inverse.addmm_(self._left_change, self._left_solved, alpha=-1.0)
        factors.right_inverse.addmm_(self._right_change, self._right_solved, beta=1 / self._decay, alpha=-1.0)
        factors.left_squares.copy_(self._left_squares)
        factors.right_squares.copy_(self._right_squares)


def _square(upper_left: Tensor, upper_right: Tensor, lower_left: Tensor, lower_right: Tensor) -> Tensor:
    return torch.cat((torch.cat((upper_left, upper_right), 1), torch.cat((lower_left, lower_right), 1)))


def _solved(matrix: Tensor, target: Tensor) -> Tensor:
    """matrix^{-1} target; whatever comes of a singular one is found by the caller. An inverse would cost digits."""
    return torch.linalg.solve_ex(matrix, target)[0]


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
    start_anew(factors.carried, values[:rank])
    return 1.0


def _check_gradient(factors: WeightFactors, gradient_left: Tensor, basis: Tensor) -> None:
    rows, columns = factors.left.shape[0], factors.right.shape[1]
    rank = basis.shape[-1]
    if gradient_left.shape != (rows, rank) or basis.shape != (columns, rank) or not 1 <= rank <= columns:
        raise ValueError(
            f"expected a gradient ({rows}, r) and a basis ({columns}, r) with 1 <= r <= {columns}, got "
            f"{tuple(gradient_left.shape)} and {tuple(basis.shape)}"
        )
