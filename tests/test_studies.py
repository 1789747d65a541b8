"""The studies' own code: choosing ranks, counting, learning in memory, and results that are never measured twice."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photos import save_jpeg, scene
from tiny_artefact import write_tiny

from benchmarks.accuracy import datasets, optimisers, time_to_accuracy
from benchmarks.accuracy.converted import converted, converted_by_command, simpler, whole
from benchmarks.accuracy.datasets import Photos, folds, random_split
from benchmarks.accuracy.learn import (
    ONE_RATE,
    Variant,
    head_accuracy,
    kept_epochs,
    learn,
    photo_features,
    settings_of,
)
from benchmarks.accuracy.processes import run_beside
from benchmarks.accuracy.studies import LONG
from benchmarks.accuracy.study import Job, Store, paired_difference
from benchmarks.paper import fig3b_iteration, formulas, rank_selection
from wasi_edge.artefact import read_config
from wasi_edge.bench.subject import Subject, find_subject
from wasi_edge.method import Optimizer
from wasi_edge.subspace.factors import orthonormal_pair
from wasi_edge.training.setup import usual_recipe


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return find_subject(str(write_tiny(tmp_path / "tiny", labels=None)))


@pytest.fixture
def photos(subject: Subject) -> Photos:
    return dark_and_light(subject)


def dark_and_light(subject: Subject) -> Photos:
    """Two kinds of noise, dark and light, that any head tells apart."""
    rng = np.random.default_rng(0)
    labels = torch.arange(60) % 2
    side = subject.preprocessing.resize_side
    shrunk = [rng.integers(0, 100, (side, side, 3), dtype=np.uint8) + np.uint8(120 * label) for label in labels]
    return Photos(shrunk, [str(i) for i in range(60)], labels, ["dark", "light"], subject.preprocessing)


@pytest.fixture(autouse=True)
def gradients_as_before():
    yield
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("method", ["wasi", "vanilla", "lora", "head"])
def test_learns_in_memory(subject: Subject, photos: Photos, method: str) -> None:
    watched: list[int] = []
    epochs = 0 if method == "head" else 2
    variant, split = Variant(method, epochs=epochs), random_split(photos, 0)
    result = learn(subject, photos, split, variant, 0, lambda epoch, _: watched.append(epoch))
    assert watched == list(range(epochs + 1)) == [entry["epoch"] for entry in result["history"]]
    assert result["head_test"] > 0.9 and result["best"]["test"] > 0.9
    assert result["best"]["epoch"] == kept_epochs(result["history"], len(split.val))[-1]
    seconds = [entry["seconds"] for entry in result["history"]]
    assert seconds == sorted(seconds)
    json.dumps(result)


def test_a_variant_trains_the_blocks_that_finetune_would() -> None:
    blocks = [Variant(method).trained_blocks(12) for method in ("wasi", "asi", "vanilla", "head")]
    assert blocks == [6, 6, 12, 12] and Variant(**ONE_RATE).trained_blocks(12) == 12


def test_a_variant_of_many_steps_is_what_finetune_does_with_so_many(subject: Subject) -> None:
    assert LONG.recipe == usual_recipe("wasi", optimizer=Optimizer.SGD)
    assert settings_of(LONG, subject)["recipe"]["optimizer"] == "sgd"
    assert all("optimizer" not in settings_of(Variant(), subject)[name] for name in ("variant", "recipe"))


def test_closed_form_head_of_all_photos(subject: Subject, photos: Photos) -> None:
    split = random_split(photos, 0)
    assert head_accuracy(photo_features(subject, photos), photos, split.train, split.test) > 0.9


def test_converts_as_a_user_does(tmp_path: Path) -> None:
    dense = write_tiny(tmp_path / "dense", rank=None, labels=None)
    paths = [save_jpeg(tmp_path / f"{number}.jpg", scene(number)) for number in range(20)]
    with converted_by_command(str(dense), paths, 0.5, 16, "512MB") as (subject, measured):
        assert subject.own_epsilon == 0.5
        assert measured["calibration_photos"] == 20 and measured["stored_parameters"] > 0
        assert 50e6 < measured["peak_bytes"] < 512 * 2**20 and measured["seconds"] > 0
        folder = subject.folder
    assert folder is not None and not folder.exists()
    with pytest.raises(subprocess.CalledProcessError), converted_by_command(str(dense), paths, 0.5, 16, "1MB"):
        pass


def test_simpler_conversions_are_as_large_and_further_from_the_dense_network(tmp_path: Path, photos: Photos) -> None:
    dense = str(write_tiny(tmp_path / "dense", rank=None, labels=None))
    wanted = photo_features(find_subject(dense), photos)
    errors, sizes = {}, set()
    for less in ((False, False), (True, False), (False, True), (True, True)):
        with simpler(*less), converted(dense, photos, np.arange(60), 60, 0.6, 16) as (made, _):
            errors[less] = float((photo_features(made, photos) - wanted).norm() / wanted.norm())
            shapes = read_config(made.folder).linears
        sizes.add(sum(rank * sum(made.geometry.linear_shapes()[name]) for name, rank in shapes.items()))
    assert errors[False, False] < min(errors[True, True], errors[False, True])
    assert len(set(errors.values())) == 4 and max(sizes) - min(sizes) < 60
    assert whole._spread.__name__ == "_spread"


def test_split_is_complete_disjoint_and_as_large_as_said(photos: Photos) -> None:
    split = random_split(photos, 3)
    parts = (split.train, split.val, split.test)
    assert [len(part) for part in parts] == [36, 12, 12]
    assert sorted(np.concatenate(parts).tolist()) == list(range(60))
    assert not np.array_equal(random_split(photos, 4).test, split.test)


def test_a_full_svd_step_takes_the_place_of_the_iteration(subject: Subject, photos: Photos) -> None:
    """Both truncate the same moved weight; one step from the same start they differ by what one iteration leaves."""
    split, variant = random_split(photos, 0), Variant(epochs=2, learning_rate=1e-2)
    losses = {}
    for name, around in (("iteration", fig3b_iteration._as_it_is), ("svd", fig3b_iteration._svd_steps)):
        with around():
            losses[name] = learn(subject, photos, split, variant, 0)["history"][-1]["val_loss"]
    assert losses["iteration"] == pytest.approx(losses["svd"], rel=1e-3)
    assert losses["iteration"] != losses["svd"]


def test_the_svd_step_is_the_best_approximation() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    pair, direction = orthonormal_pair(draw(9, 4), draw(4, 7)), draw(9, 2)
    basis = torch.linalg.qr(draw(7, 2)).Q
    moved = (1 - 0.1 * 0.5) * pair.left @ pair.right - 0.1 * direction @ basis.t()
    norm = pair.norm
    fig3b_iteration._svd_step(pair, direction, basis, 0.1, 0.5)
    left, values, right = torch.linalg.svd(moved)
    best = left[:, :4] @ torch.diag(values[:4]) @ right[:4]
    torch.testing.assert_close(pair.left @ pair.right, best)
    torch.testing.assert_close(pair.left_inverse, torch.eye(4, dtype=torch.float64))
    assert pair.norm == norm


def test_dynamic_programme_finds_the_best_and_greed_comes_close() -> None:
    rng, ranks_of, names = random.Random(0), (2, 4, 8), "abcd"
    for _ in range(20):
        falling = {n: sorted((rng.random() for _ in ranks_of), reverse=True) for n in names}
        errors = {n: dict(zip(ranks_of, falling[n], strict=True)) for n in names}
        # whole numbers of the budget's parts, so that no rounding hides the best
        width = {n: rng.choice((50, 100, 200)) for n in names}
        sizes = {n: {rank: float(rank * width[n]) for rank in ranks_of} for n in names}
        budget = float(rank_selection.BUCKETS)

        def total(table, chosen):
            return sum(table[n][rank] for n, rank in chosen.items())

        every = [dict(zip(names, ranks, strict=True)) for ranks in itertools.product(ranks_of, repeat=4)]
        best = min(total(errors, chosen) for chosen in every if total(sizes, chosen) <= budget)
        found = rank_selection.by_dynamic_programme(errors, sizes, budget)
        greedy = rank_selection.by_greed(errors, sizes, budget)
        assert total(sizes, found) <= budget and total(sizes, greedy) <= budget
        assert total(errors, found) == pytest.approx(best)
        assert best - 1e-9 <= total(errors, greedy) <= best + 0.5


def test_dynamic_programme_says_when_nothing_fits() -> None:
    with pytest.raises(ValueError, match="budget"):
        rank_selection.by_dynamic_programme({"a": {2: 1.0}}, {"a": {2: 10.0}}, 5.0)


def test_formulas_of_a_layer() -> None:
    layer = formulas.Layer(photos=2, tokens=3, inputs=5, outputs=7)
    dense = formulas.dense(layer)
    assert dense.infer == 6 * 7 * 9 and dense.train == 6 * 7 * 9 + 7 * 5 * 11 + 6 * 5 * 13
    assert dense.elements == 6 * 5 + 7 * 5
    paper = formulas.paper(layer, 4, (1, 2, 3))
    assert paper.elements == 1 * 2 * 3 + 2 * 1 + 3 * 2 + 5 * 3 + 4 * 12
    assert paper.infer == 6 * 4 * 9 + 6 * 7 * 7
    ours = formulas.ours(layer, 4, 3)
    assert ours.elements == 6 * 3 + 5 * 3 + 4 * 12 and ours.infer == 2 * 6 * 4 * 12
    assert ours.gain(dense)["memory"] == dense.elements / ours.elements


def test_a_result_is_kept_at_once_and_not_measured_again(tmp_path: Path) -> None:
    done: list[str] = []

    def job(label: str, fails: bool = False) -> Job:
        def work() -> dict[str, float]:
            if fails:
                raise KeyboardInterrupt
            done.append(label)
            return {"test": 0.5}

        return Job("set", label, 0, work)

    with pytest.raises(KeyboardInterrupt):
        Store("study", {}, tmp_path).run([job("a"), job("b", fails=True)], lambda text: None)
    again = Store("study", {"cpu": "another"}, tmp_path)
    again.run([job("a"), job("b")], lambda text: None)
    assert done == ["a", "b"] and again.of("set", "b") == {0: {"test": 0.5, "machine": 1}}
    held = json.loads((tmp_path / "study.json").read_text())
    assert held["machines"] == [{}, {"cpu": "another"}] and held["runs"]["set | a | 0"]["machine"] == 0


ANSWERS = """
import os
from benchmarks.accuracy.processes import answer
from benchmarks.accuracy.study import Job

