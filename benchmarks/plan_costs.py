"""What the planner's choices cost in time, as ratios measured interleaved: the constants of `planner/plan.py`.

    python benchmarks/plan_costs.py [--rounds 7] [--image-size 168]

One optimiser step of 16 photos of the embedded network is timed for several micro-batches, with all blocks recomputed,
and with Gram matrices rebuilt: A B C ... A B C ..., after a warm-up, median of the ratios to micro-batch 8. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

from wasi_edge.memory.malloc import reuse_freed_memory, settle_threads, tune_malloc

BATCH, CLASSES, GRADIENT_RANK = 16, 5, 32
MICRO_BATCHES = (1, 2, 4, 8, 16)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--image-size", type=int, default=168)
    options = parser.parse_args()
    tune_malloc()
    settle_threads()
    import numpy as np
    import torch

    from wasi_edge.artefact import open_artefact
    from wasi_edge.layers.saving import Keep
    from wasi_edge.models.locate import resolve_model
    from wasi_edge.models.vit import build_vit
    from wasi_edge.training.trainer import Recipe, WasiTrainer

    torch.set_grad_enabled(False)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(BATCH, 3, options.image_size, options.image_size, generator=generator)
    labels, weight = torch.randint(0, CLASSES, (BATCH,), generator=generator), torch.ones(BATCH)

    def trainer(keep: Keep, carry_grams: bool = True) -> WasiTrainer:
        with open_artefact(resolve_model(options.model)) as artefact:
            geometry, tensors = artefact.config.geometry, artefact.tensors
            head = {
                "head.weight": torch.zeros(CLASSES, geometry.feature_width),
                "head.bias": torch.zeros(CLASSES),
            }
            model = build_vit(
                geometry,
                artefact.config.linears,
                lambda name: head[name] if name in head else torch.from_numpy(tensors.read(name, np.float32)),
                options.image_size,
                head=True,
            )
        keeps = [keep] * geometry.depth
        return WasiTrainer(model, Recipe(1e-6, 1e-6, 1e-6, 0.0, 1.0, 0.1), keeps, GRADIENT_RANK, 0, None, carry_grams)

    carried, rebuilt = trainer(Keep.COMPACT), trainer(Keep.COMPACT, carry_grams=False)
    recomputed = trainer(Keep.RECOMPUTE)
    ways = {f"micro_batch_{size}": (carried, size) for size in MICRO_BATCHES}
    ways |= {"rebuilt_grams": (rebuilt, 8), "recomputed": (recomputed, 8)}

    def step(way: str, number: int) -> tuple[float, float]:
        engine, size = ways[way]
        began = time.perf_counter()
        for first in range(0, BATCH, size):
            part = slice(first, first + size)
            engine.micro_batch(pixels[part], labels[part], weight[part], first == 0, BATCH)
        middle = time.perf_counter()
        engine.apply(number, 1.0)
        return middle - began, time.perf_counter() - middle

    for way in ways:
        step(way, 1)
    reuse_freed_memory()
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(2, 2 + options.rounds):
        for way, taken in times.items():
            taken.append(step(way, number))
    steady = times["micro_batch_8"]

    def ratio(way: str, part: int) -> float:
        return statistics.median(a[part] / b[part] for a, b in zip(times[way], steady, strict=True))

    result: dict[str, object] = {"threads": torch.get_num_threads(), "image_size": options.image_size}
    result["seconds_per_photo"] = statistics.median(t[0] for t in steady) / BATCH
    result["update_seconds"] = statistics.median(t[1] for t in steady)
    result |= {f"{way}_ratio": round(ratio(way, 0), 3) for way in ways if way != "rebuilt_grams"}
    result["rebuilt_grams_update_ratio"] = round(ratio("rebuilt_grams", 1), 3)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
