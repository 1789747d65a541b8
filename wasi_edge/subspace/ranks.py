"""How many singular directions to keep, and when factors are smaller than the matrix.

A matrix `W` (out, in) with singular values `s_1 >= s_2 >= ...` keeps the smallest `K` with
`sum_{j<=K} s_j^2 >= epsilon * sum_j s_j^2` (explained variance, arXiv 2510.09160, section 3.2). Its factors
`L` (out, K) and `R` (K, in) hold `K * (out + in)` numbers; from `K = out * in / (out + in)` on they cost more
than they save, and the layer is kept dense.

This module imports no torch: the planner uses it before torch may be loaded.
Letters: `K` rank, `O` out features, `I` in features, `s` singular values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def rank_for_explained_variance(singular_values: ArrayLike, epsilon: float) -> int:
    """Return the smallest rank whose leading singular values explain `epsilon` of the variance.

    Parameters
    ----------
    singular_values : array_like, shape (n,)
        Singular values (not squared), in any order, n >= 1.
    epsilon : float
        Share of `sum s^2` to keep, 0 < epsilon <= 1.

    Returns
    -------
    int
        Between 1 and n; 1 for a zero matrix. At epsilon = 1 trailing zeros are dropped.

    Raises
    ------
    ValueError
        For an epsilon outside (0, 1], or values that are empty, not one-dimensional or not finite.
    """
    if not 0.0 < epsilon <= 1.0:
        raise ValueError(f"epsilon must lie in (0, 1], got {epsilon}")
    values = np.abs(np.asarray(singular_values, dtype=np.float64))
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"expected a non-empty vector of finite singular values, got shape {values.shape}"
            + ("" if values.size == 0 else f", largest {values.max()}")
        )
    largest = values.max()
    if largest == 0.0:
        return 1
    explained = np.cumsum(np.sort(values / largest)[::-1] ** 2)  # scaled: squares cannot overflow
    return int(np.searchsorted(explained, epsilon * explained[-1], side="left")) + 1


def break_even_rank(out_features: int, in_features: int) -> int:
    """Return the largest rank at which factors are smaller than the dense matrix, at least 1.

    Raises
    ------
    ValueError
        If a dimension is below 1.
    """
    if out_features < 1 or in_features < 1:
        raise ValueError(f"expected positive dimensions, got ({out_features}, {in_features})")
    return max(1, (out_features * in_features - 1) // (out_features + in_features))


def is_factored_smaller(rank: int, out_features: int, in_features: int) -> bool:
    """Tell whether factors of this rank hold fewer numbers than the dense (out, in) matrix."""
    return rank * (out_features + in_features) < out_features * in_features