def work(label):
    print("between the answers")
    return {"test": 1 / float(label), "process": os.getpid()}

answer(Job("set", label, 0, lambda label=label: work(label)) for label in "0123456")
"""


def test_processes_share_the_jobs_and_keep_what_is_done_where_one_fails(tmp_path: Path) -> None:
    def run(labels: str, processes: int) -> None:
        jobs = [Job("set", label, 0, dict) for label in labels]
        run_beside(store, jobs, [sys.executable, "-c", ANSWERS], processes, lambda text: None)

    store = Store("study", {}, tmp_path)
    run("1234", 2)
    assert [store.of("set", label)[0]["test"] for label in "1234"] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert os.getpid() not in {store.of("set", label)[0]["process"] for label in "1234"}
    with pytest.raises(RuntimeError, match="failed"):
        run("12506", 1)
    with pytest.raises(RuntimeError, match="failed"):
        run_beside(store, [Job("set", "6", 0, dict)], [sys.executable, "-c", ""], 1, lambda text: None)
    again = Store("study", {}, tmp_path)
    assert again.runs.keys() == {f"set | {label} | 0" for label in "12345"}


def test_a_studys_command_answers_and_says_which_device_it_cannot_use() -> None:
    def ask(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.accuracy", "against_vanilla", "--data", "none such", *more]
        return subprocess.run(command, input="", capture_output=True, text=True, check=False)

    assert (ask("--answer").returncode, ask("--answer").stdout) == (0, "")
    refused = ask("--device", "cuda:99")
    assert refused.returncode == 2 and "cannot use the device cuda:99" in refused.stderr


PLACED = """
import sys
from benchmarks.accuracy.accelerator import compute_on
from benchmarks.accuracy.processes import answer
from benchmarks.accuracy.study import Job
from test_studies import learned

