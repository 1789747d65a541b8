"""The bench's page, table and sentences show the figures they were given, and survive those they were not."""

from __future__ import annotations

import copy
import json
import math
import re
from typing import Any

import pytest
from test_report_html import EVIL, checked
from test_svg import HOSTILE
from test_terminal import shown

from wasi_edge.report.bench_html import render_bench_report
from wasi_edge.report.bench_table import bench_groups, bench_sentences, bench_table, count_text, figure, row_name

MB = 2**20
SPEED, EPSILON, PARETO, ERRORS = (
    "training, × vanilla by",
    "Speed and memory against",
    "peak memory, MB by tr",
    "does to the",
)
PREDICTED, PAPER, STOPS = "predicted, ms/image by", "As the paper counts", "where WASI stops paying"


def row(method: str, train: float = 1.0, infer: float = 1.0, peak: float = 1870, **changes: Any) -> dict[str, Any]:
    full = {
        "method": method,
        "model": "vit_base_patch16_224",
        "batch": 8,
        "epsilon": None,
        "rank": None,
        "train_ms_per_image": 620 / train,
        "infer_ms_per_image": 205 / infer,
        "train_speedup": train,
        "infer_speedup": infer,
        "train_speedup_spread": [train - 0.04, train + 0.04],
        "infer_speedup_spread": [infer - 0.02, infer + 0.03],
        "train_bound": 1.0,
        "infer_bound": 1.0,
        "upkeep_fraction": 0.0,
        "gradient_error": None,
        "gradient_error_by_kind": None,
        "peak_rss_bytes": peak * MB,
        "trainable_parameters": 85_800_000,
        "stored_parameters": 86_600_000,
        "ranks": {},
        "synthetic": False,
        "samples": 24,
        "flops": {"train": 105e9, "infer": 35e9, "upkeep": 0.0},
        "paper": {
            "train_flops": 99e9,
            "infer_flops": 33e9,
            "upkeep_flops": 0.0,
            "memory_bytes": 700 * MB,
            "memory_ratio": 1.0,
        },
        "watts": None,
        "joules_per_image": None,
        "plan": None,
    }
    return {**full, **changes}


def wasi(epsilon: float, train: float, infer: float, peak: float, **changes: Any) -> dict[str, Any]:
    full = {
        "epsilon": epsilon,
        "rank": 32,
        "train_bound": 2.21 if epsilon == 0.8 else 3.56,
        "infer_bound": 1.68,
        "upkeep_fraction": 0.081,
        "gradient_error": 0.134,
        "gradient_error_by_kind": {"fc2": 0.151, "qkv": 0.092, "extra": 0.3},
        "ranks": {"blocks.0.qkv": 307, "blocks.1.qkv": 290, "blocks.0.fc1": 360},
        "paper": {
            "train_flops": 33e9,
            "infer_flops": 20e9,
            "upkeep_flops": 0.7e9,
            "memory_bytes": 91 * MB,
            "memory_ratio": 0.13,
        },
    }
    return {**row("wasi", train, infer, peak), **full, **changes}


