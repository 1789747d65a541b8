"""Does the planner keep its word? Real training runs over models, budgets and batches; peaks seen from outside.

    python benchmarks/memory_grid.py --photos ../shared/data/clothing [--models default,vit-b16] [--budgets 512,768]
        [--out build/grid]

PHOTOS holds class folders; the first 80 photos of each are used. Each row is `wasi-edge finetune` in a fresh process
for at least 20 optimiser steps, all blocks trained (`--train-blocks`); the peak is the kernel's (ru_maxrss of the
child).
Every row is planned with `--dry-run` first, infeasible budgets included: those must be refused with exit code 3, and
the budget they name must then work. Prints a Markdown table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from make_random_model import SIZES, make

from wasi_edge.artefact import read_config
from wasi_edge.models.locate import resolve_model

MB = 2**20
STEPS, PHOTOS_PER_CLASS = 20, 80
HEADER = """\
| model | budget | batch | planned | measured | over | over, base aside | plan |
|---|---|---|---|---|---|---|---|"""
# model, budget in MB, effective batch
GRID = (
    ("default", 290, 16),
    ("default", 320, 16),
    ("default", 384, 16),
    ("default", 512, 16),
    ("default", 512, 32),
    ("vit-ti16", 250, 16),
    ("vit-ti16", 304, 16),
    ("vit-ti16", 512, 32),
    ("vit-s16", 320, 16),
    ("vit-s16", 384, 16),
    ("vit-s16", 768, 16),
    ("vit-b32", 400, 16),
    ("vit-b32", 480, 16),
    ("vit-b16", 448, 16),
    ("vit-b16", 512, 16),
    ("vit-b16", 768, 16),
    ("vit-l16", 1024, 16),
)


def main() -> int:
    """Run the grid and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--models", default=",".join(dict.fromkeys(model for model, _, _ in GRID)))
    parser.add_argument("--budgets", help="of the grid's, those in MB (all)")
    parser.add_argument("--out", type=Path, default=Path("build/grid"))
    options = parser.parse_args()
    options.photos = subset(options.photos, options.out / "photos")
    wanted = options.models.split(",")
    budgets = None if options.budgets is None else [int(budget) for budget in options.budgets.split(",")]
    rows = []
    print(HEADER)
    for model, budget, batch in GRID:
        if model in wanted and (budgets is None or budget in budgets):
            rows.append(row(options, model, budget, batch))
            print(as_markdown(rows[-1]), flush=True)
    print(json.dumps(rows))
    return 0


def subset(photos: Path, out: Path) -> Path:
    """The first photos of each class, so that one epoch is about the steps that are asked for."""
    shutil.rmtree(out, ignore_errors=True)
    for folder in sorted(path for path in photos.iterdir() if path.is_dir()):
        (out / folder.name).mkdir(parents=True)
        for photo in sorted(folder.iterdir())[:PHOTOS_PER_CLASS]:
            shutil.copyfile(photo, out / folder.name / photo.name)
    return out


def row(options: argparse.Namespace, model: str, budget: int, batch: int) -> dict[str, Any]:
    """One run, at the budget or, where that is refused, at the smallest that the refusal names."""
    folder = model_folder(options.out, model)
    code, plan, _ = finetune(options, folder, budget, batch, ["--dry-run"])
    refused = code == 3
    if refused:
        budget = math.ceil(plan["smallest_feasible_budget_bytes"] / MB)
        code, plan, _ = finetune(options, folder, budget, batch, ["--dry-run"])
    steps_per_epoch = math.ceil(plan["num_train_images"] / batch)
    epochs = math.ceil(STEPS / steps_per_epoch)
    run = options.out / "run"
    shutil.rmtree(run, ignore_errors=True)
    code, report, peak = finetune(options, folder, budget, batch, ["--out", str(run), "--epochs", str(epochs)])
    if code != 0 or report["optimizer_steps"] < STEPS:
        steps = report.get("optimizer_steps")
        raise SystemExit(f"{model} at {budget} MB: exit code {code} after {steps} steps: {report.get('error')}")
    base = report["plan"]["memory"][0]["bytes"]
    planned = report["planned_peak_rss_bytes"]
    return {
        "model": model,
        "budget_mb": budget,
        "refused_first": refused,
        "batch": batch,
        "steps": report["optimizer_steps"],
        "planned_mb": planned / MB,
        "measured_mb": peak / MB,
        "over": planned / peak - 1,
        "over_without_base": (planned - base) / max(peak - base, 1) - 1,
        "seconds_per_photo": report["train_seconds"] / (report["optimizer_steps"] * batch),
        "plan": {key: value for key, value in report["plan"].items() if key not in ("memory", "other_budgets")},
        "degraded": report["degraded"],
    }


def model_folder(out: Path, model: str) -> str:
    """'default', or the folder of a random model, made on first use."""
    if model not in SIZES:
        return model
    folder = out / model
    if not (folder / "config.json").exists():
        make(model, folder)
    return str(folder)


def finetune(
    options: argparse.Namespace, model: str, budget: int, batch: int, more: list[str]
) -> tuple[int, dict[str, Any], int]:
    """Exit code, report and peak resident bytes of one command."""
    command = [sys.executable, "-m", "wasi_edge", "finetune", str(options.photos), "--model", model, "--json"]
    command += ["--budget", f"{budget}MB", "--batch", str(batch), "--train-blocks", str(depth(model)), *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        answer = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, json.loads(answer), peak_bytes(usage)


def depth(model: str) -> int:
    """Blocks of the model."""
    return read_config(resolve_model(model)).geometry.depth


def peak_bytes(usage: resource.struct_rusage) -> int:
    """Bytes of ru_maxrss: kilobytes on Linux."""
    return usage.ru_maxrss * 1024


def as_markdown(found: dict[str, Any]) -> str:
    """One row of the table."""
    plan = found["plan"]
    again = "/".join(str(plan[key]) for key in ("rebuilt_attention", "rebuilt_branches", "recomputed_blocks"))
    choices = f"{plan['micro_batch']} photos, {again} rebuilt, {plan['weight_bits']} bits, rank {plan['gradient_rank']}"
    if not plan["carried_grams"]:
        choices += ", Gram matrices rebuilt"
    budget = f"{found['budget_mb']}{' (named by a refusal)' if found['refused_first'] else ''}"
    return (
        f"| {found['model']} | {budget} | {found['batch']} | {found['planned_mb']:.0f} | {found['measured_mb']:.0f} | "
        f"{100 * found['over']:+.1f} % | {100 * found['over_without_base']:+.0f} % | {choices} |"
    )


if __name__ == "__main__":
    sys.exit(main())
