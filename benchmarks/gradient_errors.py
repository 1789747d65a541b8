"""How far each of the planner's choices moves the gradient, on real photos: the constants of `planner/choices.py`.

    python benchmarks/gradient_errors.py --photos ../shared/data/clothing [--batches 4]

The reference is the exact gradient of the factored network: float32, nothing rounded, rebuilt or compressed. Each
choice alone is compared with it: relative error ||g - g0|| / ||g0|| over all weights of all linears together, dW =
P U^T multiplied out, mean over batches of 16 photos. The bases of low rank are warm-started over the batches as in
training: the first batches only warm up. The classifier is fitted in closed form first. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wasi_edge.artefact import open_artefact
from wasi_edge.bench.gradient import (
    EVERYTHING,
    WARM_UP,
    closed_form_head,
    load_sample,
    start,
    weight_gradients,
)
from wasi_edge.bench.subject import find_subject
from wasi_edge.keep import COMPACT, EXACT, Keep, Rebuild
from wasi_edge.models.locate import resolve_model
from wasi_edge.models.network import VisionTransformer, build_network
from wasi_edge.training.factor_update import stochastic_round

# name: what blocks keep, gradient rank, bits of the factors
CHOICES = {
    "rank_64": (EXACT, 64, 32),
    "rank_32": (EXACT, 32, 32),
    "rank_16": (EXACT, 16, 32),
    "compact": (COMPACT, EVERYTHING, 32),
    "rebuilt_attention": (Keep(Rebuild.ATTENTION), EVERYTHING, 32),
    "rebuilt_branches": (Keep(Rebuild.BRANCHES), EVERYTHING, 32),
    "recomputed": (Keep(Rebuild.BLOCK), EVERYTHING, 32),
    "half_weights": (EXACT, EVERYTHING, 16),
    "rank_32_recomputed_half_weights": (Keep(Rebuild.BLOCK), 32, 16),
}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--batches", type=int, default=4)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    subject = find_subject(options.model)
    sample = load_sample(options.photos, subject.preprocessing, most=10_000)
    parts = sample.batches(options.batches)
    plain = network(options.model, 32)
    head = closed_form_head(plain, sample)
    start(plain, EVERYTHING)

    def gradients(model: VisionTransformer, part: slice, keep: Keep, rank: int) -> dict[str, Tensor]:
        # a complete basis is exact whichever it is: nothing to refresh
        pixels, labels = sample.pixels[part], sample.labels[part]
        return weight_gradients(model, head, pixels, labels, keep, refresh=rank != EVERYTHING)

    exact = [gradients(plain, part, EXACT, EVERYTHING) for part in parts[WARM_UP:]]
    errors = {}
    for name, (keep, rank, bits) in CHOICES.items():
        model = network(options.model, bits)
        start(model, rank)
        for part in parts[:WARM_UP] if rank != EVERYTHING else ():
            gradients(model, part, keep, rank)
        found = (gradients(model, part, keep, rank) for part in parts[WARM_UP:])
        errors[name] = statistics.fmean(relative(a, b) for a, b in zip(found, exact, strict=True))
        print(f"{name:35s} {errors[name]:.5f}", flush=True)
    print(json.dumps(errors))
    return 0


def network(name: str, bits: int) -> VisionTransformer:
    """The model without a classifier, its factors in so many bits."""
    noise = torch.Generator().manual_seed(0)
    with open_artefact(resolve_model(name)) as artefact:
        config, tensors = artefact.config, artefact.tensors

        def read(key: str) -> Tensor:
            value = torch.from_numpy(tensors.read(key, np.float32))
            if not key.endswith((".left", ".right")):
                return value
            # the artefact may be in float16 itself: off its grid, where training takes the factors
            value *= 1.0003
            return value if bits == 32 else stochastic_round(value, torch.empty_like(value, dtype=torch.half), noise)

        return build_network(config.geometry, config.linears, read, config.preprocessing.image_size, head=False)


def relative(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Relative error over all linears together."""
    error = sum(float((actual[name] - value).square().sum()) for name, value in exact.items())
    return (error / sum(float(value.square().sum()) for value in exact.values())) ** 0.5


if __name__ == "__main__":
    sys.exit(main())
