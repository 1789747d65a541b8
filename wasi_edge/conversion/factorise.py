"""A dense weight into factors: how many, and which ones.

Plain truncated SVD keeps what is large in W. What matters is what is large in W x: with the inputs'
covariance C, the factors made here minimise

    || (W - L R) C^{1/2} ||_F ,   so L = the K leading left singular vectors of W C^{1/2}, R = L^T W.

C is centred: what the truncation shifts is for the bias to take up (`regression.py`).

How: singular vectors come from a float64 eigendecomposition of the *smaller* Gram matrix, W C W^T
(O, O) where O <= I, else C^{1/2} W^T W C^{1/2} (I, I). Squaring costs half the digits, which float64 has
to spare: at s_1 / s_K = 1000 the squares span 10^6 of 10^16. Neither step inverts or factorises C by
Cholesky, so that a singular C (fewer tokens than channels, dead channels) needs no special case.

Where we deviate from the formula: C gets 1e-10 of its mean diagonal added. Directions that the
calibration photos never excite are thereby ordered as plain SVD orders them, instead of at random.

Letters: `W` weight (O, I), `L` left (O, K), `R` right (K, I), `C` covariance (I, I), `T` tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wasi_edge.subspace.factors import orthonormal_pair
from wasi_edge.subspace.ranks import is_factored_smaller, rank_for_explained_variance

CHUNK_ROWS = 256
RIDGE = 1e-10  # of the mean variance, added to C


class Factors(NamedTuple):
    """left (O, K) with orthonormal columns, right (K, I) with `right right^T` diagonal, descending."""

    left: Tensor
    right: Tensor


class Moments:
    """Mean and covariance of a linear's inputs, summed over calibration batches.

    Holds one (I, I) matrix. Sums are taken around the first chunk's mean, so that a channel whose mean
    is large beside its spread loses no digits in float32.

    Parameters
    ----------
    width : I, channels of the input.
    dtype : torch.float64 or torch.float32, of the matrix and its products. float32 halves memory and
        time; the covariance is then good to about 1e-6 of its largest entry.
    """

    def __init__(self, width: int, dtype: torch.dtype = torch.float64) -> None:
        self.count = 0
        self._shift: Tensor | None = None  # (I,)
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._second: Tensor | None = torch.zeros(width, width, dtype=dtype)

    def add(self, x: Tensor) -> None:
        """Count the rows of x (..., I), any floating dtype, a few hundred at a time.

        Raises ValueError if the width differs, a value is not finite, or after `covariance(consume=True)`.
        """
        if self._second is None:
            raise ValueError("the moments were consumed; start new ones")
        width = len(self._sum)
        if x.shape[-1] != width:
            raise ValueError(f"expected inputs (T, {width}), got shape {tuple(x.shape)}")
        if x.numel() == 0:
            return
        for rows in x.reshape(-1, width).split(CHUNK_ROWS):
            chunk = rows.to(self._second.dtype, copy=True)  # (t, I)
            if self._shift is None:
                self._shift = chunk.mean(0)
            chunk -= self._shift
            total = chunk.sum(0, dtype=torch.float64)
            if not bool(total.isfinite().all()):
                raise ValueError("the inputs hold NaN or infinity")
            self._sum += total
            self._second.addmm_(chunk.T, chunk)  # (I, t) (t, I)
            self.count += len(chunk)

    def mean(self) -> Tensor:
        """E[x], (I,) float64. Raises ValueError before anything was added."""
        if self._shift is None:
            raise ValueError("no inputs were added")
        return self._shift.double() + self._sum / self.count

    def covariance(self, consume: bool = False) -> Tensor:
        """E[(x - E[x]) (x - E[x])^T], (I, I) in the accumulator's dtype, symmetric to rounding.

        `consume` gives away the accumulator itself instead of a copy; nothing can be added after.
        Raises ValueError before anything was added, or after it was consumed.
        """
        if self._second is None or self.count == 0:
            raise ValueError("no inputs were added, or the moments were consumed")
        result = self._second if consume else self._second.clone()
        if consume:
            self._second = None
        offset = (self._sum / self.count).to(result.dtype)  # from the shift to the mean
        result /= self.count
        return result.addr_(offset, offset, alpha=-1.0)


def factorise(weight: Tensor, rank: int, covariance: Tensor | None = None) -> Factors:
    """Factors of rank K of a weight (O, I), best for inputs of that covariance (I, I), or for white ones.

    Computed in float64; returned in the weight's dtype (float32 for 16-bit weights). `left` is
    orthonormal to that dtype's precision. At rank min(O, I) the product is the weight.

    Raises ValueError for a rank outside 1 ... min(O, I), a covariance of another shape, or NaN.
    """
    if weight.ndim != 2 or not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} is impossible for a weight of shape {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    if covariance is not None and covariance.shape != (in_features, in_features):
        raise ValueError(f"expected a covariance {(in_features, in_features)}, got {tuple(covariance.shape)}")
    if not bool(weight.isfinite().all()):
        raise ValueError("the weight holds NaN or infinity")
    wide = weight.double()
    if out_features <= in_features:
        outer = wide @ wide.T if covariance is None else _outer_moment(wide, covariance)  # (O, O)
        left = _leading_eigenvectors(outer, rank)  # (O, K)
    else:
        weighted = wide if covariance is None else wide @ _square_root(_regularised(covariance))  # (O, I)
        right_vectors = _leading_eigenvectors(weighted.T @ weighted, rank)  # (I, K)
        # Householder and not a division by the singular values: also right where some are zero.
        left = torch.linalg.qr(weighted @ right_vectors).Q  # (O, K)
    pair = orthonormal_pair(left, left.T @ wide)
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    return Factors(pair.left.to(dtype), pair.right.to(dtype))


def squared_singular_values(weight: Tensor, covariance: Tensor) -> Tensor:
    """s^2 of W C^{1/2}, (min(O, I),) float64, descending: what each rank is worth in the variance of the output.

    W (O, I), C (I, I). Raises ValueError for NaN.
    """
    wide = weight.double()
    if wide.shape[0] <= wide.shape[1]:
        gram = _outer_moment(wide, covariance)
    else:
        weighted = wide @ _square_root(_regularised(covariance))
        gram = weighted.T @ weighted
    return torch.linalg.eigvalsh((gram + gram.T) / 2).clamp_min(0).flip(0)


def singular_values(weight: Tensor) -> Tensor:
    """Singular values of a matrix (O, I), (min(O, I),) float64, descending.

    From the smaller Gram matrix in float64: good to about 1e-8 of the largest.
    """
    wide = weight.double()
    small = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return torch.linalg.eigvalsh(small).clamp_min(0).sqrt().flip(0)


def rank_at(weight: Tensor, epsilon: float) -> int | None:
    """Smallest rank that keeps `epsilon` of the weight's squared singular values.

    None where factors of that rank would be no smaller than the weight (O, I): it stays dense. Raises
    ValueError for an epsilon outside (0, 1].
    """
    rank = rank_for_explained_variance(singular_values(weight).numpy(), epsilon)
    return rank if is_factored_smaller(rank, *weight.shape) else None


def _outer_moment(wide: Tensor, covariance: Tensor) -> Tensor:
    """W C W^T (O, O) for W (O, I) float64, C regularised, without a float64 copy of C (I, I): it is the largest of
    all matrices for a wide input. Symmetric to the rounding of C."""
    result = _ridge(covariance) * (wide @ wide.T)
    for columns, rows in zip(wide.split(CHUNK_ROWS, dim=1), covariance.split(CHUNK_ROWS), strict=True):
        result.addmm_(columns, rows.double() @ wide.T)  # (O, t) @ ((t, I) @ (I, O))
    return result


def _regularised(covariance: Tensor) -> Tensor:
    """C in float64, symmetric, with a trace of the identity."""
    ridge = _ridge(covariance)
    result = covariance.double()
    result = (result + result.T) / 2
    result.diagonal().add_(ridge)
    return result


def _ridge(covariance: Tensor) -> float:
    """What is added to the variances. Zero input variance counts as white. Raises ValueError for NaN."""
    if not bool(torch.isfinite(covariance.sum())) and not bool(covariance.isfinite().all()):
        raise ValueError("the covariance holds NaN or infinity")
    variance = float(covariance.diagonal().mean(dtype=torch.float64))
    return RIDGE * variance if variance > 0 else 1.0


def _square_root(matrix: Tensor) -> Tensor:
    """V sqrt(lambda), (n, n): a factor S of a positive semi-definite matrix = S S^T."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt()


def _leading_eigenvectors(gram: Tensor, count: int) -> Tensor:
    """The `count` leading eigenvectors of a symmetric (n, n) matrix, as columns (n, count), descending."""
    _, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return vectors[:, -count:].flip(1)
