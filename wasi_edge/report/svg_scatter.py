"""A scatter plot beside the plots of `svg.py`: points with names, a front, a diagonal.

Names stand beside their points. Each takes the first free place around its point, nearest first, with
a thin leader line where that is not right beside it; one that finds none is left to its tooltip
rather than drawn over another name, a point or the front. The front is the staircase of the points
that no other beats on both axes, smaller being better. Logarithmic axes suit figures that spread
over decades.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from wasi_edge.report.svg import (
    Axis,
    Plane,
    draw_legend,
    draw_line,
    draw_marker,
    draw_plane,
    draw_text,
    drawing,
    finite,
    level_style,
    nice_ticks,
    number_text,
    shorten,
    text_width,
    widened,
)

_LABEL_SIZE, _LONGEST_LABEL = 13.0, 160.0
_DISTANCES = (8.0, 20.0, 34.0, 50.0)
_DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (0.7, -0.7), (0.7, 0.7), (-0.7, -0.7), (-0.7, 0.7))
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Cloud:
    """Points of one kind; without `labels`, the kind is named in a legend."""

    name: str
    xs: Sequence[float | None]
    ys: Sequence[float | None]
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class _Point:
    x: float
    y: float
    index: int
    title: str
    label: str


def scatter_chart(
    clouds: Sequence[Cloud],
    x_label: str,
    y_label: str,
    log: bool = False,
    diagonal: str = "",
    front: str = "",
) -> str:
    """Points in a plane; `diagonal` names a line y = x over one range for both axes, `front` a Pareto front."""
    width, height = 420.0, 230.0
    points = [point for index, cloud in enumerate(clouds) for point in _points(cloud, index, log, x_label, y_label)]
    label = f"{y_label} by {x_label}: {', '.join(cloud.name for cloud in clouds)}"
    if not points:
        return drawing(width, 60, label, draw_text(width / 2, 34, "nothing to plot yet", anchor="middle"))

    xs, ys = [point.x for point in points], [point.y for point in points]
    if diagonal:
        xs = ys = xs + ys
    x_axis, y_axis = _axis(x_label, xs, log), _axis(y_label, ys, log)
    entries = [(cloud.name, "stroke:none", i) for i, cloud in enumerate(clouds) if not any(cloud.labels)]
    entries += [(name, level_style(0), -1) for name in (diagonal, front) if name]
    legend, top = draw_legend(entries, width) if entries else ("", 12.0)
    plane = draw_plane(x_axis, y_axis, width, top, height)
    parts = [legend, plane.body]
    if diagonal:
        (x1, y1), (x2, y2) = plane.place(x_axis.low, y_axis.low), plane.place(x_axis.high, y_axis.high)
        parts.append(draw_line(x1, y1, x2, y2, level_style(0)))
    steps = _staircase(points, plane) if front else []
    parts += [draw_line(*step, level_style(0)) for step in steps]
    parts += [draw_marker(*plane.place(point.x, point.y), point.index, point.title) for point in points]
    parts.append(_names(points, plane, steps))
    return drawing(width, plane.bottom + 44, label, "".join(parts))


def _points(cloud: Cloud, index: int, log: bool, x_label: str, y_label: str) -> list[_Point]:
    """The cloud's points that can be drawn, in logarithms where asked for."""
    found = []
    for i, (raw_x, raw_y) in enumerate(zip(cloud.xs, cloud.ys, strict=False)):
        x, y = finite(raw_x), finite(raw_y)
        if x is None or y is None or (log and min(x, y) <= 0):
            continue
        label = str(cloud.labels[i]) if i < len(cloud.labels) else ""
        title = f"{label or cloud.name}: {y_label} {number_text(y)}, {x_label} {number_text(x)}"
        place = (math.log10(x), math.log10(y)) if log else (x, y)
        found.append(_Point(*place, index, title, label))
    return found


def _axis(label: str, values: Sequence[float], log: bool) -> Axis:
    low, high = widened(min(values), max(values), padding=0.1)
    if not log:
        low = max(low, 0.0) if min(values) >= 0 else low
        return Axis(label, low, high, [(tick, number_text(tick)) for tick in nice_ticks(low, high, 5)])
    decades = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [value for n in decades for f in factors if low <= math.log10(value := f * 10.0**n) <= high]
        if len(ticks) >= 4:
            break
    else:
        ticks = nice_ticks(10**low, 10**high, 4)
    return Axis(label, low, high, [(math.log10(tick), number_text(tick)) for tick in ticks])


def _staircase(points: Sequence[_Point], plane: Plane) -> list[Box]:
    """Lines (x1, y1, x2, y2) of the steps between the points that none beats on both axes, from left to right."""
    steps: list[Box] = []
    best: _Point | None = None
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        if best is not None and point.y >= best.y:
            continue
        if best is not None:
            (x1, y1), (x2, y2) = plane.place(best.x, best.y), plane.place(point.x, point.y)
            steps += [(x1, y1, x2, y1), (x2, y1, x2, y2)]
        best = point
    return steps


def _names(points: Sequence[_Point], plane: Plane, steps: Sequence[Box]) -> str:
    """Every label where nothing else is yet, and a leader line to those further away."""
    places = [plane.place(point.x, point.y) for point in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    taken += [(x1 - 1, y1 - 1, x2 + 1, y2 + 1) for x1, y1, x2, y2 in steps]
    parts = []
    for point, (x, y) in zip(points, places, strict=True):
        if not point.label:
            continue
        text = shorten(point.label, _LONGEST_LABEL, _LABEL_SIZE)
        width = text_width(text, _LABEL_SIZE)
        for distance, (across, down) in ((d, direction) for d in _DISTANCES for direction in _DIRECTIONS):
            at_x, at_y = x + across * distance, y + down * (distance + 4)
            anchor = "start" if across > 0 else "end" if across < 0 else "middle"
            left = at_x - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
            box = (left, at_y - 7, left + width, at_y + 7)
            if not _inside(box, plane) or any(_overlap(box, other) for other in taken):
                continue
            taken.append(box)
            if distance > _DISTANCES[0]:
                parts.append(draw_line(x, y, at_x, at_y, "stroke:currentColor;stroke-opacity:.4"))
            parts.append(draw_text(at_x, at_y + 4.2, text, anchor, _LABEL_SIZE, title=point.label))
            break
    return "".join(parts)


def _inside(box: Box, plane: Plane) -> bool:
    left, top, right, bottom = box
    return left >= plane.left and right <= plane.right + 10 and top >= plane.top - 10 and bottom <= plane.bottom


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