def bench(**changes: Any) -> dict[str, Any]:
    measured = [("vanilla", 620.0, 632.0), ("vanilla", 150.0, 141.0), ("wasi", 333.0, 320.0)]
    state = {"temperature_celsius": 48.2, "throttled": False, "governor": "ondemand"}
    budget = {"method": "wasi@512MB", "plan": {"micro_batch": 2, "weight_bits": 16}}
    full = {
        "status": "completed",
        "hardware": {
            "machine": "aarch64",
            "cpu": "Cortex-A76",
            "memory_bytes": 8192 * MB,
            "threads": 4,
            "before": state,
            "after": {**state, "temperature_celsius": 71.5},
        },
        "versions": {"torch": "2.13.0"},
        "settings": {"model": "vit_base_patch16_224", "batches": [8], "epsilons": [0.8, 0.6], "quick": False},
        "results": [
            row("vanilla"),
            row("vanilla+checkpoint", 0.76, 1.0, 1500),
            row("lora", 1.33, 0.99, 1845, trainable_parameters=589_824),
            row("head", 3.1, 1.0, 846),
            wasi(0.8, 1.86, 1.52, 804),
            wasi(0.6, 2.62, 2.31, 640),
            wasi(0.8, 1.44, 1.52, 505, **budget),
        ],
        "cost_model": {
            "measurements": [
                {"method": name, "tokens": 197, "train_ms_per_image": real, "predicted_ms_per_image": predicted}
                for name, real, predicted in measured
            ],
            "terms": [{"method": "wasi", "term": "upkeep", "ms_per_unit": 0.00123, "unit": "layer"}],
            "median_error": 0.07,
            "break_even": {"rank_share": 0.81, "batch": 2, "note": "upkeep outweighs the rest below."},
        },
    }
    return {**full, **changes}


def synthetic(result: dict[str, Any]) -> dict[str, Any]:
    nothing = {"synthetic": True, "gradient_error": None, "gradient_error_by_kind": None}
    return {**result, "results": [{**each, **nothing} for each in result["results"]]}


def page_rows(text: str) -> list[list[str]]:
    """The cells of every table row of the page."""
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    return [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", cells) for cells in rows]


# ---- sentences ---------------------------------------------------------------------------------


def test_the_sentences_say_it_with_spread_and_bound() -> None:
    assert bench_sentences(bench()) == [
        "wasi at epsilon 0.8 trains 1.86x as fast as vanilla (1.82 to 1.90) of at most 2.21x that the FLOPs allow, "
        "in 0.43 of the memory.",
        "It infers 1.52x as fast as vanilla (1.50 to 1.55) of at most 1.68x that the FLOPs allow; its gradients are "
        "off by 0.13 on real photos at rank 32.",
        "At epsilon 0.6 it trains 2.62x and infers 2.31x as fast.",
        "Against lora it trains 1.40x as fast.",
    ]


def test_synthetic_weights_are_named_and_claim_no_gradient() -> None:
    first, second, *_ = bench_sentences(synthetic(bench()))
    assert first.startswith("wasi at epsilon 0.8 (synthetic weights) trains 1.86x")
    assert "cannot be told from synthetic weights" in second and "off by" not in second


def test_copies_of_windows_are_said_where_there_are_windows() -> None:
    with_windows = wasi(0.8, 1.86, 1.62, 470, window_copies_fraction=0.012)
    result = bench(results=[row("vanilla", 1.0, 1.0, 1100), with_windows])
    sentences = bench_sentences(result)
    assert any("1 % of a training step bring tokens to other windows" in sentence for sentence in sentences)
    assert "window copies, of the step" in render_bench_report(result)


def test_several_batches_are_told_apart() -> None:
    small = {"batch": 1, "train_speedup": 1.12}
    result = bench(results=[*bench()["results"], {**row("vanilla"), "batch": 1}, {**wasi(0.8, 1, 1, 500), **small}])
    sentences = bench_sentences(result)
    assert sentences[0].startswith("wasi at epsilon 0.8 and batch 8 trains")
    assert "By batch size it trains 1.12x at batch 1 and 1.86x at batch 8." in sentences
    assert [group.title for group in bench_groups(result)] == [
        "vit_base_patch16_224, batch 8",
        "vit_base_patch16_224, batch 1",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"results": []}, ["Nothing was compared with vanilla."]),
        ({"results": None, "status": "failed", "error": "no memory."}, ["The bench failed: no memory."]),
        ({"results": [row("vanilla")]}, ["Nothing was compared with vanilla."]),
        ({"status": "interrupted"}, ["Interrupted; what was measured before stands."]),
        ({"results": [row("vanilla"), row("lora", 1.33)]}, ["lora trains 1.33x as fast as vanilla"]),
        ({"results": [{"method": "wasi", "train_speedup": 1.5}]}, ["wasi trains 1.50x as fast as vanilla."]),
    ],
)
def test_what_there_is_to_say_when_little_was_measured(changes: dict[str, Any], expected: list[str]) -> None:
    sentences = bench_sentences(bench(**changes))
    assert 1 <= len(sentences) <= 4
    assert all(said.startswith(wanted) for said, wanted in zip(sentences, expected, strict=False))


