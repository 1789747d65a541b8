"""Counts against a profiler of operations, fair timing, names of methods, and the command from outside."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from models import MIXED, TINY, dense_reader, random_tensors
from reference import one_thread  # noqa: F401
from test_finetune import render
from tiny_artefact import write_tiny
from torch.utils.flop_counter import FlopCounterMode

from wasi_edge.bench.contestant import Entry, parse_methods
from wasi_edge.bench.cost_model import POINTS, Point, break_even, fit, summarise
from wasi_edge.bench.flops import paper_count, step_flops
from wasi_edge.bench.gradient import Sample, gradient_errors
from wasi_edge.bench.subject import find_subject
from wasi_edge.bench.timing import Timed, interleave
from wasi_edge.chunks import padded_rank
from wasi_edge.errors import UsageError
from wasi_edge.keep import EXACT
from wasi_edge.layers.linear import LinearKinds
from wasi_edge.layers.saving import Pass
from wasi_edge.method import Method
from wasi_edge.models.lora import build_lora
from wasi_edge.models.network import build_network
from wasi_edge.models.vanilla import build_vanilla

RANK, GRADIENT_RANK, SIZE, BATCH, CLASSES = 6, 5, 16, 4, 3
TOKENS = TINY.tokens(SIZE)
HEAD = 2 * TINY.feature_width * CLASSES  # not counted: the classifier


def ranks_of(rank: int | None) -> dict[str, int | None]:
    return dict.fromkeys(TINY.linear_shapes(), rank)


def pixels() -> torch.Tensor:
    return torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def operations(work) -> dict[str, int]:
    """FLOPs by operator."""
    with FlopCounterMode(display=False) as counter:
        work()
    return {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}


def products(work) -> float:
    """FLOPs of plain products for one image."""
    return sum(count for name, count in operations(work).items() if name in ("aten.mm", "aten.addmm")) / BATCH


def attention(factor: int) -> int:
    return factor * 2 * TOKENS * TOKENS * TINY.width * TINY.depth


def test_forward_and_backward_of_the_dense_network_are_counted_as_a_profiler_counts_them():
    _, tensors = random_tensors(TINY, None, CLASSES, dtype=torch.float32)
    model = build_vanilla(TINY, dense_reader(tensors), SIZE, CLASSES)
    counted = step_flops(TINY, SIZE, ranks_of(None), Method.VANILLA, 0, BATCH)
    assert products(lambda: model(pixels())) - HEAD == counted.infer - attention(2)
    assert products(lambda: model(pixels()).sum().backward()) - 3 * HEAD == counted.train - attention(7)
    assert counted.upkeep == 0


@pytest.mark.parametrize("factored", [True, False])
def test_what_nobody_reads_in_the_last_block_is_neither_done_nor_counted(factored):
    geometry = dataclasses.replace(TINY, features="class")
    ranks, tensors = random_tensors(geometry, 7 if factored else None, CLASSES, dtype=torch.float32)
    held = ranks_of(padded_rank(7) if factored else None)
    counted = step_flops(geometry, SIZE, held, Method.WASI if factored else Method.VANILLA, 0, BATCH)
    scores = 2 * 2 * TOKENS * geometry.width * (TOKENS + 1)  # forward: in the first block of all tokens, then of one
    if factored:
        model = build_network(geometry, ranks, tensors.__getitem__, SIZE, head=False)
        with torch.no_grad():
            assert products(lambda: model.features(pixels(), Pass())) == counted.infer - scores
        return
    vanilla = build_vanilla(geometry, dense_reader(tensors), SIZE, CLASSES)
    head = 2 * geometry.feature_width * CLASSES
    assert products(lambda: vanilla(pixels())) - head == counted.infer - scores
    # autograd's gradient of queries is that of all tokens, zero but for one
    assert products(lambda: vanilla(pixels()).sum().backward()) - 3 * head == counted.train - 3.5 * scores


def test_low_rank_updates_are_counted_as_a_profiler_counts_them():
    _, tensors = random_tensors(TINY, None, CLASSES, dtype=torch.float32)
    model = build_lora(TINY, dense_reader(tensors), SIZE, CLASSES, 3, 0)
    counted = step_flops(TINY, SIZE, ranks_of(None), Method.LORA, 0, BATCH, lora_rank=3)
    # nothing learns before the first block, so autograd leaves the gradient of its input out
    first_input = 2 * TOKENS * (3 * TINY.width * TINY.width + 2 * 3 * TINY.width)
    measured = products(lambda: model(pixels()).sum().backward()) - 3 * HEAD
    assert measured == counted.train - attention(7) - first_input


@pytest.mark.parametrize(
    ("method", "rank"), [(Method.WASI, RANK), (Method.ASI, None), (Method.WASI, MIXED), (Method.WSI, MIXED)]
)
def test_the_passes_of_the_explicit_engine_are_counted_as_a_profiler_counts_them(method, rank):
    ranks, tensors = random_tensors(TINY, rank, CLASSES, dtype=torch.float32)
    model = build_network(TINY, ranks, tensors.__getitem__, SIZE, head=False, kinds=LinearKinds.of(method))
    generator = torch.Generator().manual_seed(0)
    for linear in model.linears().values():
        linear.start_training(GRADIENT_RANK, TOKENS, generator)
    run = Pass()

    def both() -> None:
        features, saved = model.features(pixels(), run, [EXACT] * TINY.depth)
        assert saved is not None
        model.backward(saved, torch.ones_like(features), run, lambda *_: None)

    # products run over padded ranks
    held = {name: rank and padded_rank(rank) for name, rank in ranks.items()}
    counted = step_flops(TINY, SIZE, held, method, GRADIENT_RANK, BATCH)
    with torch.no_grad():
        assert products(lambda: model.features(pixels(), run)) == counted.infer - attention(2)
        measured = products(both)
    # LayerScale's gradient: W U, small and once a pass
    scale = sum(
        2 * GRADIENT_RANK * (held[name] * (out + inner) if held[name] else out * inner)
        for name, (out, inner) in TINY.linear_shapes().items()
        if name.endswith(("proj", "fc2"))
    )
    assert measured == pytest.approx(counted.train - attention(7) + scale / BATCH, rel=1e-9)


def test_bounds_of_well_known_networks_are_those_that_were_derived():
    """DESIGN's table: 2.21 and 3.56 for training, 1.68 for inference, with upkeep inside a few percent."""
    subject = find_subject("vit_base_patch16_224")
    vanilla = step_flops(subject.geometry, 224, subject.ranks(None), Method.VANILLA, 0, 8)
    for epsilon, train in ((0.8, 2.21), (0.6, 3.56)):
        wasi = step_flops(subject.geometry, 224, subject.ranks(epsilon), Method.WASI, 32, 8)
        assert vanilla.train / (wasi.train + wasi.upkeep) == pytest.approx(train, rel=0.05)
    assert vanilla.infer / step_flops(
        subject.geometry, 224, subject.ranks(0.8), Method.WASI, 32, 8
    ).infer == pytest.approx(1.68, rel=0.01)


