"""Small inline SVG plots: pure functions from numbers to a string.

Why not matplotlib: it costs a Pi 60 MB of memory and seconds of import for three curves. What is
drawn here stays sharp at any zoom, takes its colours from the page's CSS variables (`--series-1`
..., `--accent`, `--bad`, `--on-shade`), so that it follows dark mode, and still reads alone, by the
fallbacks. Hue is never the only carrier: series also differ in dash and marker.

The view box is about as wide as a phone, so that text keeps a legible size there. A value that is
None or not finite leaves a gap. Every text is escaped, every plot names itself to a screen reader.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

_FONT_SIZE = 13.0
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
_DASHES = ("", "7 4", "2 3", "9 3 2 3")
_MAX_MARKERS = 60

THEME = """
:root{color-scheme:light dark;--bg:#f6f5f1;--card:#fff;--ink:#1d2226;--muted:#5d666e;--edge:#dedbd3;
--accent:#0072b2;--bad:#c24e00;--good:#00795a;--on-shade:#fff;--series-1:#0072b2;--series-2:#d55e00;
--series-3:#009e73;--series-4:#b0568a;--series-5:#b97f00;--series-6:#3a9bd0}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1d2226;--ink:#e8e6e1;--muted:#a3abb2;
--edge:#343b41;--accent:#5fb8ee;--bad:#ff9a5c;--good:#46cfa4;--on-shade:#101315;--series-1:#5fb8ee;
--series-2:#ff9a5c;--series-3:#46cfa4;--series-4:#e5a3c8;--series-5:#f0c24b;--series-6:#a9dbf7}}
"""
"""CSS for a page that holds these plots: their colours, and the page's, in light and in dark."""


@dataclass(frozen=True)
class Series:
    """One curve; `ys` may hold None or NaN, which leave a gap; `spreads` are drawn as upright strokes."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    spreads: Sequence[tuple[float, float] | None] = ()


class Axis(NamedTuple):
    """An axis from `low` to `high`, with its ticks and what they say."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]


class Plane(NamedTuple):
    """A drawn pair of axes: its SVG, where a value lies in it, and its edges."""

    body: str
    place: Callable[[float, float], tuple[float, float]]
    left: float
    right: float
    top: float
    bottom: float


def printable(text: object) -> str:
    """`text` without what breaks a terminal or an XML parser: controls and lone surrogates become U+FFFD."""
    return "".join(
        "\ufffd" if unicodedata.category(char) in ("Cc", "Cs") or char in "\ufffe\uffff" else char for char in str(text)
    )


def escape(text: object) -> str:
    """`text` as HTML or XML character data, quotes included."""
    return html.escape(printable(text), quote=True)


def finite(value: object) -> float | None:
    """`value` as a float, or None where it is missing, not a number or not finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value) if math.isfinite(value) else None


def nice_ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def number_text(value: float) -> str:
    """A number as a tick or tooltip shows it: at most four digits that matter, no needless zeros."""
    if value == round(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.4g}"


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    horizontal_lines: Sequence[tuple[str, float]] = (),
) -> str:
    """Curves over a shared x axis, with named horizontal reference lines and a legend above."""
    points = [(x, y) for curve in series for x, y in _points(curve) if y is not None]
    levels = [(name, level) for name, value in horizontal_lines if (level := finite(value)) is not None]
    names = ", ".join(curve.name for curve in series)
    label = f"{y_label} by {x_label}: {names}"
    width, plot_height = 420.0, 190.0
    if not points:
        return drawing(width, 60, label, draw_text(width / 2, 34, "nothing to plot yet", anchor="middle"))

    xs = [x for x, _ in points]
    x_low, x_high = widened(min(xs), max(xs), padding=0.0)
    values = [y for _, y in points] + [level for _, level in levels]
    values += [end for curve in series for spread in curve.spreads if spread for end in spread]
    y_low, y_high = y_range if y_range is not None else widened(min(values), max(values), padding=0.06)
    y_high = y_high if y_high > y_low else y_low + 1.0
    entries = [(curve.name, f"stroke:{_colour(i)};stroke-width:2.2{_dash(i)}", i) for i, curve in enumerate(series)]
    entries += [(f"{name} ({number_text(level)})", level_style(i), -1) for i, (name, level) in enumerate(levels)]
    legend, top = draw_legend(entries, width)
    x_ticks = nice_ticks(x_low, x_high, 6, whole=all(x == round(x) for x in xs))
    x_axis = Axis(x_label, x_low, x_high, [(tick, number_text(tick)) for tick in x_ticks])
    y_axis = Axis(y_label, y_low, y_high, [(tick, number_text(tick)) for tick in nice_ticks(y_low, y_high, 6)])
    plane = draw_plane(x_axis, y_axis, width, top, plot_height)
    parts = [legend, plane.body]
    for index, (name, level) in enumerate(levels):
        _, y = plane.place(x_low, level)
        title = draw_title(f"{name}: {number_text(level)}")
        parts.append(draw_line(plane.left, y, plane.right, y, level_style(index), title))
    for index, curve in enumerate(series):
        parts.append(_curve(curve, index, x_label, plane.place))
    return drawing(width, plane.bottom + 44, label, "".join(parts))


def bar_chart(
    bars: Sequence[tuple[str, float | None]],
    label: str,
    format_value: Callable[[float], str] = number_text,
) -> str:
    """Horizontal bars from zero, each with its name and value on the line above it."""
    width, row_height = 420.0, 36.0
    known = [value for _, raw in bars if (value := finite(raw)) is not None]
    highest = max([*known, 0.0]) or 1.0
    parts = []
    for row, (name, raw) in enumerate(bars):
        top, value = row * row_height, finite(raw)
        text = "–" if value is None else format_value(value)
        room = width - text_width(text) - 14
        parts.append(draw_text(0, top + 15, shorten(name, room), title=name))
        parts.append(draw_text(width, top + 15, text, anchor="end"))
        parts.append(_rect(0, top + 21, width, 8, "fill:currentColor;fill-opacity:.1"))
        if value is not None and value > 0:
            bar = value / highest * width
            parts.append(_rect(0, top + 21, bar, 8, f"fill:{_colour(0)}", f"{name}: {text}"))
    return drawing(width, max(1, len(bars)) * row_height, label, "".join(parts))


def confusion_matrix(matrix: Sequence[Sequence[float]], classes: Sequence[str]) -> str:
    """Counts with the true class down and the predicted class across, shaded by the share of their row.

    The diagonal (right) and the rest (wrong) have different hues. Cells too small for a number
    keep it in their tooltip.
    """
    count = len(matrix)
    names = [str(classes[i]) if i < len(classes) else f"class {i}" for i in range(count)]
    cell = min(64.0, max(15.0, 400.0 / max(1, count)))
    size = min(12.0, cell * 0.72)
    longest = min(112.0, max((text_width(name, size) for name in names), default=0.0))
    turned = longest > cell - 6
    left = 24 + longest + 6
    top = (longest * 0.72 if turned else 0.0) + size + 8
    overhang = max(8.0, longest * 0.72 - cell / 2) if turned else 8.0
    width, bottom = left + count * cell + overhang, top + count * cell
    right_count = sum(_at(matrix, i, i) for i in range(count))
    total = sum(_at(matrix, i, j) for i in range(count) for j in range(count))

    parts = [
        draw_text(left + count * cell / 2, bottom + 19, "what the model said", anchor="middle"),
        draw_text(13, (top + bottom) / 2, "what it really is", anchor="middle", turn=-90),
    ]
    for i, name in enumerate(names):
        short, centre = shorten(name, longest, size), (i + 0.5) * cell
        parts.append(draw_text(left - 6, top + centre + size * 0.35, short, "end", size, title=name))
        if turned:
            parts.append(draw_text(left + centre + size * 0.3, top - 5, short, "start", size, -45, name))
        else:
            parts.append(draw_text(left + centre, top - 6, short, "middle", size, title=name))
        row_total = sum(_at(matrix, i, j) for j in range(count))
        for j, said in enumerate(names):
            value = _at(matrix, i, j)
            share = value / row_total if row_total > 0 else 0.0
            hue = "var(--accent,#0072b2)" if i == j else "var(--bad,#d55e00)"
            shade = 0.0 if value <= 0 else 0.12 + 0.88 * share
            style = f"fill:{hue};fill-opacity:{shade:.2f};stroke:currentColor;stroke-opacity:.18"
            tooltip = f"{number_text(value)} of {name} taken for {said} ({100 * share:.0f} % of {name})"
            x, y = left + j * cell, top + i * cell
            parts.append(_rect(x, y, cell, cell, style, tooltip))
            if cell >= 20:
                ink = "var(--on-shade,#fff)" if shade > 0.55 else "currentColor"
                faint = ";opacity:.35" if value <= 0 else ""
                style = f"fill:{ink};pointer-events:none{faint}"
                parts.append(draw_text(x + cell / 2, y + cell / 2 + 4.5, number_text(value), "middle", style=style))
    label = f"Confusion matrix of {count} classes: {number_text(right_count)} of {number_text(total)} right"
    return drawing(width, bottom + 28, label, "".join(parts), least_width=min(width, 16.0 * count + longest))


# ---- pieces ----------------------------------------------------------------------------------


def draw_plane(x_axis: Axis, y_axis: Axis, width: float, top: float, height: float) -> Plane:
    """Ticks, grid and names of two axes; a value beyond the y axis is placed on its edge."""
    left = 32 + max((text_width(text) for _, text in y_axis.ticks), default=0.0)
    right, bottom = width - 14, top + height

    def place(x: float, y: float) -> tuple[float, float]:
        inside = min(max(y, y_axis.low), y_axis.high)
        across = left + 6 + (x - x_axis.low) / (x_axis.high - x_axis.low) * (right - left - 12)
        return across, bottom - (inside - y_axis.low) / (y_axis.high - y_axis.low) * height

    parts = []
    for tick, text in y_axis.ticks:
        _, y = place(x_axis.low, tick)
        parts.append(draw_line(left, y, right, y, "stroke:currentColor;stroke-opacity:.15"))
        parts.append(draw_text(left - 6, y + 4.5, text, anchor="end"))
    for tick, text in x_axis.ticks:
        x, _ = place(tick, y_axis.low)
        parts.append(draw_line(x, bottom, x, bottom + 4, "stroke:currentColor;stroke-opacity:.5"))
        parts.append(draw_text(x, bottom + 18, text, anchor="middle"))
    parts.append(draw_line(left, bottom, right, bottom, "stroke:currentColor;stroke-opacity:.5"))
    parts.append(draw_text((left + right) / 2, bottom + 36, x_axis.label, anchor="middle"))
    parts.append(draw_text(13, top + height / 2, y_axis.label, anchor="middle", turn=-90))
    return Plane("".join(parts), place, left, right, top, bottom)


def _points(curve: Series) -> list[tuple[float, float | None]]:
    """The curve's points in order, without those whose x is unknown."""
    pairs = zip(curve.xs, curve.ys, strict=False)
    return [(x, finite(raw_y)) for raw_x, raw_y in pairs if (x := finite(raw_x)) is not None]


def _curve(curve: Series, index: int, x_label: str, place: Callable[[float, float], tuple[float, float]]) -> str:
    """The line, broken at gaps, then one marker with a tooltip a point (thinned where there are many)."""
    steps, pen_down = [], False
    known: list[tuple[float, float]] = []
    for x, y in _points(curve):
        if y is None:
            pen_down = False
            continue
        px, py = place(x, y)
        steps.append(f"{'L' if pen_down else 'M'}{px:.1f} {py:.1f}")
        pen_down = True
        known.append((x, y))
    style = f"fill:none;stroke:{_colour(index)};stroke-width:2.2;stroke-linejoin:round"
    parts = [f'<path d="{"".join(steps)}" style="{style}{_dash(index)}"/>'] if steps else []
    for (x, _), spread in zip(_points(curve), curve.spreads, strict=False):
        if spread:
            (px, low), (_, high) = place(x, spread[0]), place(x, spread[1])
            parts.append(draw_line(px, low, px, high, f"stroke:{_colour(index)};stroke-width:5;stroke-opacity:.35"))
    every = math.ceil(len(known) / _MAX_MARKERS)
    for x, y in known[::every] if every else []:
        title = f"{curve.name}: {number_text(y)} ({x_label} {number_text(x)})"
        parts.append(draw_marker(*place(x, y), index, title, hidden=every > 1))
    return "".join(parts)


def draw_legend(entries: Sequence[tuple[str, str, int]], width: float) -> tuple[str, float]:
    """(name, line style, marker or -1) wrapped over as many rows as needed, and where the plot below begins."""
    parts, x, y = [], 4.0, 14.0
    for name, style, index in entries:
        text = shorten(name, width - 50)
        needed = 32 + text_width(text) + 16
        if x > 4 and x + needed > width:
            x, y = 4.0, y + 20
        parts.append(draw_line(x, y - 4, x + 26, y - 4, style))
        parts.append(draw_marker(x + 13, y - 4, index) if index >= 0 else "")
        parts.append(draw_text(x + 32, y + 0.5, text, title=name))
        x += needed
    return "".join(parts), y + 18


def draw_marker(x: float, y: float, index: int, title: str = "", hidden: bool = False) -> str:
    """A circle, square, diamond or triangle, by series; `hidden` ones only carry the tooltip."""
    style = f"fill:{_colour(index)}" + (";opacity:0" if hidden else "")
    body = draw_title(title) if title else ""
    if hidden or index % 4 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if hidden else 3.6}" style="{style}">{body}</circle>'
    corners = {
        1: ((-3.4, -3.4), (3.4, -3.4), (3.4, 3.4), (-3.4, 3.4)),
        2: ((0, -4.8), (4.8, 0), (0, 4.8), (-4.8, 0)),
        3: ((0, -4.6), (4.2, 3.4), (-4.2, 3.4)),
    }[index % 4]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" style="{style}">{body}</polygon>'


