"""`wasi-edge finetune` from outside, on a tiny model and photos: budget, resume after SIGKILL, signals, going on."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_artefact import write_tiny

from wasi_edge.artefact import open_artefact
from wasi_edge.training.checkpoint import latest_checkpoint

REPORT_KEYS = [
    "status",
    "model",
    "method",
    "epsilon",
    "budget_bytes",
    "planned_peak_rss_bytes",
    "peak_rss_bytes",
    "peak_swap_bytes",
    "plan",
    "planned_seconds",
    "trained_blocks",
    "effective_batch",
    "optimizer_steps",
    "resumed_from_step",
    "classes",
    "num_train_images",
    "num_val_images",
    "skipped_files",
    "epochs_run",
    "epochs_planned",
    "train_seconds",
    "images_per_second",
    "head_only_val_accuracy",
    "best_val_accuracy",
    "final_val_accuracy",
    "history",
    "seed",
    "versions",
    "hardware",
]
COLOURS = {"red": (200, 40, 30), "green": (40, 180, 60), "blue": (40, 60, 200)}


def render(folder: Path, classes=("red", "green"), per_class=10, seed=0) -> Path:
    """Noisy photos of one colour a class, 32x24."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            pixels = rng.integers(0, 90, (24, 32, 3)) + np.array(COLOURS[name]) * rng.uniform(0.4, 0.8)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "wasi_edge", *map(str, arguments)]


def run(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout, check=False)


def report_of(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def kill_when(arguments: tuple[object, ...], is_time: Callable[[], bool]) -> None:
    """Start a command and SIGKILL it as soon as `is_time` says so; fails if it ends before that."""
    child = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and child.poll() is None and not is_time():
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.returncode == -signal.SIGKILL, "the run ended before it could be killed"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return {"photos": render(folder / "photos"), "model": write_tiny(folder / "model", labels=None), "folder": folder}


def finetune(base, out, *more, photos=None, model=None):
    photos, model = photos or base["photos"], model or base["model"]
    return ("finetune", photos, "--model", model, "--out", out, "--budget", "600MB", "--batch", "4", "--json", *more)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    with open_artefact(folder) as artefact:
        return {name: artefact.tensors.read(name) for name in artefact.tensors}


@pytest.fixture(scope="module")
def finished(base):
    """A run of three epochs, its report and folder."""
    out = base["folder"] / "finished"
    return report_of(run(*finetune(base, out, "--epochs", 3))), out


def test_report_has_the_contract_and_the_folder_what_it_promises(finished):
    report, out = finished
    assert [key for key in REPORT_KEYS if key not in report] == []
    assert report["status"] == "completed" and report["optimizer_steps"] == 12 and report["epochs_run"] == 3
    assert report["num_train_images"] == 16 and report["num_val_images"] == 4
    assert report["best_val_accuracy"] == report["history"][report["best_epoch"]]["val_accuracy"]
    assert report["peak_rss_bytes"] <= report["budget_bytes"]
    present = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "report.json", "report.html", "log.jsonl", "checkpoint"} <= present
    assert not any((out / "checkpoint").glob("step-*")) and not (out / "checkpoint" / "photos").exists()
    assert json.loads((out / "report.json").read_text())["best_val_accuracy"] == report["best_val_accuracy"]


def test_the_result_predicts_what_its_report_says(finished, base):
    _, out = finished
    answer = report_of(run("predict", out, base["photos"] / "red", base["photos"] / "green", "--json"))
    assert len(answer) == 20
    hits = sum(entry["label"] == Path(entry["path"]).parent.name for entry in answer)
    assert hits >= 16


def test_quality_decides_how_long(base, tmp_path):
    plans = {
        quality: report_of(run(*finetune(base, tmp_path / "out", "--quality", quality, "--dry-run")))
        for quality in ("fast", "default", "best")
    }
    assert [plans[quality]["quality"] for quality in plans] == list(plans)
    assert [plans[quality]["epochs_planned"] for quality in plans] == [6, 12, 24]
    assert plans["best"]["planned_seconds"] > plans["fast"]["planned_seconds"]
    named = report_of(run(*finetune(base, tmp_path / "out", "--quality", "best", "--epochs", 2, "--dry-run")))
    assert named["epochs_planned"] == 2 and named["trained_blocks"] == plans["best"]["trained_blocks"]
    refused = run(*finetune(base, tmp_path / "out", "--quality", "perfect", "--dry-run"))
    assert refused.returncode == 2


def test_a_head_that_makes_no_mistakes_is_kept_and_nothing_is_trained(base, tmp_path):
    """Red and green photos, of which enough are held back to be sure."""
    photos = render(tmp_path / "photos", per_class=40, seed=1)
    done = run(*finetune(base, tmp_path / "out", "--val-split", 0.4, photos=photos))
    report = report_of(done)
    assert report["head_only_val_accuracy"] == 1.0 and report["head_sufficed"] is True
    assert (report["status"], report["optimizer_steps"], report["best_epoch"]) == ("early_stopped", 0, 0)
    assert "next to no mistakes" in done.stderr
    assert [point["photos"] for point in report["learning_curve"]] == [24, 48]
    asked = report_of(run(*finetune(base, tmp_path / "asked", "--epochs", 1, "--val-split", 0.4, photos=photos)))
    assert asked["status"] == "completed" and asked["optimizer_steps"] == 12


