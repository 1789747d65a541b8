"""Hundreds of steps of one method: does a step take longer, or hold more, at the end than at the beginning?

python benchmarks/steady.py default 4 --steps 500
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from wasi_edge.bench.contestant import Contestant, free_choices, parse_methods
from wasi_edge.bench.subject import find_subject
from wasi_edge.memory.process import read_memory

WARM_UP, PARTS = 5, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("batch", type=int)
    parser.add_argument("--method", default="wasi")
    parser.add_argument("--epsilon", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    subject = find_subject(given.model)
    entry = parse_methods(given.method, (given.epsilon,))[-1]
    contestant = Contestant(subject, entry, free_choices(given.batch, subject.geometry.depth, 32), given.batch, 0)
    for _ in range(WARM_UP):
        contestant.step()
    seconds, resident = [], []
    for _ in range(given.steps):
        began = time.perf_counter()
        contestant.step()
        seconds.append(time.perf_counter() - began)
        resident.append(read_memory().rss_bytes)
    size = given.steps // PARTS
    parts = [slice(first, first + size) for first in range(0, size * PARTS, size)]
    print(
        json.dumps(
            {
                "median_ms": [round(1e3 * statistics.median(seconds[part]), 1) for part in parts],
                "slowest_ms": [round(1e3 * max(seconds[part]), 1) for part in parts],
                "mean_mb": [round(statistics.fmean(resident[part]) / 2**20, 1) for part in parts],
                "peak_mb": round(read_memory().peak_rss_bytes / 2**20, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