def test_the_paper_counts_weights_and_saved_inputs_of_linears_alone():
    vanilla = paper_count(TINY, SIZE, ranks_of(None), Method.VANILLA, GRADIENT_RANK, BATCH)
    wasi = paper_count(TINY, SIZE, ranks_of(RANK), Method.WASI, GRADIENT_RANK, BATCH)
    rows, expected, compressed = BATCH * TOKENS, 0, 0
    for out, inner in TINY.linear_shapes().values():
        expected += rows * inner + out * inner
        compressed += rows * GRADIENT_RANK + inner * GRADIENT_RANK + RANK * (out + inner)
    assert vanilla["memory_bytes"] == 4 * expected and vanilla["memory_ratio"] == 1.0
    assert wasi["memory_bytes"] == 4 * compressed and wasi["memory_ratio"] == compressed / expected
    assert vanilla["upkeep_flops"] == 0 < wasi["upkeep_flops"]


def test_frozen_factors_of_lora_need_no_iteration_and_the_inputs_of_its_adapters_alone():
    lora = paper_count(TINY, SIZE, ranks_of(RANK), Method.LORA, GRADIENT_RANK, BATCH)
    shapes = TINY.linear_shapes()
    weights = sum(RANK * (out + inner) for out, inner in shapes.values())
    kept = sum(BATCH * TOKENS * inner for name, (_, inner) in shapes.items() if name.endswith(".qkv"))
    assert lora["upkeep_flops"] == 0 and lora["memory_bytes"] == 4 * (weights + kept)