def test_long_runs_learn_by_sgd_and_say_so(base, finished, tmp_path):
    assert finished[0]["optimizer"] == "polar"
    long = ("--epochs", 400, "--dry-run")  # 1,600 steps
    done = run(*finetune(base, tmp_path / "out", *long))
    assert report_of(done)["optimizer"] == "sgd" and "1,600 steps: SGD" in done.stderr
    for more in (("--optimizer", "polar"), ("--max-time", "20m")):
        assert report_of(run(*finetune(base, tmp_path / "out", *long, *more)))["optimizer"] == "polar"
    refused = run(*finetune(base, tmp_path / "out", *long, "--method", "vanilla", "--optimizer", "sgd"))
    assert refused.returncode == 2 and "--optimizer is for" in report_of(refused)["error"]


def test_a_run_keeps_its_rule_when_it_is_resumed_with_a_time_limit(base, tmp_path):
    out = tmp_path / "out"
    arguments = finetune(base, out, "--epochs", 400)
    kill_when(arguments, lambda: any((out / "checkpoint").glob("step-*/manifest.json")))
    done = run(*arguments, "--resume", "--max-time", "1s")
    report = report_of(done)
    assert (report["status"], report["optimizer"]) == ("time_limit", "sgd")
    assert report["resumed_from_step"] > 0 and "steps: SGD" not in done.stderr


def test_a_killed_run_by_sgd_resumes_and_ends_with_the_same_weights(base, tmp_path):
    sgd = ("--epochs", 3, "--optimizer", "sgd", "--checkpoint-every", "0.01s")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    report = report_of(run(*finetune(base, straight, *sgd)))
    assert report["status"] == "completed" and report["optimizer"] == "sgd"
    arguments = finetune(base, killed, *sgd)
    kill_when(arguments, lambda: any((killed / "checkpoint").glob("step-0000000[2-9]/manifest.json")))
    other = run(*finetune(base, killed, "--epochs", 3, "--optimizer", "polar", "--resume"))
    assert other.returncode == 2 and "optimizer (was sgd, now polar)" in report_of(other)["error"]
    assert report_of(run(*arguments, "--resume"))["resumed_from_step"] > 0
    expected, actual = tensors(straight), tensors(killed)
    assert all(np.array_equal(value, actual[name]) for name, value in expected.items())


def test_a_killed_run_resumes_and_ends_with_the_same_weights(base, finished, tmp_path):
    _, straight = finished
    out = tmp_path / "killed"
    arguments = finetune(base, out, "--epochs", 3, "--checkpoint-every", "0.01s")
    kill_when(arguments, lambda: any((out / "checkpoint").glob("step-0000000[2-9]/manifest.json")))
    assert latest_checkpoint(out / "checkpoint") is not None
    report = report_of(run(*arguments, "--resume"))
    assert report["status"] == "completed" and report["resumed_from_step"] > 0
    expected, actual = tensors(straight), tensors(out)
    for name, value in expected.items():
        assert np.array_equal(value, actual[name]), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_exits_130(base, tmp_path, number):
    out = tmp_path / "stopped"
    arguments = finetune(base, out, "--epochs", 400)
    child = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not any((out / "checkpoint").glob("step-*/manifest.json")):
        time.sleep(0.02)
    child.send_signal(number)
    stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 130, stderr
    assert json.loads(stdout)["status"] == "interrupted"
    assert latest_checkpoint(out / "checkpoint") is not None


