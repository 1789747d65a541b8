"""Memory and FLOPs of one linear layer, as arXiv 2510.09160 counts them and as our engine works.

A layer (O, I) with inputs (B, N, I), in factors of rank K; what is kept of the inputs is a Tucker core (r1, r2, r3)
with its factors. Ours compresses the last mode alone: r1 = B, r2 = N, no factors for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from wasi_edge.bench.flops import update_flops
from wasi_edge.chunks import sampled_tokens


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer and its inputs."""

    photos: int
    tokens: int
    inputs: int
    outputs: int

    @property
    def rows(self) -> int:
        """B N."""
        return self.photos * self.tokens


@dataclass(frozen=True)
class Count:
    """Of a training step: elements held; FLOPs of the passes, of keeping subspaces current, of a forward pass alone."""

    elements: float
    train: float
    upkeep: float
    infer: float

    def gain(self, dense: Count) -> dict[str, float]:
        """Dense over this one."""
        return {
            "memory": dense.elements / self.elements,
            "train": dense.train / (self.train + self.upkeep),
            "infer": dense.infer / self.infer,
        }


def dense(layer: Layer) -> Count:
    """Vanilla training."""
    b, o, i = layer.rows, layer.outputs, layer.inputs
    forward, gradient, backward = b * o * (2 * i - 1), o * i * (2 * b - 1), b * i * (2 * o - 1)
    return Count(b * i + o * i, forward + gradient + backward, 0, forward)


def paper(layer: Layer, rank: int, modes: tuple[int, int, int]) -> Count:
    """WASI as published, but the four terms of the weight gradient are multiply-adds there, FLOPs here."""
    b, n, i, o = layer.photos, layer.tokens, layer.inputs, layer.outputs
    r1, r2, r3 = modes
    forward = layer.rows * rank * (2 * i - 1) + layer.rows * o * (2 * rank - 1)
    gradient = 2 * (b * n * o * r1 + r1 * r2 * r3 * n + r1 * r3 * i * n + i * o * n * r1)
    backward = 2 * layer.rows * rank * (o + i)
    upkeep = iteration(o, i, rank) + iteration(b, n * i, r1) + iteration(n, b * i, r2) + iteration(i, b * n, r3)
    elements = r1 * r2 * r3 + b * r1 + n * r2 + i * r3 + rank * (o + i)
    return Count(elements, forward + gradient + backward, upkeep, forward)


def ours(layer: Layer, rank: int, r: int) -> Count:
    """Our engine: dW = P U^T is never formed, it is added to the factors in place; linears take turns in that."""
    b, i, o, k = layer.rows, layer.inputs, layer.outputs, rank
    forward = 2 * b * k * (o + i)
    gradient = 2 * b * r * (o + i)
    refresh = 4 * sampled_tokens(b) * r * i
    return Count(b * r + i * r + k * (o + i), 2 * forward + gradient, refresh + update_flops(o, i, k, r), forward)


def iteration(a: int, b: int, r: int) -> float:
    """One subspace iteration of an (a, b) matrix at rank r."""
    return a * r * (2 * b - 1) + b * r * (2 * a - 1) + 2 * max(a, r) * min(a, r) ** 2


def thin_svd(a: int, b: int) -> float:
    """Singular values and both thin sets of vectors of an (a, b) matrix, a >= b, by the R-bidiagonal method (Golub and
    Van Loan, Matrix Computations, table of SVD work)."""
    a, b = max(a, b), min(a, b)
    return 6 * a * b**2 + 20 * b**3
