"""The plots are well-formed whatever goes in, leave gaps where values are missing, and name themselves."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from wasi_edge.report.svg import (
    Series,
    bar_chart,
    confusion_matrix,
    escape,
    finite,
    line_chart,
    nice_ticks,
    printable,
)

NS = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert('x')</script>&\"\x00\x1b[31m\ud800"


def parsed(svg: str) -> ET.Element:
    root = ET.fromstring(svg)
    assert root.tag == f"{NS}svg" and root.get("role") == "img" and root.get("aria-label")
    assert len(root.get("viewBox", "").split()) == 4
    assert "nan" not in re.sub(r"<title>.*?</title>|<text.*?</text>", "", svg).lower()
    return root


def texts(root: ET.Element) -> list[str]:
    return [(element.text or "") for element in root.iter(f"{NS}text")]


def titles(root: ET.Element) -> list[str]:
    return [(element.text or "") for element in root.iter(f"{NS}title")]


def test_a_gap_breaks_the_line_and_has_no_marker() -> None:
    curve = Series("val", [0, 1, 2, 3, 4], [0.5, 0.6, None, math.nan, 0.9])
    root = parsed(line_chart([curve], "epoch", "accuracy"))
    (path,) = root.iter(f"{NS}path")
    assert path.get("d", "").count("M") == 2 and path.get("d", "").count("L") == 1
    assert [title for title in titles(root) if title.startswith("val")] == [
        "val: 0.5 (epoch 0)",
        "val: 0.6 (epoch 1)",
        "val: 0.9 (epoch 4)",
    ]


def test_series_differ_in_more_than_colour() -> None:
    root = parsed(line_chart([Series(f"s{i}", [0, 1], [i, i + 1]) for i in range(4)], "x", "y"))
    styles = [path.get("style", "") for path in root.iter(f"{NS}path")]
    dashes = {re.sub(r"stroke:[^;]*;", "", style) for style in styles}
    assert len(dashes) == 4 and all("var(--series-" in style for style in styles)


def test_horizontal_lines_are_named_and_inside_the_plot() -> None:
    svg = line_chart([Series("rss", [0, 60], [200, 400])], "s", "MB", horizontal_lines=[("budget", 512)])
    assert "budget (512)" in texts(parsed(svg)) and "budget: 512" in titles(parsed(svg))


@pytest.mark.parametrize(
    "series",
    [[], [Series("a", [], [])], [Series("a", [1], [None])], [Series("a", [math.nan], [1.0])]],
)
def test_nothing_to_plot_says_so(series: list[Series]) -> None:
    assert texts(parsed(line_chart(series, "x", "y"))) == ["nothing to plot yet"]


@pytest.mark.parametrize("y_range", [None, (0.0, 0.0), (0.0, 1.0)])
def test_one_point_and_flat_lines(y_range: tuple[float, float] | None) -> None:
    parsed(line_chart([Series("a", [3], [0.0])], "x", "y", y_range))
    parsed(line_chart([Series("a", [1, 2], [5.0, 5.0])], "x", "y", y_range))


def test_many_points_keep_few_tooltips() -> None:
    root = parsed(line_chart([Series("a", range(5000), [float(i % 7) for i in range(5000)])], "x", "y"))
    assert len(titles(root)) <= 60


@pytest.mark.parametrize(
    ("low", "high", "whole"),
    [(0, 8, True), (0, 1, True), (0.7, 1.0, False), (-3e-6, 4e-6, False), (0, 1e9, False), (2, 2, False)],
)
def test_ticks_are_few_inside_and_even(low: float, high: float, whole: bool) -> None:
    ticks = nice_ticks(low, high, 5, whole)
    slack = 1e-6 * (high - low)
    assert 1 <= len(ticks) <= 11 and all(low - slack <= tick <= high + slack for tick in ticks)
    assert np.allclose(np.diff(ticks, 2), 0, atol=slack)
    assert not whole or all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize("count", [1, 2, 5, 12, 20, 21, 40])
def test_confusion_matrix_of_any_size(count: int) -> None:
    matrix = [[7 if i == j else (i + j) % 2 for j in range(count)] for i in range(count)]
    matrix[0] = [0] * count  # a class without a held-out photo
    root = parsed(confusion_matrix(matrix, [f"a rather long class name {i}" for i in range(count)]))
    assert len(list(root.iter(f"{NS}rect"))) == count * count
    assert ("7" in texts(root)) == (1 < count <= 20)
    _, _, width, height = map(float, root.get("viewBox", "").split())
    assert width < 900 and height < 900


def test_confusion_matrix_shades_by_row_fraction() -> None:
    root = parsed(confusion_matrix([[10, 0], [5, 5]], ["a", "b"]))
    styles = [rect.get("style", "") for rect in root.iter(f"{NS}rect")]
    shades = [float(style.split("fill-opacity:")[1].split(";")[0]) for style in styles]
    assert shades == [1.0, 0.0, 0.56, 0.56]
    assert "5 of b taken for a (50 % of b)" in titles(root)


def test_confusion_matrix_takes_numpy_and_missing_names() -> None:
    root = parsed(confusion_matrix(np.array([[3, 1], [0, 4]]), ["only"]))  # type: ignore[arg-type]
    assert {"only", "class 1", "3", "4"} <= set(texts(root))


def test_bars_scale_from_zero_and_survive_missing_values() -> None:
    root = parsed(bar_chart([("a", 10.0), ("b", None), ("c", 5.0), ("d", 0.0)], "memory"))
    widths = [float(r.get("width", "")) for r in root.iter(f"{NS}rect") if "series" in r.get("style", "")]
    assert widths == [420.0, 210.0] and "–" in texts(root)
    parsed(bar_chart([], "nothing"))
    parsed(bar_chart([("zero", 0.0)], "zero"))


def test_hostile_names_stay_text() -> None:
    for svg in (
        line_chart([Series(HOSTILE, [0], [1])], HOSTILE, HOSTILE, horizontal_lines=[(HOSTILE, 2)]),
        bar_chart([(HOSTILE, 1)], HOSTILE),
        confusion_matrix([[1]], [HOSTILE]),
    ):
        parsed(svg)
        assert "<script" not in svg and "\x1b" not in svg


def test_text_helpers() -> None:
    assert printable("naïve 写真 👩‍🔧") == "naïve 写真 👩‍🔧" and printable("a\x1b\n\ud800") == "a\ufffd\ufffd\ufffd"
    assert escape("<a href='x'>") == "&lt;a href=&#x27;x&#x27;&gt;"
    assert finite(np.int64(3)) == 3.0 and finite(np.float32(0.5)) == 0.5
    assert finite(True) is None and finite("3") is None and finite(math.inf) is None and finite(None) is None