def test_a_closed_terminal_saves_and_exits_130(base, tmp_path):
    """What happens to a run when its SSH session ends: every write fails from then on, and a hang-up comes."""
    out = tmp_path / "hung-up"
    ours, its = pty.openpty()
    child = subprocess.Popen(
        command(*(word for word in finetune(base, out, "--epochs", 400) if word != "--json")),
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(its)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not any((out / "checkpoint").glob("step-*/manifest.json")):
        if select.select([ours], [], [], 0.02)[0]:
            os.read(ours, 65536)
    os.close(ours)
    assert child.wait(timeout=60) == 130
    assert latest_checkpoint(out / "checkpoint") is not None
    assert json.loads((out / "report.json").read_text())["status"] == "interrupted"


def test_photos_that_changed_are_not_gone_on_with(base, tmp_path):
    photos, out = render(tmp_path / "photos"), tmp_path / "out"
    arguments = finetune(base, out, "--epochs", 400, photos=photos)
    kill_when(arguments, lambda: any((out / "checkpoint").glob("step-*/manifest.json")))
    render(photos, classes=("blue",), seed=2)
    done = run(*arguments, "--resume")
    assert done.returncode == 2 and "not those that" in report_of(done)["error"]


def test_an_impossible_budget_is_refused_and_nothing_is_written(base, tmp_path):
    out = tmp_path / "refused"
    began = time.monotonic()
    done = run("finetune", base["photos"], "--model", base["model"], "--out", out, "--budget", "64MB", "--json")
    answer = report_of(done)
    assert done.returncode == 3 and answer["status"] == "failed"
    assert answer["smallest_feasible_budget_bytes"] > 64 * 2**20
    assert not out.exists()
    assert time.monotonic() - began < 30
    smallest = answer["smallest_feasible_budget_bytes"] // 2**20
    again = run(*finetune(base, out, "--epochs", 1, "--budget", f"{smallest + 4}MB"))
    assert again.returncode == 0, again.stderr


def test_dry_run_writes_nothing(base, tmp_path):
    out = tmp_path / "dry"
    report = report_of(run(*finetune(base, out, "--dry-run")))
    assert report["status"] == "planned" and report["planned_seconds"] > 0
    assert not out.exists()


def test_another_choice_on_resume_is_a_usage_error(base, tmp_path):
    out = tmp_path / "stopped"
    child = subprocess.Popen(command(*finetune(base, out, "--epochs", 400)), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not any((out / "checkpoint").glob("step-*/manifest.json")):
        time.sleep(0.02)
    child.terminate()
    child.wait()
    done = run(*finetune(base, out, "--epochs", 400, "--seed", 3, "--resume"))
    assert done.returncode == 2 and "seed" in json.loads(done.stdout)["error"]


def test_a_complete_run_is_left_alone_by_resume(base, finished):
    _, out = finished
    before = (out / "model.safetensors").stat().st_mtime_ns
    done = run(*finetune(base, out, "--epochs", 3, "--resume"))
    assert done.returncode == 0 and report_of(done)["status"] == "completed"
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_going_on_with_a_new_class_and_without_an_old_one(base, finished, tmp_path):
    _, earlier = finished
    photos = render(tmp_path / "more", classes=("green", "blue"), seed=1)
    out = tmp_path / "more-run"
    report = report_of(run(*finetune(base, out, "--epochs", 1, photos=photos, model=earlier)))
    assert report["classes"] == ["green", "red", "blue"]
    going_on = report["continued_from"]
    assert going_on["new_classes"] == ["blue"] and going_on["absent_classes"] == ["red"]
    assert going_on["old_class_accuracy"] is not None and going_on["new_class_accuracy"] is not None
    with open_artefact(out) as artefact:
        assert artefact.config.labels == ["green", "red", "blue"]


@pytest.mark.parametrize("method", ["vanilla", "lora", "asi", "wsi", "head"])
def test_other_methods_run_and_say_what_they_do(base, tmp_path, method):
    done = run(*finetune(base, tmp_path / method, "--epochs", 1, "--method", method))
    report = report_of(done)
    assert report["status"] == "completed" and report["method"] == method
    assert report["optimizer_steps"] == (0 if method == "head" else 4)
    assert ("multiplies the factors" in done.stderr) == (method in ("vanilla", "lora", "asi"))
    assert report["peak_rss_bytes"] <= report["planned_peak_rss_bytes"], report["memory_samples"]
    assert report["onnx"]["file"] == "model.onnx"
    predicted = report_of(run("predict", tmp_path / method, base["photos"], "--json"))
    assert all("label" in entry for entry in predicted)


def test_max_time_ends_in_time_and_exits_zero(base, tmp_path):
    # without held-out photos nothing can stop it early
    more = ("--epochs", 20000, "--max-time", "12s", "--val-split", 0)
    report = report_of(run(*finetune(base, tmp_path / "limited", *more)))
    assert report["status"] == "time_limit" and report["optimizer_steps"] > 0


SOCKETS = """
import socket, sys
def refuse(*_args, **_kwargs):
    raise SystemExit("a socket was opened")
socket.socket.connect = refuse
original = socket.socket.__init__
def watched(self, family=-1, *args, **kwargs):
    if family in (-1, socket.AF_INET, socket.AF_INET6):
        raise SystemExit("a network socket was opened")
    original(self, family, *args, **kwargs)
socket.socket.__init__ = watched
"""


def test_no_command_opens_a_network_socket(base, finished, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SOCKETS)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    _, out = finished
    commands = [
        finetune(base, tmp_path / "run", "--epochs", 1),
        ("predict", out, base["photos"], "--json"),
        ("evaluate", out, base["photos"], "--json"),
        ("info", out, "--json"),
        ("convert", out, tmp_path / "converted", "--epsilon", "0.5", "--json"),
    ]
    for arguments in commands:
        done = subprocess.run(command(*arguments), env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)


def test_hostile_photos_are_listed_and_the_rest_trains(base, tmp_path):
    from photos import hostile_folder

    photos = hostile_folder(render(tmp_path / "photos"))
    report = report_of(run(*finetune(base, tmp_path / "out", "--epochs", 1, photos=photos), timeout=240))
    assert report["status"] == "completed"
    assert report["peak_rss_bytes"] <= report["budget_bytes"]
    reasons = {Path(entry["path"]).name: entry["reason"] for entry in report["skipped_files"]}
    for bad in ("truncated.jpg", "text.jpg", "empty.jpg", "bomb.png"):
        assert bad in reasons, reasons
