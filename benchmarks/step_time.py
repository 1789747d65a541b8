"""Time of whole training steps, wasi against vanilla, interleaved: A B A B ..., median of the pairwise ratios.

    python benchmarks/step_time.py [--pairs 5] [--micro-batch 8] [--image-size 168]

Both train the embedded network (vanilla: its factors multiplied out) on the same random pixels with the same threads,
gradients, clipping and update included. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from wasi_edge.artefact import open_artefact
from wasi_edge.conversion.sources import open_source
from wasi_edge.layers.saving import Keep
from wasi_edge.models.locate import resolve_model
from wasi_edge.models.vanilla import build_vanilla
from wasi_edge.models.vit import build_vit
from wasi_edge.training.trainer import Recipe, Trainer, VanillaTrainer, WasiTrainer

CLASSES, BATCH = 5, 16


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=168)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    folder, size = resolve_model(options.model), options.image_size
    recipe = Recipe(1e-6, 1e-6, 1e-6, 0.0, 1.0, 0.1)
    with open_source(folder) as source:
        geometry = source.geometry
        dense = build_vanilla(geometry, lambda name: torch.from_numpy(source.read(name)), size, CLASSES)
    zeros = {"head.weight": torch.zeros(CLASSES, geometry.feature_width), "head.bias": torch.zeros(CLASSES)}
    with open_artefact(folder) as artefact:
        factored = build_vit(
            geometry,
            artefact.config.linears,
            lambda name: zeros[name] if name in zeros else torch.from_numpy(artefact.tensors.read(name, np.float32)),
            size,
            head=True,
        )
    trainers: dict[str, Trainer] = {
        "wasi": WasiTrainer(factored, recipe, [Keep.COMPACT] * geometry.depth, 32, 0),
        "vanilla": VanillaTrainer(dense, recipe),
    }
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(options.micro_batch, 3, size, size, generator=generator)
    labels = torch.randint(0, CLASSES, (options.micro_batch,), generator=generator)
    weight = torch.ones(options.micro_batch)
    count = max(1, BATCH // options.micro_batch)

    def step(trainer: Trainer, number: int) -> None:
        for part in range(count):
            trainer.micro_batch(pixels, labels, weight, part == 0, BATCH)
        trainer.apply(number, 1.0)

    def infer(trainer: Trainer, _: int) -> None:
        trainer.logits(pixels)

    result: dict[str, object] = {"threads": torch.get_num_threads(), "micro_batch": options.micro_batch, "size": size}
    for name, work, photos in (("train", step, BATCH), ("infer", infer, options.micro_batch)):
        result |= compare(name, work, trainers, photos, options.pairs)
    print(json.dumps(result))
    return 0


def compare(
    name: str, work: Callable[[Trainer, int], None], trainers: dict[str, Trainer], photos: int, pairs: int
) -> dict[str, object]:
    """Milliseconds per photo of both, and the median ratio vanilla / wasi."""
    for trainer in trainers.values():
        for number in (1, 2):
            work(trainer, number)
    times: dict[str, list[float]] = {key: [] for key in trainers}
    for number in range(3, 3 + pairs):
        for key, trainer in trainers.items():
            began = time.perf_counter()
            work(trainer, number)
            times[key].append(time.perf_counter() - began)
    ratios = [v / w for v, w in zip(times["vanilla"], times["wasi"], strict=True)]
    figures = {f"{name}_{key}_ms_per_photo": 1e3 * statistics.median(t) / photos for key, t in times.items()}
    return {**figures, f"{name}_speedup": statistics.median(ratios), f"{name}_ratios": [round(r, 3) for r in ratios]}


if __name__ == "__main__":
    sys.exit(main())
