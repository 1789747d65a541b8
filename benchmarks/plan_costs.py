"""What the planner's choices cost in time, as ratios measured interleaved: the constants of `planner/plan.py`.

    python benchmarks/plan_costs.py [--rounds 7] [--image-size 168]

One optimiser step of 16 photos of the embedded network is timed for several micro-batches, for everything that a block
may keep or rebuild, with Gram matrices rebuilt, and with factors in 16 bits: A B C ... A B C ..., after a warm-up,
median of the ratios to micro-batch 8. The last line is JSON.
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
    from wasi_edge.keep import COMPACT, EXACT, Keep, Rebuild
    from wasi_edge.models.locate import resolve_model
    from wasi_edge.models.network import build_network
    from wasi_edge.training.trainer import Recipe, SubspaceTrainer

    torch.set_grad_enabled(False)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(BATCH, 3, options.image_size, options.image_size, generator=generator)
    labels, weight = torch.randint(0, CLASSES, (BATCH,), generator=generator), torch.ones(BATCH)

    def trainer(keep: Keep, carry_grams: bool = True, bits: int = 32) -> SubspaceTrainer:
        def read(name: str) -> torch.Tensor:
            if name in head:
                return head[name]
            is_half = bits == 16 and name.endswith((".left", ".right"))
            return torch.from_numpy(tensors.read(name, np.float16 if is_half else np.float32))

        with open_artefact(resolve_model(options.model)) as artefact:
            geometry, tensors = artefact.config.geometry, artefact.tensors
            head = {
                "head.weight": torch.zeros(CLASSES, geometry.feature_width),
                "head.bias": torch.zeros(CLASSES),
            }
            model = build_network(geometry, artefact.config.linears, read, options.image_size, head=True)
        recipe, keeps = Recipe(1e-6, 1e-6, 1e-6, 0.0, 1.0, 0.1), [keep] * geometry.depth
        return SubspaceTrainer(model, recipe, keeps, GRADIENT_RANK, 0, None, carry_grams)

    compact, half = trainer(COMPACT), trainer(COMPACT, carry_grams=False, bits=16)
    ways = {f"micro_batch_{size}": (compact, size) for size in MICRO_BATCHES}
    ways |= {
        "exact": (trainer(EXACT), 8),
        "rebuilt_attention": (trainer(Keep(Rebuild.ATTENTION)), 8),
        "rebuilt_branches": (trainer(Keep(Rebuild.BRANCHES)), 8),
        "recomputed": (trainer(Keep(Rebuild.BLOCK)), 8),
        "rebuilt_grams": (trainer(COMPACT, carry_grams=False), 8),
        "half_weights": (half, 8),
        "half_weights_micro_batch_1": (half, 1),
    }

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
        return round(statistics.median(a[part] / b[part] for a, b in zip(times[way], steady, strict=True)), 3)

    result: dict[str, object] = {"threads": torch.get_num_threads(), "image_size": options.image_size}
    result["seconds_per_photo"] = statistics.median(t[0] for t in steady) / BATCH
    result["update_seconds"] = statistics.median(t[1] for t in steady)
    result["passes"] = {way: ratio(way, 0) for way in ways}
    result["updates"] = {way: ratio(way, 1) for way in ("rebuilt_grams", "half_weights")}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
