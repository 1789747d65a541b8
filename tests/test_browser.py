"""Reports in a real browser: headless Chromium opens them as a phone and as a desk would, by day and by night."""

from __future__ import annotations

import numpy as np
import pytest
from browser import NAMES, Browser, find_browser
from test_report_bench import bench
from test_report_html import EVIL, report

from wasi_edge.report.bench_html import render_bench_report
from wasi_edge.report.evaluation_html import render_evaluation_report
from wasi_edge.report.html import render_finetune_report
from wasi_edge.report.sections import ReportPhoto

PHONE, DESK = 360, 1280
# what must be on each page
SHOWN = {
    "finetune": ("86 %", "How to use it", "What it mixes up", "Class by class", "Memory", "taken for"),
    "evaluation": ("85 %", "What it mixes up", "Class by class", "The mean over classes"),
    "bench": ("bound", "peak memory", "vanilla"),
}
PLOTS = {"finetune": 5, "evaluation": 1, "bench": 3}


def photos():
    rng = np.random.default_rng(0)
    names = [("cat", "cat"), ("cat", "dog"), ("dog", "dog"), ("dog", EVIL)]
    return [
        ReportPhoto(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), true, said, 0.9, f"{EVIL}-{number}.jpg")
        for number, (true, said) in enumerate(names)
    ]


def evaluation():
    per_class = {
        "cat": {"precision": 0.82, "recall": 0.9, "support": 10},
        EVIL: {"precision": 0.89, "recall": 0.8, "support": 10},
    }
    return {
        "model": "run",
        "photos": "holiday",
        "accuracy": 0.85,
        "balanced_accuracy": 0.85,
        "num_images": 20,
        "per_class": per_class,
        "confusion": [[9, 1], [2, 8]],
        "labels": ["cat", EVIL],
        "most_confused": [],
        "most_wrong": [],
        "skipped_files": [{"path": "cat/" + "long" * 40 + ".jpg", "reason": "truncated"}],
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    path = find_browser()
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)")
    with Browser(path, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    run = report(memory_samples=[[0.0, 300 * 2**20], [5.0, 420 * 2**20], [200.0, 423 * 2**20]], out="runs/my run")
    made = {
        "finetune": render_finetune_report(run, photos()),
        "evaluation": render_evaluation_report(evaluation(), photos()),
        "bench": render_bench_report(bench()),
    }
    for name, html in made.items():
        (folder / f"{name}.html").write_text(html, encoding="utf-8")
    return folder


@pytest.mark.parametrize("dark", [False, True], ids=["day", "night"])
@pytest.mark.parametrize("width", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("name", SHOWN)
def test_a_page_is_legible_and_asks_for_nothing(browser, pages, name, width, dark):
    path = pages / f"{name}.html"
    page = browser.open(path, width, dark=dark)
    assert page.complaints == []
    assert page.requests == [path.as_uri()]
    text = " ".join(page.run("return document.body.innerText").replace("\xa0", " ").split()).lower()
    for words in SHOWN[name]:
        assert words.lower() in text
    # nothing sticks out of the screen, but in boxes that scroll by themselves
    assert page.run("return document.documentElement.scrollWidth") <= width
    sticking = page.run(
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')"
        f" && e.getBoundingClientRect().right > {width} + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert sticking == []
    # nothing is too small to read, plots included
    small = page.run(
        "const found = []; const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);"
        "while (walk.nextNode()) { const e = walk.currentNode.parentElement;"
        " if (!walk.currentNode.data.trim() || e.closest('title,desc,style')) continue;"
        " const svg = e.closest('svg'); let scale = 1;"
        " if (svg && svg.viewBox.baseVal.width) scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;"
        " const size = parseFloat(getComputedStyle(e).fontSize) * scale;"
        " if (size < 9) found.push([size, walk.currentNode.data.slice(0, 40)]); } return found"
    )
    assert small == []


@pytest.mark.parametrize("name", SHOWN)
def test_pictures_and_plots_are_there(browser, pages, name):
    page = browser.open(pages / f"{name}.html", PHONE)
    sizes = page.run("return [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width])")
    assert len(sizes) == (0 if name == "bench" else len(photos()))
    assert all(own > 0 and shown >= 100 for own, shown in sizes)
    plots = page.run(
        "return [...document.querySelectorAll('svg')].map(s => { const b = s.getBoundingClientRect();"
        " return [b.width, b.height, s.querySelectorAll('path,rect,circle,polyline,line').length] })"
    )
    assert len(plots) >= PLOTS[name]
    assert all(width > 100 and height > 20 and shapes for width, height, shapes in plots)


@pytest.mark.parametrize("name", SHOWN)
def test_text_stands_out_by_day_and_by_night(browser, pages, name):
    """Contrast of at least 4.5 (WCAG 2.2, AA) between every text and the card it lies on; of 3 in plots, whose
    numbers on shades choose their own colour."""
    backgrounds = set()
    for dark in (False, True):
        page = browser.open(pages / f"{name}.html", DESK, dark=dark)
        weak, background = page.run(
            "const rgb = c => { const n = c.match(/[\\d.]+/g).map(Number); return n };"
            "const light = c => { const v = c.slice(0, 3).map(x => { x /= 255;"
            " return x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4 });"
            " return .2126 * v[0] + .7152 * v[1] + .0722 * v[2] };"
            "const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);"
            " if (c.length < 4 || c[3] > 0) return c } return [255, 255, 255] };"
            "const found = []; for (const e of document.querySelectorAll('h1,h2,h3,p,li,td,th,b,small,dt,code,summary,"
            "figcaption,footer,svg text')) { if (!e.textContent.trim()) continue;"
            " const plot = e.closest('svg'); if (e.style.fill.includes('--on-shade')) continue;"
            " const style = getComputedStyle(e); const a = light(rgb(plot ? style.fill : style.color));"
            " const b = light(behind(plot ? plot : e)); const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);"
            " if (ratio < (plot ? 3 : 4.5)) found.push([ratio, e.outerHTML.slice(0, 100)]) }"
            "return [found, getComputedStyle(document.body).backgroundColor]"
        )
        assert weak == []
        backgrounds.add(background)
    assert len(backgrounds) == 2
