"""Speed of whole runs within budgets against vanilla with all the memory it likes, interleaved.

    python benchmarks/budget_speed.py --photos ../shared/data/hymenoptera --model build/grid/vit-b16
        [--budgets 512MB,768MB,1GB,64GB] [--rounds 3] [--epochs 1]

Each figure is `wasi-edge finetune` in a fresh process: seconds of training steps per photo, from its report. Every
round runs vanilla once and each budget once, A B C ... A B C ...; the ratio vanilla / wasi is taken within a round.
Prints a Markdown table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from wasi_edge.artefact import read_config
from wasi_edge.models.locate import resolve_model

VANILLA = ("--method", "vanilla", "--budget", "64GB")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--budgets", default="512MB,768MB,1GB,64GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/budget-speed"))
    options = parser.parse_args()
    budgets = options.budgets.split(",")
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in ("vanilla", *budgets)}
    for _ in range(options.rounds):
        for name, found in reports.items():
            found.append(finetune(options, VANILLA if name == "vanilla" else ("--budget", name)))
            print(f"{name}: {1e3 / found[-1]['images_per_second']:.0f} ms a photo", file=sys.stderr, flush=True)
    print("| budget | ms a photo | speed, vanilla = 1 | peak MB | micro-batch | gradient rank |")
    print("|---|---|---|---|---|---|")
    result = {name: figures(found, reports["vanilla"]) for name, found in reports.items()}
    for name, row in result.items():
        print(
            f"| {name} | {row['ms_per_photo']:.0f} | {row['speed']:.2f} | {row['peak_mb']:.0f} | {row['micro_batch']} "
            f"| {row['gradient_rank']} |"
        )
    print(json.dumps(result))
    return 0


def finetune(options: argparse.Namespace, more: tuple[str, ...]) -> dict[str, Any]:
    """The report of one run."""
    shutil.rmtree(options.out, ignore_errors=True)
    command = [sys.executable, "-m", "wasi_edge", "finetune", str(options.photos), "--model", options.model, "--json"]
    command += ["--epochs", str(options.epochs), "--out", str(options.out), *more]
    if "vanilla" not in more:  # the same work, whatever the budget
        command += ["--train-blocks", str(read_config(resolve_model(options.model)).geometry.depth)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    report = json.loads(done.stdout)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}: {report.get('error')}")
    return report


def figures(found: list[dict[str, Any]], vanilla: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, ratios within each."""
    ratios = [a["images_per_second"] / b["images_per_second"] for a, b in zip(found, vanilla, strict=True)]
    return {
        "ms_per_photo": statistics.median(1e3 / report["images_per_second"] for report in found),
        "speed": statistics.median(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "peak_mb": max(report["peak_rss_bytes"] for report in found) / 2**20,
        "micro_batch": found[0]["plan"]["micro_batch"],
        "gradient_rank": found[0]["plan"]["gradient_rank"],
    }


if __name__ == "__main__":
    sys.exit(main())
