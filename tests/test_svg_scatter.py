"""Points in a plane: names that do not collide, the front, axes, hostile text."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from test_svg import HOSTILE, NS, parsed, texts, titles

from wasi_edge.report.svg import Series, line_chart
from wasi_edge.report.svg_scatter import Cloud, scatter_chart


def boxes(root: ET.Element, labels: set[str]) -> list[tuple[float, float, float, float]]:
    found = []
    for text in root.iter(f"{NS}text"):
        name, anchor = text.text or "", text.get("text-anchor")
        if name in labels:
            width, x, y = 12 * 0.56 * len(name), float(text.get("x", "")), float(text.get("y", ""))
            left = x - {"start": 0.0, "end": width, "middle": width / 2}[anchor or ""]
            found.append((left, y - 10, left + width, y + 2))
    return found


def test_names_stand_beside_their_points_and_never_on_each_other() -> None:
    names = [f"method {i} 0.8" for i in range(12)]
    xs, ys = [200.0 + 7 * i for i in range(12)], [800.0 - 9 * (i % 5) for i in range(12)]
    root = parsed(scatter_chart([Cloud("all", xs, ys, names)], "ms", "MB", front="front"))
    found = boxes(root, set(names))
    assert len(found) == 12
    apart = [a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for a in found for b in found if a is not b]
    assert all(apart)
    assert "method 3 0.8: MB 773, ms 221" in titles(root)


def test_the_front_joins_the_points_none_beats() -> None:
    points = Cloud("a", [1, 2, 3, 4, 2.5], [9, 5, 6, 1, 5])  # (3, 6) and (2.5, 5) are beaten by (2, 5)
    svg = scatter_chart([points], "x", "y", front="beaten by none")
    assert svg.count("<line") - scatter_chart([points], "x", "y").count("<line") == 4 + 1  # two steps, and the legend
    assert "beaten by none" in texts(parsed(svg))


def test_logarithmic_axes_and_the_diagonal() -> None:
    cloud = Cloud("vanilla", [5, 600, 0, None, math.nan], [6, 500, 3, 1, 1])
    root = parsed(scatter_chart([cloud], "measured", "predicted", log=True, diagonal="as measured"))
    assert [title for title in titles(root) if "vanilla" in title] == [
        "vanilla: predicted 6, measured 5",
        "vanilla: predicted 500, measured 600",
    ]
    assert {"10", "100", "as measured", "vanilla"} <= set(texts(root))
    narrow = parsed(scatter_chart([Cloud("a", [100, 101], [100, 101])], "x", "y", log=True))
    assert len([text for text in texts(narrow) if re.fullmatch(r"[0-9.]+", text)]) >= 4


@pytest.mark.parametrize("log", [False, True])
def test_scatter_of_little_or_nothing(log: bool) -> None:
    assert texts(parsed(scatter_chart([], "x", "y", log))) == ["nothing to plot yet"]
    parsed(scatter_chart([Cloud("a", [3], [3], ["one"])], "x", "y", log, diagonal="d", front="f"))
    parsed(scatter_chart([Cloud(HOSTILE, [1, 2], [1, 2], [HOSTILE, "b"])], HOSTILE, HOSTILE, log, HOSTILE, HOSTILE))


def test_spreads_are_strokes_inside_the_plot() -> None:
    bare = line_chart([Series("a", [0, 1], [1.0, 2.0])], "x", "y")
    svg = line_chart([Series("a", [0, 1], [1.0, 2.0], [(0.5, 4.0), None])], "x", "y")
    parsed(svg)
    assert svg.count("stroke-width:5") == 1 and bare.count("stroke-width:5") == 0 and ">4</text>" in svg
