"""Minutes that a run is likely to take on a Raspberry Pi 5, for docs/raspberry-pi.md: nothing was run there.

    python benchmarks/pi_estimates.py PHOTOS [--models build/models] [--out benchmarks/results/pi_estimates.json]

Two things are measured here: `bench`'s cost model, and the plan of a run with each model and budget. What others
published of full fine-tuning on a Pi 5 (224 px, batch 16: ViT-B/16 1.47 s a photo, ViT-S 0.52, ViT-Ti 0.19) over what
the cost model says of the same three here is how many times longer a Pi takes; planned minutes are multiplied by its
median.
Run it with nothing beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
from make_random_model import SIZES
from memory_grid import model_folder

from wasi_edge.bench.cost_model import Point, measure_cost_model
from wasi_edge.memory.hardware import hardware, versions
from wasi_edge.method import Method
from wasi_edge.training.defaults import GRADIENT_RANK

ROOT = Path(__file__).resolve().parents[1]
# size -> published seconds a photo; the width and depth are those of SIZES
PUBLISHED = {"vit-b16": 1.47, "vit-s16": 0.52, "vit-ti16": 0.19}
MODELS = ("default", "vit-ti16", "vit-s16", "vit-b16")
BUDGETS = ("384MB", "512MB", "1GB", "2GB")


def pi_factors(cost_model: dict) -> dict[str, float]:
    """How many times longer a Pi 5 takes than this machine, by model: published over predicted here."""
    rows = [row for row in cost_model["terms"] if row["method"] == str(Method.VANILLA)]
    coefficients = np.array([row["ms_per_unit"] for row in rows])
    found = {}
    for size, seconds in PUBLISHED.items():
        _, width, depth, _ = SIZES[size]
        terms = Point(width, depth, 224, 1.0, 16).terms(Method.VANILLA, GRADIENT_RANK)
        found[size] = 1e3 * seconds / float(np.dot(terms, coefficients))
    return found


def planned(photos: Path, model: str, budget: str, scratch: Path) -> dict:
    """What `finetune --dry-run` says; an `error` where the budget cannot be kept."""
    command = [sys.executable, "-m", "wasi_edge", "finetune", str(photos), "--model", model, "--budget", budget]
    command += ["--out", str(scratch / "never"), "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "models")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "pi_estimates.json")
    given = parser.parse_args()
    cost_model = measure_cost_model(GRADIENT_RANK, 0, lambda number: print(f"point {number}", file=sys.stderr))
    factors = pi_factors(cost_model)
    factor = median(factors.values())
    print("a Pi 5 takes so many times longer:", {size: round(value, 2) for size, value in factors.items()})
    print("model | budget | photos | minutes here | minutes on a Pi 5 | blocks | micro-batch | planned MB")
    rows = []
    for size in MODELS:
        for budget in BUDGETS:
            plan = planned(given.photos, model_folder(given.models, size), budget, given.models)
            if "error" in plan:
                rows.append({"model": size, "budget": budget, "error": plan["error"]})
                print(f"{size} | {budget} | {plan['error']}")
                continue
            minutes = plan["planned_seconds"] / 60
            photos = plan["num_train_images"] + plan["num_val_images"]
            rows.append(
                {
                    "model": size,
                    "budget": budget,
                    "photos": photos,
                    "epochs": plan["epochs_planned"],
                    "minutes_here": minutes,
                    "minutes_pi5": factor * minutes,
                    "trained_blocks": plan["trained_blocks"],
                    "micro_batch": plan["plan"]["micro_batch"],
                    "planned_bytes": plan["planned_peak_rss_bytes"],
                }
            )
            print(
                f"{size} | {budget} | {photos} | {minutes:.1f} | {factor * minutes:.0f} | {plan['trained_blocks']}"
                f" | {plan['plan']['micro_batch']} | {plan['planned_peak_rss_bytes'] / 2**20:.0f}",
                flush=True,
            )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "hardware": hardware(),
        "versions": versions(),
        "cost_model": cost_model,
        "factors": factors,
        "rows": rows,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
