"""Training the last blocks alone: gradients, the network in two parts, tokens on disk, whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradients import engine_gradients
from models import TINY, random_tensors, random_vit
from reference import one_thread, relative_difference  # noqa: F401
from test_finetune import command, kill_when, render, report_of, run, tensors
from tiny_artefact import write_tiny

from wasi_edge.errors import Interrupted, WasiEdgeError
from wasi_edge.keep import COMPACT, EXACT
from wasi_edge.layers.saving import Pass
from wasi_edge.models.network import build_network
from wasi_edge.training.frozen import TokenFile, cache_tokens
from wasi_edge.training.trainer import Recipe, SubspaceTrainer


def parts(dtype: torch.dtype = torch.float64):
    """The same network whole, and its first and its last block apart."""
    ranks, values = random_tensors(TINY, dtype=dtype)
    read = lambda name: values[name].clone()  # noqa: E731
    whole = build_network(TINY, ranks, read, 16, head=True)
    first = build_network(TINY, ranks, read, 16, head=False, blocks=range(1))
    last = build_network(TINY, ranks, read, 16, head=True, blocks=range(1, 2))
    return whole, first, last


def test_a_network_in_two_parts_computes_what_the_whole_does():
    whole, first, last = parts()
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    expected = whole.logits(pixels, Pass())
    tokens = first.last_tokens(pixels, Pass())
    assert tokens.shape == (3, TINY.tokens(16), TINY.width)
    assert relative_difference(last.logits(tokens, Pass()), expected) < 1e-14
    assert {**first.parameters(), **last.parameters()}.keys() == whole.parameters().keys()
    assert "position" not in last.parameters() and "head.weight" not in first.parameters()


def test_gradients_of_the_blocks_that_learn_are_those_of_full_training():
    whole, first, last = parts()
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    dfeatures = torch.randn(3, TINY.feature_width, dtype=torch.float64)
    _, expected = engine_gradients(whole, pixels, dfeatures, EXACT)
    for model, inputs in ((random_vit(), pixels), (last, first.last_tokens(pixels, Pass()).clone())):
        for name, linear in model.linears(1).items():
            linear.start_training(10_000, model.tokens_of(name), torch.Generator().manual_seed(1))
        _, saved = model.features(inputs, run := Pass(refresh_basis=True), [EXACT])
        found: dict[str, torch.Tensor] = {}
        model.backward(
            saved,
            dfeatures.clone(),
            run,
            lambda layer, grads, found=found: found.update({f"{layer}.{k}": v.clone() for k, v in grads.items()}),
        )
        assert {name.split(".")[0] for name in found} == {"blocks", "norm"}
        assert not any(name.startswith("blocks.0") for name in found)
        for name, linear in model.linears(1).items():
            actual = found[f"{name}.projected"] @ linear.basis.t()
            assert relative_difference(actual, expected[f"{name}.weight"]) < 1e-10, name
        assert relative_difference(found["norm.weight"], expected["norm.weight"]) < 1e-10


def test_frozen_parameters_stay_and_are_no_part_of_the_state():
    model = random_vit(dtype=torch.float32)
    trainer = SubspaceTrainer(model, Recipe(1e-2, 1e-2, 1e-2, 0.1, 2.0, 0.1), [COMPACT], 5, 0)
    before = {name: value.clone() for name, value in trainer.parameters().items()}
    with torch.no_grad():
        for step in (1, 2, 3):
            trainer.micro_batch(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]), torch.ones(4), True, 4)
            trainer.apply(step, 1.0)
    changed = {name for name, value in trainer.parameters().items() if not torch.equal(value, before[name])}
    learning = {name for name in before if name.startswith(("blocks.1.", "norm.", "head."))}
    assert changed == learning
    stored = {name.removeprefix("parameter.") for name in trainer.state() if name.startswith("parameter.")}
    assert stored == learning


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e6])  # the last is beyond float16
def test_tokens_come_back_from_disk_as_exactly_as_16_bits_allow(tmp_path: Path, magnitude: float):
    file = TokenFile(tmp_path / "tokens.bin", photos=5, tokens=7, width=6)
    values = magnitude * torch.randn(5, 7, 6) * torch.logspace(-2, 2, 7)[:, None]
    file.write(0, 0, values[:3])
    file.write(1, 3, values[3:])
    for view, positions in ((0, [2, 0]), (1, [4, 3])):
        read = file.read(view, positions)
        scale = values[positions].abs().amax(2, keepdim=True)
        assert float(((read - values[positions]) / scale).abs().max()) < 2**-11
    with pytest.raises(WasiEdgeError, match="end too early"):
        file.read(1, [4, 5])
    file.close()


class Photos:
    """What `cache_tokens` asks of a side of the split: a photo is its number, a view adds a tenth each."""

    def __init__(self, count: int) -> None:
        self.count, self.batch = count, 2
        self.cache = self.indices = self.labels = self.weight = self.preprocessing = None
        self.seen: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.count

    def inputs(self, positions):
        return self.augmented(positions, 0, 0)

    def augmented(self, positions, seed, epoch):
        self.seen += [(position, epoch) for position in positions]
        return torch.stack([torch.full((3, 16, 16), position + epoch / 10 + seed) for position in positions])


def test_every_photo_passes_the_frozen_blocks_once_a_view_and_an_unfinished_cache_is_made_again(tmp_path: Path):
    _, first, _ = parts(torch.float32)
    progress: list[int] = []

    def stop(done: int) -> None:
        if done == 5:
            raise Interrupted("stopped")

    def fill(train: Photos, held_out: Photos, advance, identity="same", is_enough=lambda: False):
        sides: Any = train, held_out
        shape = 17, TINY.width
        return cache_tokens(tmp_path / "frozen", lambda: first, shape, *sides, 2, 7, identity, advance, is_enough)

    with pytest.raises(Interrupted):
        fill(Photos(5), Photos(3), stop)
    train, held_out = Photos(5), Photos(3)
    cached, cached_held_out = fill(train, held_out, progress.append)
    assert sorted(train.seen) == [(photo, view) for photo in range(5) for view in range(3)]
    assert held_out.seen == [(photo, 0) for photo in range(3)]
    assert progress[-1] == 5 * 3 + 3
    for epoch, view in ((1, 1), (2, 2), (3, 1), (4, 2)):
        expected = first.last_tokens(Photos(5).augmented([4, 1], 7, view), Pass())
        assert relative_difference(cached.augmented([4, 1], 7, epoch), expected) < 1e-3
    assert relative_difference(cached_held_out.inputs([2]), first.last_tokens(Photos(3).inputs([2]), Pass())) < 1e-3
    fill(again := Photos(5), Photos(3), progress.append)
    assert again.seen == []  # complete: taken as it is
    fill(other := Photos(5), Photos(3), progress.append, "of other photos")
    assert len(other.seen) == 15
    cached, _ = fill(late := Photos(5), Photos(3), progress.append, "out of time", lambda: True)
    assert sorted({view for _, view in late.seen}) == [0, 1] and cached.cached_views == 1


# --------------------------------------------------------------------------------------------------- whole runs


def finetune(folder: Path, out: Path, *more: object) -> tuple[object, ...]:
    photos, model = folder / "photos", folder / "model"
    start = ("finetune", photos, "--model", model, "--out", out, "--budget", "600MB", "--batch", "4", "--json")
    return (*start, "--train-blocks", 1, *more)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    render(folder / "photos")
    write_tiny(folder / "model", labels=None)
    return folder


def test_a_run_of_the_last_block_changes_it_alone_and_resumes_to_the_same_weights(base, tmp_path):
    report = report_of(run(*finetune(base, tmp_path / "straight", "--epochs", 5)))
    assert report["status"] == "completed" and report["trained_blocks"] == 1
    assert report["plan"]["cached_views"] == 3 and report["optimizer_steps"] == 20
    assert not (tmp_path / "straight" / "checkpoint" / "frozen").exists()
    before, after = tensors(base / "model"), tensors(tmp_path / "straight")
    for name, value in before.items():
        if name.startswith(("blocks.0.", "patch_embed", "class_token", "position")):
            assert np.array_equal(value, after[name]), name
    answer = report_of(run("predict", tmp_path / "straight", base / "photos" / "red", "--json"))
    assert sum(entry["label"] == "red" for entry in answer) >= 6

    out = tmp_path / "killed"
    arguments = finetune(base, out, "--epochs", 5, "--checkpoint-every", "0.01s")
    kill_when(arguments, lambda: any((out / "checkpoint").glob("step-0000000[2-9]/manifest.json")))
    resumed = report_of(run(*arguments, "--resume"))
    assert resumed["status"] == "completed" and resumed["resumed_from_step"] > 0
    for name, value in after.items():
        assert np.array_equal(value, tensors(out)[name]), name


def test_half_of_the_blocks_learn_where_nobody_asks_and_the_others_see_new_views_in_every_epoch(base, tmp_path):
    arguments = finetune(base, tmp_path / "out", "--epochs", 3)
    report = report_of(run(*arguments[: arguments.index("--train-blocks")], "--epochs", 3))
    assert report["trained_blocks"] == 1 and report["plan"]["cached_views"] == 0
    before, after = tensors(base / "model"), tensors(tmp_path / "out")
    changed = {name.rsplit(".", 1)[0] for name, value in before.items() if not np.array_equal(value, after[name])}
    assert {"blocks.1.qkv", "blocks.1.fc2", "norm"} <= changed
    assert not any(name.startswith(("blocks.0.", "patch_embed", "class_token", "position")) for name in changed)


def test_photos_that_changed_are_run_through_the_frozen_blocks_again(base, tmp_path):
    """Same counts, other pictures: what waits on disk is of the wrong photos."""
    folder = tmp_path / "changing"
    render(folder / "photos")
    write_tiny(folder / "model", labels=None)
    arguments = finetune(folder, tmp_path / "out", "--epochs", 5)
    index = tmp_path / "out" / "checkpoint" / "frozen" / "index.json"
    kill_when(arguments, index.exists)
    made = index.read_text()
    render(folder / "photos", seed=5)
    # stopped again as soon as they are there: the index speaks of other photos now
    kill_when((*arguments, "--resume"), lambda: index.exists() and index.read_text() != made)
    assert report_of(run(*arguments, "--resume"))["status"] in ("completed", "early_stopped")
    result = report_of(run("evaluate", tmp_path / "out", folder / "photos", "--json"))
    assert result["accuracy"] >= 0.8


def test_dense_layers_stay_dense_and_a_finished_run_goes_on(base, tmp_path):
    dense = write_tiny(tmp_path / "dense", rank=None, labels=None, epsilon=0.9)
    first = tmp_path / "first"
    arguments = ("finetune", base / "photos", "--model", dense, "--budget", "600MB", "--batch", "4", "--json")
    report = report_of(run(*arguments, "--train-blocks", 1, "--epochs", 2, "--out", first))
    # answers from tokens in 16 bits are no measure of a file in 32
    assert report["onnx"]["file"] == "model.onnx" and "frozen blocks made" in report["onnx"]["not_compared"]
    assert report["status"] == "completed" and report["trained_blocks"] == 1
    stored = tensors(first)
    before = tensors(dense)
    assert np.array_equal(stored["blocks.0.fc1.weight"], before["blocks.0.fc1.weight"])
    assert not np.array_equal(stored["blocks.1.fc1.weight"], before["blocks.1.fc1.weight"])  # it learns as it is
    more = render(tmp_path / "more", classes=("green", "blue"), seed=1)
    again = ("finetune", more, "--model", first, "--out", tmp_path / "second", *arguments[4:], "--train-blocks", 1)
    report = report_of(run(*again, "--epochs", 2))
    assert report["status"] == "completed" and report["classes"] == ["green", "red", "blue"]
    assert report["continued_from"]["absent_classes"] == ["red"]


def test_no_time_is_spent_beyond_the_limit(base, tmp_path):
    # without held-out photos nothing can stop it early
    more = ("--epochs", 20000, "--max-time", "12s", "--val-split", 0)
    report = report_of(run(*finetune(base, tmp_path / "limited", *more)))
    assert report["status"] == "time_limit" and report["optimizer_steps"] > 0
    assert report["total_seconds"] < 24  # a stopped machine, not a run that forgot the time


def test_a_signal_while_the_frozen_blocks_run_is_obeyed(base, tmp_path):
    out = tmp_path / "stopped"
    photos = render(tmp_path / "photos", per_class=150)
    arguments = ("finetune", photos, *finetune(base, out, "--epochs", 5)[2:])
    child = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (out / "checkpoint" / "frozen" / "train.bin").exists():
        time.sleep(0.002)
    child.terminate()
    stdout, _ = child.communicate(timeout=60)
    assert child.returncode == 130 and json.loads(stdout)["status"] == "interrupted"
    assert not (out / "checkpoint" / "frozen" / "index.json").exists()


def test_a_full_disk_is_said_in_a_sentence(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    file = TokenFile(tmp_path / "tokens.bin", photos=1, tokens=2, width=3)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WasiEdgeError, match=r"tokens.bin.*No space left on device; free some space"):
        file.write(0, 0, torch.ones(1, 2, 3))
    monkeypatch.undo()
    written = []
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: written.append((len(data), offset)) or min(5, len(data)))
    file.write(0, 0, torch.ones(1, 2, 3))
    assert sum(min(5, count) for count, _ in written) == 2 * (4 + 6)  # a short write is gone on with
    file.close()


def test_more_blocks_than_there_are_and_other_methods_are_usage_errors(base, tmp_path):
    for more in (("--train-blocks", 3), ("--method", "vanilla")):
        done = run(*finetune(base, tmp_path / "out", *more))
        assert done.returncode == 2 and "--train-blocks" in json.loads(done.stdout)["error"]
    assert not (tmp_path / "out").exists()


def test_a_rank_that_is_asked_for_is_trained_with_and_has_to_be_asked_for_again(base, tmp_path):
    out = tmp_path / "out"
    plain, asked = (report_of(run(*finetune(base, out, "--dry-run", *more))) for more in ((), ("--rank", 5)))
    assert (plain["plan"]["gradient_rank"], asked["plan"]["gradient_rank"]) == (32, 5)
    arguments = finetune(base, out, "--epochs", 5, "--checkpoint-every", "0.01s")
    kill_when((*arguments, "--rank", 5), lambda: any((out / "checkpoint").glob("step-*/manifest.json")))
    refused = run(*arguments, "--rank", 6, "--resume")
    assert refused.returncode == 2 and "rank (was 5, now 6)" in json.loads(refused.stdout)["error"]
    report = report_of(run(*arguments, "--rank", 5, "--resume"))
    assert report["status"] == "completed" and report["plan"]["gradient_rank"] == 5
    assert tensors(out)["blocks.1.qkv.left"].shape == tensors(base / "model")["blocks.1.qkv.left"].shape
    lora = finetune(base, tmp_path / "other", "--method", "lora", "--rank", 5)
    other = run(*(argument for argument in lora if argument not in ("--train-blocks", 1)))
    assert other.returncode == 2 and "--rank" in json.loads(other.stdout)["error"]
    assert not (tmp_path / "other").exists()