# ---- the page ----------------------------------------------------------------------------------


def test_the_page_shows_the_figures_it_was_given() -> None:
    text = render_bench_report(bench())
    page, rows = checked(text), page_rows(text)
    assert [
        "wasi 0.8", "1.86", "1.82 to 1.90", "2.21", "1.52", "1.50 to 1.55", "1.68", "333", "135", "0.13", "804 MB",
    ] in rows  # fmt: skip
    assert ["wasi 0.8", "0.43", "8 %", "32", "85.8 M", "86.6 M", "24", "–"] in rows
    assert ["lora", "0.99", "0 %", "–", "590 k", "86.6 M", "24", "–"] in rows
    assert ["wasi@512MB 0.8", "0.09", "0.15", "0.30", "0.13"] in rows  # qkv and fc2 before a kind nobody knows
    assert ["method", "qkv", "fc2", "extra", "all"] in rows and ["method", "qkv", "fc1"] in rows
    assert ["wasi 0.6", "290 to 307", "360"] in rows
    assert ["wasi", "upkeep", "0.00123", "layer"] in rows
    assert ["temperature", "48.2 °C", "71.5 °C"] in rows and ["governor", "ondemand", "ondemand"] in rows
    for part in (bench_sentences(bench())[0], "micro batch 2, weight bits 16", "Cortex-A76", "8192 MB", "2.13.0",
                 "WASI breaks even at a rank share (K over the smaller side) of 0.81 and at a batch of 2; upkeep "
                 "outweighs the rest below.", "median error of a prediction is 7 %", "finished"):  # fmt: skip
        assert part in page.text, part
    assert "ynthetic" not in page.text and "throttled)" not in page.text and "watts" not in page.text


def test_paper_figures_stand_beside_measured_ones_and_apart_from_process_memory() -> None:
    text = render_bench_report(bench())
    rows = page_rows(text)
    assert [
        "wasi 0.8", "33.0 GFLOP", "3.00", "1.86", "20.0 GFLOP", "1.65", "1.52", "700 MFLOP", "91 MB", "0.13", "804 MB",
        "0.43",
    ] in rows  # fmt: skip
    assert "The paper counts linear layers only, and on paper" in checked(text).text
    result = bench()
    for each in result["results"]:
        del each["paper"]["memory_ratio"]
    assert "0.13" in next(cells for cells in page_rows(render_bench_report(result)) if "91 MB" in cells)


def test_energy_is_shown_where_it_was_read() -> None:
    result = bench()
    result["results"][4] |= {"watts": 6.84, "joules_per_image": 2.28}
    rows = page_rows(render_bench_report(result))
    assert ["wasi 0.8", "0.43", "8 %", "32", "85.8 M", "86.6 M", "6.84", "2.28", "24", "–"] in rows


def test_synthetic_weights_are_marked_in_every_group() -> None:
    text = render_bench_report(synthetic(bench()))
    page = checked(text)
    assert "<span class='mark'>synthetic weights</span>" in text and "weights are random" in page.text
    headings = re.findall(r"<h3>vit_base.*?</h3>", text)
    assert headings and all("<span class='mark'>synthetic</span>" in heading for heading in headings)
    assert ERRORS not in page.text and "synthetic weights" in shown(bench_table(synthetic(bench())))


def test_rows_are_marked_where_only_some_are_synthetic() -> None:
    result = bench()
    result["results"][4]["synthetic"] = True
    text = render_bench_report(result)
    assert "<h3>vit_base_patch16_224, batch 8</h3>" in text and "wasi 0.8 synthetic" in checked(text).text
    assert "<span class='mark'>quick" in render_bench_report(bench(settings={"quick": True}))


