"""The report is one self-contained, well-formed page whatever the run left behind, and leaks no metadata."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wasi_edge.errors import ArtefactError
from wasi_edge.report.html import render_finetune_report
from wasi_edge.report.page import write_page
from wasi_edge.report.sections import ReportPhoto

MB = 2**20
VOID = {"meta", "img", "br", "link", "input", "hr"}
EVIL = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Checks nesting, and collects what could reach outside: every address and every element's name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action")]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).replace("\xa0", " ").split())


def report(**changes: Any) -> dict[str, Any]:
    history = [{"epoch": 0, "train_loss": None, "train_accuracy": None, "val_accuracy": 0.79, "val_loss": 0.7}]
    history += [
        {
            "epoch": e,
            "train_loss": 1 / e,
            "train_accuracy": 0.9,
            "val_accuracy": 0.8 + e / 50,
            "val_loss": 0.5,
        }
        for e in (1, 2, 3)
    ]
    full = {
        "status": "completed",
        "model": "vit-s14",
        "method": "wasi",
        "epsilon": 0.8,
        "budget_bytes": 512 * MB,
        "planned_peak_rss_bytes": 446 * MB,
        "peak_rss_bytes": 423 * MB,
        "peak_swap_bytes": 0,
        "plan": {
            "micro_batch": 4,
            "keep": "compact",
            "an_unknown_key": [1, 2],
            "memory": [{"item": "libraries and interpreter", "bytes": 238 * MB}],
        },
        "planned_seconds": 510.0,
        "trained_blocks": 12,
        "effective_batch": 16,
        "optimizer_steps": 99,
        "resumed_from_step": None,
        "classes": ["cat", "dog"],
        "num_train_images": 80,
        "num_val_images": 20,
        "skipped_files": [{"path": "cat/x.jpg", "reason": "truncated"}],
        "epochs_run": 3.0,
        "epochs_planned": 3,
        "train_seconds": 474.0,
        "images_per_second": 8.8,
        "head_only_val_accuracy": 0.79,
        "best_val_accuracy": 0.86,
        "best_epoch": 3,
        "final_val_accuracy": 0.86,
        "history": history,
        "seed": 0,
        "versions": {"torch": "2.13.0"},
        "hardware": {"cpu": "Cortex-A76", "memory_bytes": 8192 * MB},
        "confusion": [[9, 1], [2, 8]],
        "memory_samples": [[0.5 * i, (200 + i % 9) * MB] for i in range(900)],
    }
    return {**full, **changes}


def photo(true: str = "cat", said: str = "cat", sure: float = 0.9, name: str = "a.jpg") -> ReportPhoto:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    return ReportPhoto(pixels, true, said, sure, name)


def checked(text: str) -> Page:
    """Well-formed, self-contained, its plots valid XML."""
    page = Page(text)
    bare = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http://" not in bare and "https://" not in bare and 'src="//' not in bare and "@import" not in bare
    assert not page.names & {"script", "link", "iframe", "object", "embed"} and "url(" not in bare
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(svg)
    assert "width=device-width" in text and "prefers-color-scheme:dark" in text
    return page


def test_the_headline_says_it_in_plain_words() -> None:
    page = checked(render_finetune_report(report(), [photo()]))
    expected = (
        "Recognises your 2 classes with 86 % accuracy on 20 photos it never trained on; 7.9 min; "
        "peak 423 MB of a 512 MB budget."
    )
    assert expected in page.text
    for part in (
        "wasi-edge predict RUN photo.jpg",
        "1 file: truncated",
        "an unknown key",
        "1, 2",
        "Cortex-A76",
        "2 photos of dog taken for cat",
        "best after epoch 3",
    ):
        assert part in page.text, part


@pytest.mark.parametrize("key", [*report(), None])
def test_any_key_may_be_missing_or_null(key: str | None) -> None:
    whole = report()
    if key is None:
        checked(render_finetune_report({}, []))
        return
    checked(render_finetune_report({**whole, key: None}, [photo()]))
    del whole[key]
    checked(render_finetune_report(whole, [photo()]))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"status": "interrupted", "epochs_run": 1.5},
            "Interrupted after 1.5 of 3 epochs; so far it recognises",
        ),
        ({"status": "early_stopped"}, "stopped early"),
        ({"status": "time_limit"}, "stopped at the time limit"),
        ({"status": "something_new"}, "something_new"),
        (
            {
                "status": "failed",
                "error": "disk full",
                "best_val_accuracy": None,
                "final_val_accuracy": None,
                "head_only_val_accuracy": None,
                "history": [],
            },
            "The run failed: disk full;",
        ),
        (
            {
                "status": "planned",
                "best_val_accuracy": None,
                "final_val_accuracy": None,
                "head_only_val_accuracy": None,
            },
            "A plan for your 2 classes; nothing was trained;",
        ),
        (
            {
                "num_val_images": 0,
                "best_val_accuracy": None,
                "final_val_accuracy": None,
                "head_only_val_accuracy": None,
                "confusion": [[0, 0], [0, 0]],
            },
            "Learned your 2 classes from 80 photos, with no photos held back to test it on;",
        ),
        ({"best_val_accuracy": 0.9999}, "99.9 % accuracy"),
        ({"best_val_accuracy": math.nan, "final_val_accuracy": math.nan}, "79 % accuracy"),
        ({"classes": ["cat"]}, "your 1 class with"),
        ({"peak_swap_bytes": 9 * MB}, "and 9 MB swapped"),
    ],
)
def test_every_way_a_run_can_end(changes: dict[str, Any], expected: str) -> None:
    assert expected in checked(render_finetune_report(report(**changes), [])).text


def test_a_failed_run_without_a_model_offers_no_prediction() -> None:
    text = checked(render_finetune_report({"status": "failed", "error": "x"}, [])).text
    assert "predict" not in text and "--resume" in text


def test_head_only_has_no_curves() -> None:
    text = render_finetune_report(report(method="head", epochs_run=0, epochs_planned=0, history=[{"epoch": 0}]))
    assert "How it learned" not in checked(text).text and "Fine-tuning gained" not in text


def test_a_continued_run() -> None:
    since = {
        "old_classes": ["cat"],
        "new_classes": ["dog"],
        "absent_classes": ["owl"],
        "old_class_accuracy_before": 0.7,
        "old_class_accuracy": 0.72,
        "new_class_accuracy": None,
    }
    text = checked(render_finetune_report(report(continued_from=since), [])).text
    assert "known before cat 70 % 72 %".replace(" ", "") in text.replace(" ", "")
    assert "Without photos this time: owl." in text
    checked(render_finetune_report(report(continued_from=dict.fromkeys(since)), []))


def test_forty_classes_and_one_without_photos() -> None:
    names = [f"class number {i}" for i in range(40)]
    matrix = [[3 if i == j and i else 0 for j in range(40)] for i in range(40)]
    assert "class number 39" in checked(render_finetune_report(report(classes=names, confusion=matrix), [])).text


def test_somebody_elses_text_stays_text() -> None:
    since = {"old_classes": [EVIL], "new_classes": [EVIL], "absent_classes": [EVIL], EVIL: EVIL}
    text = render_finetune_report(
        report(
            status=EVIL,
            model=EVIL,
            method=EVIL,
            error=EVIL,
            classes=[EVIL, "b\x00\ud800"],
            out=f"/home/{EVIL}",
            skipped_files=[{"path": EVIL, "reason": EVIL}],
            plan={EVIL: EVIL, "memory": [{"item": EVIL, EVIL: 1}]},
            versions={EVIL: EVIL},
            hardware={EVIL: {EVIL: EVIL}},
            continued_from=since,
        ),
        [photo(EVIL, "x", 0.5, EVIL), photo(EVIL, EVIL, 0.5, EVIL)],
    )
    page = checked(text)
    assert "<script" not in text and EVIL in page.text


def test_embedded_photos_carry_no_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "SecretCamera"
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)
    Image.new("RGB", (300, 300), "red").save(tmp_path / "gps.jpg", exif=exif)
    with Image.open(tmp_path / "gps.jpg") as source:
        assert dict(source.getexif())
        pixels = np.asarray(source.convert("RGB"))
    text = render_finetune_report(report(), [ReportPhoto(pixels, "cat", "dog", 0.8, "gps.jpg")])
    (encoded,) = re.findall(r"data:image/jpeg;base64,([^'\"]+)", text)
    data = base64.b64decode(encoded)
    with Image.open(io.BytesIO(data)) as image:
        assert not dict(image.getexif()) and "exif" not in image.info and max(image.size) <= 192
    assert b"Exif" not in data and b"SecretCamera" not in data and len(data) < 20_000


def test_wrong_photos_come_first_and_surest_first() -> None:
    photos = [photo(sure=0.99, name="right")]
    photos += [photo(said="dog", sure=p, name=f"wrong{p}") for p in (0.6, 0.9, 0.7)]
    names = re.findall(r"<figure class='(?:wrong|right)' title='([^']+)'", render_finetune_report(report(), photos))
    assert names == ["wrong0.9", "wrong0.7", "wrong0.6", "right"]


def test_a_peak_survives_thinning() -> None:
    samples = [[i * 0.5, 100 * MB] for i in range(5000)]
    samples[1234][1] = 600 * MB
    text = render_finetune_report(report(memory_samples=samples, budget_bytes=None, planned_peak_rss_bytes=None))
    path = re.findall(r'<path d="([^"]*)"', text)[-1]
    heights = {float(y) for y in re.findall(r"[ML][0-9.]+ ([0-9.]+)", path)}
    assert len(heights) == 2 and path.count("L") < 320


def test_write_report_replaces_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_page(path, "<p>new 写真 \ud800</p>")
    assert path.read_text(encoding="utf-8") == "<p>new 写真 ?</p>" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ArtefactError, match="cannot be written"):
        write_page(tmp_path / "absent" / "report.html", "x")
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_read_back_from_json_renders_the_same() -> None:
    whole = report()
    assert render_finetune_report(json.loads(json.dumps(whole))) == render_finetune_report(whole)
