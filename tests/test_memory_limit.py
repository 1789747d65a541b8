"""Runs whose budget is the kernel's limit too, swap off: they finish and are not killed, twelve megapixels included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from photos import scene
from test_finetune import command, render, report_of
from tiny_artefact import write_tiny

LIMITED_RUN = Path(__file__).resolve().parent.parent / "benchmarks" / "limited_run.py"
BUDGET = 320


def limited(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command under a limit of `BUDGET` MB; skips the test where the system does not allow one."""
    start = [sys.executable, str(LIMITED_RUN), f"{BUDGET}MB"]
    done = subprocess.run(
        [*start, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False, encoding="utf-8"
    )
    if done.returncode == 1 and "no memory limit can be set here" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    return done


def account(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """What the limit's keeper says, after whatever the command wrote."""
    return json.loads(done.stderr.strip().splitlines()[-1])


def test_the_limit_is_real():
    done = limited(sys.executable, "-c", f"x = bytearray({2 * BUDGET} * 2**20)")
    assert done.returncode == 137 and account(done)["killed"] == 1
    assert limited(sys.executable, "-c", "x = bytearray(2**20)").returncode == 0


def test_a_run_with_twelve_megapixel_photos_lives_under_a_limit_of_its_budget(tmp_path):
    photos = render(tmp_path / "photos")
    large = scene(1, 4000, 3000)
    large.save(photos / "red" / "large.png", compress_level=1)
    large.save(photos / "green" / "large.webp", method=0)
    model, out = write_tiny(tmp_path / "model", labels=None), tmp_path / "out"
    arguments = ("finetune", photos, "--model", model, "--out", out, "--epochs", 5, "--batch", 4, "--json")
    done = limited(*command(*arguments, "--budget", f"{BUDGET}MB"))
    assert done.returncode == 0, done.stderr
    report = report_of(done)
    assert report["status"] in ("completed", "early_stopped") and report["skipped_files"] == []
    assert report["num_train_images"] + report["num_val_images"] == 22
    assert report["trained_blocks"] == 1 and report["degraded"] == []
    assert report["peak_rss_bytes"] <= BUDGET * 2**20
    assert account(done)["killed"] == 0