def test_rounds_are_interleaved_after_a_warm_up_and_ratios_taken_within_each():
    order: list[str] = []
    rounds: list[int] = []
    works = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timed = interleave(works, rounds=2, warm_up=1, on_round=rounds.append)
    assert order == list("abc") * 3 and rounds == [1, 2, 3]
    assert all(len(found.seconds) == 2 for found in timed.values())
    assert timed["a"].ratios == (1.0, 1.0)
    for found in timed.values():
        pairs = zip(timed["a"].seconds, found.seconds, found.ratios, strict=True)
        assert all(first / own == ratio for first, own, ratio in pairs)


def test_spread_is_the_quartiles_or_all_there_is():
    assert Timed((1.0,) * 3, (1.0, 3.0, 2.0)).spread == (1.0, 3.0)
    low, high = Timed((1.0,) * 5, (1.0, 2.0, 3.0, 4.0, 50.0)).spread
    assert 1.0 < low < 3.0 < high < 50.0


def test_methods_are_named_once_for_each_epsilon_and_vanilla_comes_first():
    entries = parse_methods("wasi, lora,wasi@512MB,vanilla+checkpoint", (0.8, 0.6))
    assert [(entry.name, entry.epsilon) for entry in entries] == [
        ("vanilla", None), ("wasi", 0.8), ("wasi", 0.6), ("lora", None), ("wasi@512MB", 0.8), ("wasi@512MB", 0.6),
        ("vanilla+checkpoint", None),
    ]  # fmt: skip
    assert entries[4].budget_bytes == 512 * 2**20 and entries[-1].is_checkpointed
    assert parse_methods("vanilla", (0.8,)) == [Entry("vanilla", Method.VANILLA)]


@pytest.mark.parametrize("name", ["qlora", "lora@512MB", "wasi+checkpoint", "", "wasi@lots"])
def test_a_method_that_is_none_is_a_usage_error(name):
    with pytest.raises(UsageError):
        parse_methods(name, (0.8,))


def test_synthetic_ranks_exist_for_the_known_epsilons_alone():
    subject = find_subject("vit_tiny_patch16_224")
    assert subject.is_synthetic and subject.ranks(0.8)["blocks.0.fc1"] == round(0.47 * 192)
    assert subject.ranks(0.6)["blocks.0.qkv"] == round(0.55 * 0.40 * 192)
    with pytest.raises(UsageError, match=r"0.8 and 0.6, not 0.7"):
        subject.ranks(0.7)


def test_a_complete_basis_has_no_error_and_a_larger_rank_a_smaller_one():
    ranks, tensors = random_tensors(TINY, RANK, CLASSES, dtype=torch.float32)
    build = lambda: build_network(TINY, ranks, tensors.__getitem__, SIZE, head=False)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    sample = Sample(torch.randn(300, 3, SIZE, SIZE, generator=generator), torch.arange(300) % CLASSES)
    with torch.no_grad():
        complete, by_kind = gradient_errors(build, 1000, sample, 2)
        small, smaller = (gradient_errors(build, rank, sample, 2)[0] for rank in (12, 3))
    assert complete < 1e-5 < small < smaller < 1
    assert set(by_kind) == {"qkv", "proj", "fc1", "fc2"}