compute_on("cpu")
answer([Job("set", "placed", 0, lambda: learned(sys.argv[1], sys.argv[2]))])
"""


def learned(folder: str, method: str) -> dict[str, Any]:
    subject = find_subject(folder)
    photos = dark_and_light(subject)
    return learn(subject, photos, random_split(photos, 0), Variant(method, epochs=2), 0)


@pytest.mark.parametrize("method", ["wasi", "vanilla", "lora"])
def test_learns_the_same_where_tensors_are_placed(subject: Subject, method: str, monkeypatch, tmp_path: Path) -> None:
    """In a process of its own, on the one device there always is."""
    folder = str(subject.folder)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    store = Store("study", {}, tmp_path)
    command = [sys.executable, "-c", PLACED, folder, method]
    run_beside(store, [Job("set", "placed", 0, dict)], command, 1, lambda text: None)
    here = learned(folder, method)
    for there, entry in zip(store.of("set", "placed")[0]["history"], here["history"], strict=True):
        assert there["val_loss"] == pytest.approx(entry["val_loss"], rel=1e-3)


def test_two_commands_of_one_study_keep_each_others_results(tmp_path: Path) -> None:
    first, second = (Store("study", {"cpu": cpu}, tmp_path) for cpu in ("a", "b"))
    for store, label in ((first, "one"), (second, "two"), (first, "three")):
        store.keep(Job("set", label, 0, dict), {"test": 0.5}, lambda text: None)
    held = json.loads((tmp_path / "study.json").read_text())
    assert {key: run["machine"] for key, run in held["runs"].items()} == {
        "set | one | 0": 0,
        "set | two | 0": 1,
        "set | three | 0": 0,
    }


def test_a_result_of_other_settings_is_not_shown(tmp_path: Path) -> None:
    store, (old, new) = Store("study", {}, tmp_path), (Job("set", "a", 0, dict, {"rate": rate}) for rate in (0.1, 0.2))
    store.keep(old, {"test": 0.5}, lambda text: None)
    assert store.of("set", "a")
    store.expect([new])
    assert not store.of("set", "a") and store.missing([new]) == [new]


def test_a_result_of_other_settings_is_measured_again(tmp_path: Path) -> None:
    def job(rate: float) -> Job:
        return Job("set", "a", 0, lambda: {"test": rate}, {"rate": rate, "sizes": (1, 2)})

    for rate, expected in ((0.1, 0.1), (0.1, 0.1), (0.2, 0.2)):
        store = Store("study", {}, tmp_path)
        store.run([job(rate)], lambda text: None)
        assert Store("study", {}, tmp_path).of("set", "a")[0]["test"] == expected


def test_folds_validate_every_photo_once_and_leave_tests_alone(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    held = random_split(photos, 0)
    monkeypatch.setattr(datasets, "fixed_split", lambda name, photos: held)
    found = [folds("any", photos, number) for number in range(4)]
    pool = sorted([*held.train, *held.val])
    assert sorted(i for fold in found for i in fold.val) == pool
    for fold in found:
        assert sorted([*fold.train, *fold.val]) == pool and np.array_equal(fold.test, fold.val)
        assert abs(int(photos.labels[torch.from_numpy(fold.val)].sum()) * 2 - len(fold.val)) <= 2


def test_paired_difference_over_the_splits_both_have() -> None:
    mean, half, count = paired_difference({0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.4, 1: 0.5, 3: 0.1})
    assert (mean, count) == (pytest.approx(0.15), 2)
    assert half == pytest.approx(12.71 * 0.05 * 2**0.5 / 2**0.5)


def test_time_to_accuracy_follows_the_model_that_validation_chooses() -> None:
    def history(*entries: tuple[float, float, float]) -> list[dict[str, float]]:
        return [{"val": val, "val_loss": loss, "test": test} for val, loss, test in entries]

    chosen = history((0.8, 0.5, 0.6), (0.7, 0.4, 0.9), (0.8, 0.4, 0.7), (0.9, 0.6, 0.8))
    assert time_to_accuracy.curve([chosen], 10_000) == [0.6, 0.6, 0.7, 0.8]
    assert time_to_accuracy.curve([chosen], 4) == [0.6, 0.9, 0.7, 0.7]
    steady = history((0.8, 0.5, 0.8), (0.7, 0.4, 0.1), (0.7, 0.4, 0.1), (0.7, 0.6, 0.1))
    both = time_to_accuracy.curve([chosen, steady], 10_000)
    assert both == pytest.approx([0.7, 0.7, 0.75, 0.8])
    assert [time_to_accuracy.first_reaching(both, target) for target in (0.7, 0.74, 0.8, 0.81)] == [0, 2, 3, None]
    assert time_to_accuracy.all_tested([chosen, steady]) and not time_to_accuracy.all_tested([])
    del chosen[2]["test"]
    assert not time_to_accuracy.all_tested([steady, chosen])
    with pytest.raises(ValueError, match="run them again"):
        time_to_accuracy.curve([chosen], 4)


def test_a_rule_that_diverges_is_a_result(subject: Subject, photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    class Drawn:
        name = "drawn"

        def photos(self) -> Photos:
            return photos

    monkeypatch.setattr(optimisers, "folds", lambda name, photos, number: random_split(photos, number))

    def run(rule: str, rate: float) -> dict[str, Any]:
        return optimisers._run(Drawn(), subject, rule, optimisers._variant(rate), 0)  # type: ignore[arg-type]

    assert run("momentum", 1e-2)["state_bytes"] > 0
    assert list(run("adamw in factors", 1e30)) == ["diverged"]


def test_rates_of_the_head_are_the_same_for_every_rule() -> None:
    recipes = [optimisers._variant(rate).recipe for rate in (1e-5, 1e-1)]
    assert (
        recipes[0].head_rate == pytest.approx(recipes[1].head_rate) == pytest.approx(optimisers.WASI.recipe.head_rate)
    )
    assert recipes[0].dense_rate == pytest.approx(recipes[1].dense_rate)
    assert [recipe.learning_rate for recipe in recipes] == [1e-5, 1e-1] and recipes[0].weight_decay == 0


def test_each_rule_goes_on_with_the_rate_of_the_lowest_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("optimisers", {}, tmp_path)
    losses = {1e-2: 0.5, 1e-1: 0.4, 1.0: None}
    monkeypatch.setitem(optimisers.RATES, "sgd", tuple(losses))
    for source, (rate, loss), fold in itertools.product(optimisers.SETS, losses.items(), (0, 1)):
        history = [{"val": 0.7 + fold / 10, "val_loss": (loss or 0) + fold, "seconds": 1.0}]
        result = {"diverged": "x"} if loss is None else {"history": history, "best": {"test": 0}, "state_bytes": 2**21}
        store.keep(Job(source.name, optimisers._label("sgd", rate), fold, dict), result, lambda text: None)
    best = optimisers.best_rate(store, "sgd")
    assert losses[best] == 0.4
    row = optimisers._row(store, "sgd", best, 1.5, (0, 1))
    assert row["clothing loss"] == pytest.approx(0.9) and row["clothing val"] == pytest.approx(0.75)
    assert (row["state MB"], row["step"], row["folds"]) == (2.0, 1.5, 2)
    diverged = optimisers._row(store, "sgd", 1.0, 1.5, (0,))
    assert diverged["flowers loss"] is None and diverged["state MB"] is None


def test_rules_are_compared_with_the_default_on_the_same_folds(tmp_path: Path) -> None:
    store = Store("optimisers", {}, tmp_path)
    last = {"default": (0.5, 0.6), "other": (0.45, 0.59), "wild": (0.4, None)}
    for source, (rule, losses) in itertools.product(optimisers.SETS, last.items()):
        for fold, loss in enumerate(losses):
            history = [{"val": 0.7, "val_loss": each, "seconds": 1.0} for each in (9.0, 0.8, loss)]
            result: dict[str, Any] = {"history": history, "best": {"test": 0}} if loss else {"diverged": "x"}
            store.keep(Job(source.name, optimisers._label(rule, 0.1), fold, dict), result, lambda text: None)
    best = dict.fromkeys(last, 0.1)
    row = optimisers.against(store, best, "other", (0, 1))
    assert row["last loss above ours"] == pytest.approx(-0.03) and 0 < row["loss +-"] < 0.03
    assert row["mean loss above ours"] == pytest.approx(-0.015) and row["last val above ours"] == 0
    assert optimisers.against(store, best, "default", (0, 1)) == optimisers.against(store, best, "wild", (0, 1)) == {}
