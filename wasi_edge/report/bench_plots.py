"""The plots of the bench's page: each the SVG of one chart, or "" where it would have fewer than two points.

Against epsilon that means two values of epsilon. Methods in factors are curves, with strokes for the
spread; the others have no epsilon and are level lines. `head` and checkpointing are left out of the
speed charts: 3x faster because nothing is trained would flatten all that the charts are there to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wasi_edge.report.bench_table import BenchGroup, Row, row_name, spread_of
from wasi_edge.report.svg import Series, finite, line_chart
from wasi_edge.report.svg_scatter import Cloud, scatter_chart

_MB = 2**20
_SPEED_LEVELS = {"train": ("vanilla", "lora", "asi"), "infer": ("vanilla",)}  # dense ones infer as vanilla does
_MEMORY_LEVELS = ("vanilla", "vanilla+checkpoint", "lora")


def speed_chart(group: BenchGroup, kind: str) -> str:
    """The speed-up of "train" or "infer" over epsilon, with the bound of the first method."""
    curves = _curves(group, f"{kind}_speedup", spread_key=f"{kind}_speedup_spread")
    if not _spans(curves):
        return ""
    bounds = {curve.name: curve for curve in _curves(group, f"{kind}_bound")}
    if (bound := bounds.get(curves[0].name)) is not None:
        curves.append(Series(f"bound of {bound.name}", bound.xs, bound.ys))
    levels = [(name, round(level, 2)) for name, level in _levels(group, _SPEED_LEVELS[kind], f"{kind}_speedup")]
    verb = "training" if kind == "train" else "inference"
    return line_chart(curves, "epsilon", f"{verb}, × vanilla", None, levels)


def memory_chart(group: BenchGroup) -> str:
    """The peak memory of the process over epsilon, from zero."""
    curves = _curves(group, "peak_rss_bytes", 1 / _MB)
    if not _spans(curves):
        return ""
    levels = [(name, float(round(level / _MB))) for name, level in _levels(group, _MEMORY_LEVELS, "peak_rss_bytes")]
    highest = max([y for curve in curves for y in curve.ys if y is not None] + [level for _, level in levels])
    return line_chart(curves, "epsilon", "peak memory, MB", (0.0, 1.06 * highest), levels)


def pareto_chart(group: BenchGroup) -> str:
    """Every method's time and memory in training, and the steps of those that none beats on both."""
    points: dict[str, list[tuple[float, float, str]]] = {}
    for row in _wasi_first(group.rows):
        time, peak = finite(row.get("train_ms_per_image")), finite(row.get("peak_rss_bytes"))
        if time is not None and peak is not None:
            points.setdefault(str(row.get("method")), []).append((time, peak / _MB, row_name(row)))
    if sum(map(len, points.values())) < 2:
        return ""
    clouds = [
        Cloud(name, [x for x, _, _ in found], [y for _, y, _ in found], [label for _, _, label in found])
        for name, found in points.items()
    ]
    return scatter_chart(clouds, "training, ms/image", "peak memory, MB", front="beaten by none")


def prediction_chart(measurements: Sequence[Mapping[str, Any]]) -> str:
    """The cost model's predictions against what was measured, both on logarithmic axes."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in measurements:
        real, predicted = finite(row.get("train_ms_per_image")), finite(row.get("predicted_ms_per_image"))
        if real is not None and predicted is not None and min(real, predicted) > 0:
            points.setdefault(str(row.get("method") or "?"), []).append((real, predicted))
    if sum(map(len, points.values())) < 2:
        return ""
    clouds = [Cloud(name, [x for x, _ in found], [y for _, y in found]) for name, found in points.items()]
    return scatter_chart(clouds, "measured, ms/image", "predicted, ms/image", log=True, diagonal="as measured")


def _curves(group: BenchGroup, key: str, scale: float = 1.0, spread_key: str = "") -> list[Series]:
    """A curve over epsilon for each method that has one, wasi first; unknown figures are left out."""
    points: dict[str, list[tuple[float, float, tuple[float, float] | None]]] = {}
    for row in _wasi_first(group.rows):
        epsilon, value = finite(row.get("epsilon")), finite(row.get(key))
        if epsilon is not None and value is not None:
            spread = spread_of(row, spread_key) if spread_key else None
            points.setdefault(str(row.get("method")), []).append((epsilon, scale * value, spread))
    curves = []
    for method, found in points.items():
        found.sort(key=lambda point: point[0])
        curves.append(Series(method, [x for x, _, _ in found], [y for _, y, _ in found], [s for _, _, s in found]))
    return curves


def _wasi_first(rows: Sequence[Row]) -> list[Row]:
    """Stable, so that a method keeps its colour from chart to chart."""
    order = {"wasi": 0, "wsi": 1}
    return sorted(rows, key=lambda row: order.get(str(row.get("method")), 2 + (finite(row.get("epsilon")) is None)))


def _spans(curves: Sequence[Series]) -> bool:
    """Two values of epsilon at least: one says nothing of how a figure moves with it."""
    return len({x for curve in curves for x in curve.xs}) > 1


def _levels(group: BenchGroup, methods: Sequence[str], key: str) -> list[tuple[str, float]]:
    """The figures of those methods that have no epsilon."""
    rows = [row for row in group.rows if row.get("method") in methods and finite(row.get("epsilon")) is None]
    known = {str(row.get("method")): value for row in rows if (value := finite(row.get(key))) is not None}
    return [(method, known[method]) for method in methods if method in known]
