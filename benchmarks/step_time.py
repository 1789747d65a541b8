"""Time of whole training steps, wasi against vanilla, interleaved: A B A B ..., median of the pairwise ratios.

    python benchmarks/step_time.py [--model default] [--pairs 5] [--micro-batch 8] [--vanilla-micro-batch 8]
        [--weight-bits 32] [--recomputed 0] [--image-size 168]

Both train the same network (vanilla: its factors multiplied out) on the same random pixels with the same threads, an
effective batch of 16, gradients, clipping and update included. `wasi` runs as a plan for a budget would have it (take
its choices from `finetune --dry-run`), vanilla with all the memory it likes, both under glibc's own allocator rules.
The last line is JSON.
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
from wasi_edge.keep import COMPACT, RECOMPUTE
from wasi_edge.models.locate import resolve_model
from wasi_edge.models.vanilla import build_vanilla
from wasi_edge.models.vit import build_vit
from wasi_edge.training.trainer import Recipe, SubspaceTrainer, Trainer
from wasi_edge.training.vanilla_trainer import VanillaTrainer

CLASSES, BATCH = 5, 16


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--vanilla-micro-batch", type=int, default=8)
    parser.add_argument("--weight-bits", type=int, choices=(16, 32), default=32)
    parser.add_argument("--recomputed", type=int, default=0, help="blocks that are recomputed")
    parser.add_argument("--image-size", type=int, default=168)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    folder, size = resolve_model(options.model), options.image_size
    recipe = Recipe(1e-6, 1e-6, 1e-6, 0.0, 1.0, 0.1)
    with open_source(folder) as source:
        geometry = source.geometry
        dense = build_vanilla(geometry, lambda name: torch.from_numpy(source.read(name)), size, CLASSES)
    zeros = {"head.weight": torch.zeros(CLASSES, geometry.feature_width), "head.bias": torch.zeros(CLASSES)}

    def held(name: str) -> type:
        return np.float16 if options.weight_bits == 16 and name.endswith((".left", ".right")) else np.float32

    with open_artefact(folder) as artefact:
        factored = build_vit(
            geometry,
            artefact.config.linears,
            lambda name: zeros[name] if name in zeros else torch.from_numpy(artefact.tensors.read(name, held(name))),
            size,
            head=True,
        )
    keeps = [COMPACT] * (geometry.depth - options.recomputed) + [RECOMPUTE] * options.recomputed
    trainers: dict[str, Trainer] = {
        "wasi": SubspaceTrainer(factored, recipe, keeps, 32, 0, carry_grams=options.weight_bits == 32),
        "vanilla": VanillaTrainer(dense, recipe),
    }
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(BATCH, 3, size, size, generator=generator)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    weight = torch.ones(BATCH)
    sizes = {"wasi": options.micro_batch, "vanilla": options.vanilla_micro_batch}

    def step(method: str, number: int) -> None:
        for first in range(0, BATCH, sizes[method]):
            part = slice(first, first + sizes[method])
            trainers[method].micro_batch(pixels[part], labels[part], weight[part], first == 0, BATCH)
        trainers[method].apply(number, 1.0)

    def infer(method: str, _: int) -> None:
        for first in range(0, BATCH, 8):
            trainers[method].logits(pixels[first : first + 8])

    result: dict[str, object] = {"threads": torch.get_num_threads(), **vars(options)}
    for name, work in (("train", step), ("infer", infer)):
        result |= compare(name, work, options.pairs)
    print(json.dumps(result))
    return 0


def compare(name: str, work: Callable[[str, int], None], pairs: int) -> dict[str, object]:
    """Milliseconds per photo of both, and the median ratio vanilla / wasi."""
    times: dict[str, list[float]] = {"wasi": [], "vanilla": []}
    for method in times:
        for number in (1, 2):
            work(method, number)
    for number in range(3, 3 + pairs):
        for method, taken in times.items():
            began = time.perf_counter()
            work(method, number)
            taken.append(time.perf_counter() - began)
    ratios = [v / w for v, w in zip(times["vanilla"], times["wasi"], strict=True)]
    figures = {f"{name}_{key}_ms_per_photo": 1e3 * statistics.median(t) / BATCH for key, t in times.items()}
    return {**figures, f"{name}_speedup": statistics.median(ratios), f"{name}_ratios": [round(r, 3) for r in ratios]}


if __name__ == "__main__":
    sys.exit(main())
