"""How time grows with tokens, width, depth, rank and batch: a few small networks measured, a line fitted through them.

    ms per image = a * GFLOP of products + b * million elements that pass through norms, GELU and copies
                   + c * (linears of the network) / batch       (calls, and the update, paid once a step)

Coefficients are not negative and fitted to relative errors, one set for vanilla and one for WASI. From them follows
where WASI stops paying: the rank, as a share of min(O, I), and the batch at which both take the same time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from wasi_edge.bench.contestant import Contestant, Entry, free_choices
from wasi_edge.bench.flops import step_flops
from wasi_edge.bench.subject import Subject
from wasi_edge.bench.synthetic import RANK_SHARES, synthetic_ranks
from wasi_edge.bench.timing import interleave
from wasi_edge.method import Method
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.preprocessing import Preprocessing

PATCH, HEADS_WIDTH, ROUNDS = 16, 64, 3
# width, depth, image size, rank share of what epsilon 0.8 gives, batch
POINTS = (
    (192, 2, 112, 1.0, 8), (192, 2, 224, 1.0, 8), (192, 4, 224, 0.55, 2), (384, 2, 112, 1.0, 2),
    (384, 2, 224, 1.0, 8), (384, 4, 224, 1.0, 4), (384, 2, 224, 0.55, 8), (384, 2, 112, 1.6, 8),
    (768, 1, 112, 1.0, 8), (768, 2, 224, 1.0, 4), (768, 2, 224, 0.55, 4), (768, 1, 224, 1.6, 2),
)  # fmt: skip
_TERMS = (("products", "GFLOP"), ("elements", "million elements"), ("calls", "linears per image"))
# of what break-even is said: ViT-S/16 at 224 px, batch 16
_TYPICAL = (384, 12, 224, 1.0, 16)


@dataclass(frozen=True)
class Point:
    """One network at one batch size. `share`: ranks relative to those at epsilon 0.8."""

    width: int
    depth: int
    image_size: int
    share: float
    batch: int

    @property
    def geometry(self) -> ViTGeometry:
        """A plain ViT of this size."""
        side = self.image_size // PATCH
        return ViTGeometry(
            PATCH, self.width, self.depth, self.width // HEADS_WIDTH, 4 * self.width, side, features="class"
        )

    def terms(self, method: Method, gradient_rank: int) -> list[float]:
        """What is multiplied with the coefficients."""
        geometry = self.geometry
        dense: dict[str, int | None] = dict.fromkeys(geometry.linear_shapes())
        ranks = synthetic_ranks(geometry, self.share) if method.has_factors else dense
        flops = step_flops(geometry, self.image_size, ranks, method, gradient_rank, self.batch)
        elements = geometry.tokens(self.image_size) * self.depth * (12 * self.width + 2 * geometry.mlp_width)
        return [(flops.train + flops.upkeep) / 1e9, elements / 1e6, 4 * self.depth / self.batch]


def measure_cost_model(gradient_rank: int, seed: int, on_done: Callable[[int], None]) -> dict[str, Any]:
    """Measure every point, vanilla and WASI interleaved; the `cost_model` of the result."""
    measured: dict[Method, list[tuple[Point, float]]] = {Method.VANILLA: [], Method.WASI: []}
    for number, values in enumerate(POINTS, start=1):
        point = Point(*values)
        preprocessing = Preprocessing(point.image_size)
        subject = Subject("cost model", point.geometry, point.image_size, preprocessing, None, None, point.share)
        contestants = {
            method: Contestant(
                subject,
                Entry(method, method, 0.8 if method.has_factors else None),
                free_choices(point.batch, point.depth, gradient_rank),
                point.batch,
                seed,
            )
            for method in measured
        }
        timed = interleave({str(method): c.step for method, c in contestants.items()}, ROUNDS)
        for method, points in measured.items():
            points.append((point, 1e3 * timed[str(method)].median_seconds / point.batch))
        on_done(number)
    return summarise(measured, gradient_rank)


def summarise(measured: dict[Method, list[tuple[Point, float]]], gradient_rank: int) -> dict[str, Any]:
    """Fit each method's coefficients and say what follows."""
    rows, terms, errors, fitted = [], [], [], {}
    for method, points in measured.items():
        matrix = np.array([point.terms(method, gradient_rank) for point, _ in points])
        times = np.array([milliseconds for _, milliseconds in points])
        fitted[method] = coefficients = fit(matrix, times)
        predicted = matrix @ coefficients
        errors += list(np.abs(predicted / times - 1))
        for (point, milliseconds), guess in zip(points, predicted, strict=True):
            rows.append(
                {
                    "method": str(method),
                    "tokens": point.geometry.tokens(point.image_size),
                    "width": point.width,
                    "depth": point.depth,
                    "rank_share": round(point.share * RANK_SHARES["fc1"], 3) if method.has_factors else None,
                    "batch": point.batch,
                    "train_ms_per_image": milliseconds,
                    "predicted_ms_per_image": float(guess),
                }
            )
        for (term, unit), value in zip(_TERMS, coefficients, strict=True):
            terms.append({"method": str(method), "term": term, "ms_per_unit": float(value), "unit": unit})
    return {
        "measurements": rows,
        "terms": terms,
        "median_error": float(statistics.median(errors)),
        "break_even": break_even(fitted, gradient_rank),
    }


def fit(matrix: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Non-negative coefficients (n,) with the least squared relative error: terms that come out negative are left out,
    the most negative first."""
    scaled = matrix / times[:, None]
    kept = list(range(matrix.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(scaled[:, kept], np.ones(len(times)), rcond=None)
        if (found >= 0).all() or len(kept) == 1:
            coefficients = np.zeros(matrix.shape[1])
            coefficients[kept] = np.maximum(found, 0)
            return coefficients
        kept.pop(int(np.argmin(found)))


def break_even(fitted: dict[Method, np.ndarray], gradient_rank: int) -> dict[str, Any]:
    """Rank share of fc1 and batch from which on WASI takes as long as vanilla, for a typical network; None where it is
    faster (or slower) everywhere."""
    width, depth, image_size, share, batch = _TYPICAL

    def gain(share: float, batch: int) -> float:
        point = Point(width, depth, image_size, share, batch)
        times = {m: float(np.dot(point.terms(m, gradient_rank), c)) for m, c in fitted.items()}
        return times[Method.VANILLA] / times[Method.WASI]

    shares = [step / 20 for step in range(1, 45)]
    losing = [s for s in shares if s * max(RANK_SHARES.values()) <= 1 and gain(s, batch) <= 1]
    paying = [size for size in range(1, 65) if gain(share, size) > 1]
    return {
        "rank_share": round(losing[0] * RANK_SHARES["fc1"], 3) if losing else None,
        "batch": paying[0] if paying else None,
        "note": f"for ViT-S/16 at {image_size} px; rank share at batch {batch}, batch at the ranks of epsilon 0.8",
    }