@pytest.mark.parametrize(
    ("before", "after", "warned", "cell"),
    [
        (False, True, True, "yes"),
        (False, False, False, "no"),
        (None, None, False, "–"),
        ("0x0", "0x0", False, "no"),
        ("throttled=0x0", "throttled=0x50005", True, "0x50005"),
        (0, 0x20002, True, "0x20002"),
        (0x50000, 0x50000, False, "0x50000"),  # it happened since boot, but not now and not meanwhile
        (0, 0x50000, True, "0x50000"),
        ([], [], False, "none"),
    ],
)
def test_throttling_is_said_in_words_where_it_happened(before: Any, after: Any, warned: bool, cell: str) -> None:
    text = render_bench_report(bench(hardware={"before": {"throttled": before}, "after": {"throttled": after}}))
    assert ("milliseconds do not" in checked(text).text) == warned
    assert next(cells for cells in page_rows(text) if cells[0] == "throttled")[2] == cell


def without(result: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {**result, "results": [{k: v for k, v in each.items() if k not in keys} for each in result["results"]]}


def test_each_plot_appears_with_its_data() -> None:
    text = render_bench_report(bench())
    labels = re.findall(r'aria-label="([^"]*)"', text)
    assert [label.split(" by ")[0] for label in labels] == [
        "training, × vanilla",
        "inference, × vanilla",
        "peak memory, MB",
        "peak memory, MB",
        "predicted, ms/image",
    ]
    assert "wasi, wasi@512MB, bound of wasi" in labels[0] and "lora (1.33)" in text
    assert "vanilla+checkpoint (1500)" in text


@pytest.mark.parametrize(
    ("result", "gone", "kept"),
    [
        (bench(results=[row("vanilla"), wasi(0.8, 1.86, 1.52, 804)]), (EPSILON, SPEED), (PARETO, PREDICTED)),
        (bench(results=[wasi(0.8, 1.86, 1.52, 804)]), (EPSILON, SPEED, PARETO), (PREDICTED, ERRORS)),
        (bench(results=[]), (EPSILON, PARETO, PAPER, ERRORS, "Methods<"), (PREDICTED,)),
        (bench(cost_model=None), (PREDICTED, STOPS), (SPEED, PARETO)),
        (bench(cost_model={"measurements": bench()["cost_model"]["measurements"][:1]}), (PREDICTED,), (STOPS,)),
        (bench(cost_model={"median_error": 0.1}), (PREDICTED,), (STOPS,)),
        (without(bench(), "peak_rss_bytes"), (PARETO, "peak memory"), (SPEED,)),
        (without(bench(), "train_speedup"), (SPEED,), ("inference, × vanilla by", PARETO)),
        (without(bench(), "gradient_error_by_kind"), (ERRORS,), (SPEED,)),
        (without(bench(), "paper"), (PAPER,), (SPEED,)),
    ],
)
def test_no_plot_and_no_section_without_its_data(
    result: dict[str, Any], gone: tuple[str, ...], kept: tuple[str, ...]
) -> None:
    text = render_bench_report(result)
    checked(text)
    body = text.split("</style>")[1].replace("Peak memory", "")
    assert [part for part in gone if part in body] == [] and [part for part in kept if part not in body] == []


@pytest.mark.parametrize("value", [None, math.nan, "text", [None, -1]])
def test_any_value_may_be_missing_or_wrong(value: Any) -> None:
    """At every place of the dictionary in turn: absent, or something else than agreed."""
    whole = bench()
    whole["results"] = whole["results"][:1] + whole["results"][4:6]
    places: list[tuple[Any, ...]] = [(key,) for key in whole]
    places += [("results", 1)] + [("results", i, key) for i in (0, 1) for key in whole["results"][1]]
    places += [("hardware", key) for key in whole["hardware"]] + [("hardware", "after", "temperature_celsius")]
    places += [("cost_model", key) for key in whole["cost_model"]] + [("settings", "model")]
    places += [("cost_model", "measurements", 0, key) for key in whole["cost_model"]["measurements"][0]]
    places += [("results", 1, "paper", key) for key in whole["results"][1]["paper"]]
    for *path, last in places:
        result = copy.deepcopy(whole)
        inner: Any = result
        for key in path:
            inner = inner[key]
        inner[last] = value
        checked(render_bench_report(result))
        shown(bench_table(result))
        assert 1 <= len(bench_sentences(result)) <= 4
        if value is None and isinstance(inner, dict):
            del inner[last]
            checked(render_bench_report(result))
            shown(bench_table(result))
    checked(render_bench_report({}))


def test_somebody_elses_text_stays_text() -> None:
    evil = {"method": EVIL, "model": EVIL, "plan": {EVIL: EVIL}, "ranks": {EVIL: 3}}
    kinds = {"gradient_error_by_kind": {EVIL: 0.1}}
    text = render_bench_report(
        bench(
            status=EVIL,
            error=EVIL,
            hardware={EVIL: {EVIL: EVIL}, "cpu": "b\x00\ud800", "after": {EVIL: EVIL, "throttled": EVIL}},
            versions={EVIL: EVIL},
            settings={"model": EVIL, EVIL: EVIL},
            results=[row("vanilla", model=EVIL), wasi(0.8, 1.5, 1.5, 800, **evil, **kinds), row(EVIL, 1.2, model=EVIL)],
            cost_model={
                "measurements": [
                    {"method": EVIL, "train_ms_per_image": 1, "predicted_ms_per_image": i} for i in (1, 2)
                ],
                "terms": [{"method": EVIL, "term": EVIL, "unit": EVIL}],
                "break_even": {"note": EVIL},
            },
        )
    )
    assert "<script" not in text and EVIL in checked(text).text
    hostile = bench(results=[row("vanilla"), row(HOSTILE, 1.2, model=HOSTILE)], status="failed", error=HOSTILE)
    assert "\x1b" not in shown(bench_table(hostile)) + "".join(bench_sentences(hostile))


def test_a_result_read_back_from_json_renders_the_same() -> None:
    assert render_bench_report(json.loads(json.dumps(bench()))) == render_bench_report(bench())


# ---- the terminal ------------------------------------------------------------------------------


def test_the_table_fits_eighty_columns_with_every_figure_whole() -> None:
    lines = [" ".join(line.split()) for line in shown(bench_table(bench())).splitlines()]
    assert lines[0] == "vit_base_patch16_224, batch 8"
    at = next(i for i, line in enumerate(lines) if line.startswith("wasi 0.8"))
    assert lines[at] == "wasi 0.8 1.86 of 2.21 1.52 of 1.68 333 804 MB 0.13"
    assert lines[at + 1] == "1.82 to 1.90 1.50 to 1.55 135 0.43"
    assert any(line.startswith("vanilla+checkpoint ") for line in lines)
    assert "nothing was measured" in shown(bench_table({}))


def test_columns_without_figures_are_left_out() -> None:
    text = shown(bench_table(bench(results=[{"method": "vanilla", "train_ms_per_image": 620.4}])))
    assert "620" in text and "gradient" not in text and "peak" not in text and "bound" not in text


def test_words() -> None:
    assert [figure(value) for value in (620.4, 88.66, 2.284, 0.0, 0.0123, None, math.nan)] == [
        "620", "88.7", "2.28", "0.0000", "0.0123", "–", "–",
    ]  # fmt: skip
    assert [count_text(value) for value in (85_800_000, 589_824, 384, 0, None)] == ["85.8 M", "590 k", "384", "0", "–"]
    assert count_text(35.1e9, "FLOP") == "35.1 GFLOP" and count_text(12, "FLOP") == "12 FLOP"
    assert row_name({"method": "wasi", "epsilon": 0.8}) == "wasi 0.8" and row_name({}) == "?"