def drawing(width: float, height: float, label: str, body: str, least_width: float = 0.0) -> str:
    """The outer element: scales down to any width, up to half as large again."""
    least = f";min-width:{least_width:.0f}px" if least_width else ""
    style = f"width:100%;max-width:{1.5 * width:.0f}px{least};height:auto;font-family:inherit,sans-serif"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}" style="{style}">{body}</svg>'
    )


def draw_text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    size: float = _FONT_SIZE,
    turn: float = 0.0,
    title: str = "",
    style: str = "fill:currentColor",
) -> str:
    rotation = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn else ""
    tooltip = draw_title(title) if title and title != text else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}" style="{style}"'
        f"{rotation}>{escape(text)}{tooltip}</text>"
    )


def draw_line(x1: float, y1: float, x2: float, y2: float, style: str, body: str = "") -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} style="{style}">{body}</line>' if body else f'<line {place} style="{style}"/>'


def _rect(x: float, y: float, width: float, height: float, style: str, tooltip: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} style="{style}">{draw_title(tooltip) if tooltip else ""}</rect>'


def draw_title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _colour(index: int) -> str:
    slot = index % len(_PALETTE)
    return f"var(--series-{slot + 1},{_PALETTE[slot]})"


def _dash(index: int) -> str:
    pattern = _DASHES[index % len(_DASHES)]
    return f";stroke-dasharray:{pattern}" if pattern else ""


def level_style(index: int) -> str:
    pattern = ("10 4", "3 4", "10 4 3 4")[index % 3]
    return f"stroke:currentColor;stroke-width:1.5;stroke-opacity:.75;stroke-dasharray:{pattern}"


def _at(matrix: Sequence[Sequence[float]], i: int, j: int) -> float:
    row = matrix[i]
    return finite(row[j]) or 0.0 if j < len(row) else 0.0


def widened(low: float, high: float, padding: float) -> tuple[float, float]:
    """[low, high] widened by `padding` of itself on both sides, and never empty."""
    if low == high:
        return low - 0.5, high + 0.5
    margin = (high - low) * padding
    return low - margin, high + margin


def text_width(text: str, size: float = _FONT_SIZE) -> float:
    """Roughly how wide a sans-serif sets `text`; East Asian wide characters take a full em."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return size * (0.56 * (len(text) - wide) + wide)


def shorten(text: str, room: float, size: float = _FONT_SIZE) -> str:
    """`text`, or as much of it as fits into `room` with an ellipsis."""
    if text_width(text, size) <= room + 1e-6:
        return text
    while text and text_width(text + "…", size) > room:
        text = text[:-1]
    return text + "…"
