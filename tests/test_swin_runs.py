"""Swin from conversion to prediction: calibrated factors, planned memory, whole runs from outside."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import random_tensors
from test_finetune import render, run
from test_planned_memory import RECIPE, bytes_of, train
from tiny_artefact import write_tiny

from wasi_edge.artefact import ModelConfig, open_artefact, write_artefact
from wasi_edge.chunks import CONVERSION_PHOTOS
from wasi_edge.conversion.budget import conversion_bytes
from wasi_edge.conversion.convert import Calibration, Settings, convert
from wasi_edge.conversion.sources import open_source
from wasi_edge.keep import Keep, Rebuild
from wasi_edge.layers.saving import Pass
from wasi_edge.method import Method
from wasi_edge.models.geometry_swin import SwinGeometry
from wasi_edge.models.network import build_network
from wasi_edge.planner.choices import Choices
from wasi_edge.planner.memory import fresh_bytes, training_items
from wasi_edge.planner.outlook import BUDGETS, outlook
from wasi_edge.planner.workload import Workload
from wasi_edge.preprocess import normalise
from wasi_edge.preprocessing import Preprocessing
from wasi_edge.training.trainer import SubspaceTrainer

TINY = SwinGeometry(patch_size=2, width=16, depths=(2, 2), stage_heads=(2, 4), window=4, mlp_ratio=2)
SMALL = SwinGeometry(patch_size=1, width=64, depths=(2, 2, 2), stage_heads=(2, 4, 8), window=7)
SIZE = 16


def write_swin(folder: Path, rank: int | None) -> Path:
    ranks, values = random_tensors(TINY, rank, None)
    config = ModelConfig("tiny swin", TINY, ranks, Preprocessing(image_size=SIZE), epsilon=0.8 if rank else None)
    with write_artefact(folder, config) as writer:
        for name, value in values.items():
            writer.add(name, value.numpy().astype(np.float32))
    return folder


def pixels(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    return colours.repeat(SIZE // 2, 1).repeat(SIZE // 2, 2) // 2 + rng.integers(
        0, 128, (count, SIZE, SIZE, 3), np.uint8
    )


def features_of(folder: Path, views: np.ndarray) -> torch.Tensor:
    with open_artefact(folder) as artefact, torch.no_grad():
        config = artefact.config
        read = lambda name: torch.from_numpy(artefact.tensors.read(name, np.float32))  # noqa: E731
        network = build_network(config.geometry, config.linears, read, SIZE, head=False)
        inputs = torch.from_numpy(normalise(views, config.preprocessing))
        return network.features(inputs, Pass())[0].clone()


def test_epsilon_1_keeps_every_output_and_calibration_keeps_them_better_than_plain_svd(tmp_path):
    dense = write_swin(tmp_path / "dense", None)
    seen, unseen = pixels(3 * CONVERSION_PHOTOS + 1, 1), pixels(16, 2)
    calibration = Calibration(len(seen), lambda index: seen[index])
    with open_source(dense) as source:
        for name, epsilon, photos in (("whole", 1.0, None), ("plain", 0.5, None), ("fitted", 0.5, calibration)):
            convert(source, tmp_path / name, Settings(epsilon, "float32", SIZE, epsilon < 1), photos)
    expected = features_of(dense, unseen)

    def error(name: str) -> float:
        return float((features_of(tmp_path / name, unseen) - expected).norm() / expected.norm())

    assert error("whole") < 1e-4
    assert 0 < error("fitted") < 0.8 * error("plain")


def test_factors_of_full_rank_make_the_merges_exact(tmp_path):
    """Every linear at its full rank: the walk over merged and shifted tokens must end where the dense network does."""
    dense = write_swin(tmp_path / "dense", None)
    seen = pixels(2 * CONVERSION_PHOTOS, 1)
    with open_source(dense) as source:
        full = {name: min(shape) for name, shape in TINY.linear_shapes().items()}
        calibration = Calibration(len(seen), lambda index: seen[index])
        settings = Settings(0.999999, "float32", SIZE, always_factor=True)
        convert(source, tmp_path / "out", settings, calibration)
    with open_artefact(tmp_path / "out") as artefact:
        merge = artefact.config.linears["blocks.2.merge"]
        assert merge is not None and merge <= full["blocks.2.merge"]
        assert not any(name.startswith("blocks.2.merge.bias") for name in artefact.tensors)


@pytest.mark.parametrize("image_size", [28, 56])
@pytest.mark.parametrize("keep", [Keep(Rebuild.NOTHING), Keep(Rebuild.NOTHING, False), Keep(Rebuild.BLOCK)])
def test_planned_buffers_cover_those_of_the_engine_by_less_than_a_half(keep, image_size):
    again = SMALL.depth if keep.rebuild else 0
    choices = Choices(
        micro_batch=4,
        trained_blocks=SMALL.depth,
        gradient_rank=8,
        compact=keep.compact,
        rebuilt_attention=again,
        rebuilt_branches=again,
        recomputed_blocks=again,
    )
    ranks, values = random_tensors(SMALL, 24, 3, dtype=torch.float32)
    model = build_network(SMALL, ranks, values.__getitem__, image_size, head=True)
    trainer = SubspaceTrainer(model, RECIPE, choices.keeps(), 8, seed=0)
    train(trainer, 4, 1, image_size)
    load = Workload(SMALL, image_size, ranks, 3, Method.WASI, augment_photo_bytes=0)
    planned = bytes_of(training_items(load, choices), "kept for", "buffers of")
    assert trainer.held_bytes() <= planned <= 1.45 * trainer.held_bytes() + fresh_bytes(load, 4)


def test_what_a_conversion_takes_follows_the_widest_block():
    swin_t = SwinGeometry(4, 96, (2, 2, 6, 2), (3, 6, 12, 24), window=7)
    assert conversion_bytes(swin_t, 224, 0, 0) < 200 * 2**20
    assert conversion_bytes(swin_t, 224, 64, 0) > conversion_bytes(swin_t, 224, 16, 0)


def test_the_outlook_grows_with_the_budget_and_names_what_is_too_small():
    swin_t = SwinGeometry(4, 96, (2, 2, 6, 2), (3, 6, 12, 24), window=7)
    ranks = {name: min(shape) // 2 for name, shape in swin_t.linear_shapes().items()}
    rows = outlook(swin_t, 224, ranks, 256)
    assert [row["budget_bytes"] for row in rows] == list(BUDGETS)
    assert rows[0]["smallest_budget_bytes"] > BUDGETS[0]
    planned = [row for row in rows if "peak_bytes" in row]
    assert len(planned) >= 3 and all(row["peak_bytes"] <= row["budget_bytes"] for row in planned)
    blocks = [row["trained_blocks"] for row in planned]
    assert blocks == sorted(blocks) and blocks[-1] == swin_t.depth / 2


@pytest.mark.parametrize("more", [(), ("--train-blocks", "2"), ("--method", "lora"), ("--method", "vanilla")])
def test_a_run_from_photos_to_predictions(tmp_path, more):
    photos, model = render(tmp_path / "photos"), write_swin(tmp_path / "model", 6 if not more else None)
    out = tmp_path / "run"
    trained = run(
        "finetune", photos, "--model", model, "--out", out, "--budget", "700MB", "--epochs", "3", "--json", *more
    )
    assert trained.returncode == 0, trained.stderr
    report = json.loads(trained.stdout)
    assert report["status"] == "completed" and report["peak_rss_bytes"] <= 700 * 2**20
    assert report["best_val_accuracy"] == 1.0
    predicted = run("predict", out, photos / "red", "--json")
    assert predicted.returncode == 0, predicted.stderr
    assert {row["label"] for row in json.loads(predicted.stdout)} == {"red"}
    described = json.loads(run("info", out, "--json").stdout)
    assert described["architecture"] == "swin" and described["geometry"]["depths"] == [2, 2]


def test_a_run_at_another_size_stores_the_tables_of_its_windows(tmp_path):
    photos, model = render(tmp_path / "photos"), write_swin(tmp_path / "model", 6)
    arguments = (
        "--model",
        model,
        "--out",
        tmp_path / "run",
        "--budget",
        "700MB",
        "--epochs",
        "1",
        "--image-size",
        "24",
    )
    assert run("finetune", photos, *arguments, "--image-size", "24").returncode == 0
    with open_artefact(tmp_path / "run") as artefact:
        assert artefact.config.geometry == dataclasses.replace(TINY, window=6)
        assert artefact.tensors.shape("blocks.0.attention.bias_table") == (121, 2)
    assert run("predict", tmp_path / "run", photos / "red").returncode == 0


def test_the_bench_measures_swin(tmp_path):
    methods = "vanilla,vanilla+checkpoint,lora,wasi"
    model = write_swin(tmp_path / "model", 6)
    done = run("bench", "--model", model, "--quick", "--batch", "2", "--methods", methods, "--rounds", "2", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(done.stdout)["results"]}
    assert 0 < rows["wasi"]["window_copies_fraction"] < 1 and rows["lora"]["window_copies_fraction"] is None


def test_a_vit_has_no_window_copies(tmp_path):
    model = write_tiny(tmp_path / "model")
    done = run("bench", "--model", model, "--quick", "--batch", "2", "--methods", "wasi", "--rounds", "2", "--json")
    assert [row["window_copies_fraction"] for row in json.loads(done.stdout)["results"]] == [None, None]