# -------------------------------------------------------------------------------------------------- cost model


def test_coefficients_come_back_and_negative_ones_are_left_out():
    rng = np.random.default_rng(0)
    matrix = rng.uniform(1, 10, (12, 3))
    assert fit(matrix, matrix @ np.array([2.0, 0.5, 3.0])) == pytest.approx([2.0, 0.5, 3.0])
    found = fit(matrix, matrix @ np.array([2.0, -0.1, 3.0]))
    assert found[1] == 0 and (found >= 0).all()


def test_the_fitted_model_says_where_wasi_stops_paying():
    def times(method: Method, coefficients: tuple[float, float, float]) -> list[tuple[Point, float]]:
        points = [Point(*values) for values in POINTS]
        return [(point, float(np.dot(point.terms(method, 32), coefficients))) for point in points]

    # products of thin matrices take half as long again
    measured = {m: times(m, (each, 0.3, 0.1)) for m, each in ((Method.VANILLA, 8.0), (Method.WASI, 12.0))}
    found = summarise(measured, 32)
    assert found["median_error"] < 1e-6 and len(found["measurements"]) == 2 * len(POINTS)
    assert 0.3 < found["break_even"]["rank_share"] <= 1.0
    assert found["break_even"]["batch"] >= 1
    same = {Method.VANILLA: np.array([1.0, 0.0, 0.0]), Method.WASI: np.array([100.0, 0.0, 0.0])}
    assert break_even(same, 32)["batch"] is None


# ------------------------------------------------------------------------------------------------- the command

RESULT_KEYS = {
    "method", "model", "batch", "epsilon", "rank", "train_ms_per_image", "infer_ms_per_image", "train_speedup",
    "infer_speedup", "train_bound", "infer_bound", "upkeep_fraction", "gradient_error", "peak_rss_bytes",
    "trainable_parameters", "stored_parameters", "ranks", "synthetic", "samples",
}  # fmt: skip


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wasi_edge", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_bench_from_outside_has_the_contract(tmp_path):
    model = write_tiny(tmp_path / "model", labels=None)
    photos = render(tmp_path / "photos", per_class=130)
    methods = "vanilla,vanilla+checkpoint,lora,head,wsi,asi,wasi,wasi@600MB"
    sizes = ("--batch", 4, "--rank", 5, "--quick", "--photos", photos)
    done = bench("--model", model, "--methods", methods, *sizes, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"hardware", "versions", "settings", "results"} <= set(result)
    rows = {row["method"]: row for row in result["results"]}
    assert list(rows) == methods.split(",")
    for name, row in rows.items():
        assert set(row) >= RESULT_KEYS, name
        assert row["train_ms_per_image"] > 0 and row["peak_rss_bytes"] > 2**20 and not row["synthetic"]
        has_subspace = name in ("wsi", "asi", "wasi", "wasi@600MB")
        assert (row["upkeep_fraction"] is not None) == (row["gradient_error"] is not None) == has_subspace
    assert rows["vanilla"]["train_speedup"] == 1.0 and rows["wasi@600MB"]["plan"]["micro_batch"] >= 1
    assert 0 < rows["wsi"]["gradient_error"] < rows["wasi"]["gradient_error"] < 1
    assert rows["lora"]["trainable_parameters"] < rows["vanilla"]["trainable_parameters"]
    assert rows["wasi"]["stored_parameters"] < rows["vanilla"]["stored_parameters"]
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == result
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "qlora"), "is none of"),
        (("--batch", "many"), "--batch many"),
        (("--epsilon", "0.8,x"), "--epsilon 0.8,x"),
        (("--model", "vit_tiny_patch16_224", "--epsilon", "0.7"), "0.8 and 0.6"),
        (("--epsilon", "2"), "--epsilon must be"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(arguments, message):
    done = bench(*arguments, "--json")
    assert done.returncode == 2 and message in json.loads(done.stdout)["error"]
