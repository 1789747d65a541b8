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
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wasi_edge.artefact import open_artefact
from wasi_edge.data.folder import scan_folder
from wasi_edge.keep import COMPACT, EXACT, Keep, Rebuild
from wasi_edge.layers.linear import WasiLinear
from wasi_edge.layers.saving import Pass
from wasi_edge.models.locate import resolve_model
from wasi_edge.models.vit import VisionTransformer, build_vit
from wasi_edge.preprocess import center_view, normalise, open_photo, shrink
from wasi_edge.training.factor_update import stochastic_round
from wasi_edge.training.head import fit_head
from wasi_edge.training.loss import cross_entropy

BATCH, WARM_UP, HEAD_PHOTOS, EVERYTHING = 16, 6, 200, 10_000
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
    pixels, labels = load(options.photos, options.model)
    classes = int(labels.max()) + 1
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    fitted = order[:HEAD_PHOTOS]
    plain = network(options.model, 32)
    features = torch.cat([plain.features(pixels[part], Pass())[0].clone() for part in fitted.split(8)])
    head = fit_head(features, labels[fitted], classes)
    batches = list(order[HEAD_PHOTOS:].split(BATCH))[: WARM_UP + options.batches]
    exact = [gradients(plain, head, pixels[b], labels[b], EXACT, EVERYTHING) for b in batches[WARM_UP:]]
    errors = {}
    for name, (keep, rank, bits) in CHOICES.items():
        model = network(options.model, bits)
        found = []
        for number, part in enumerate(batches):
            if rank == EVERYTHING and number < WARM_UP:
                continue
            found.append(gradients(model, head, pixels[part], labels[part], keep, rank, fresh=not found))
        errors[name] = float(np.mean([relative(a, b) for a, b in zip(found[-options.batches :], exact, strict=True)]))
        print(f"{name:35s} {errors[name]:.5f}", flush=True)
    print(json.dumps(errors))
    return 0


def load(folder: Path, model: str) -> tuple[Tensor, Tensor]:
    """Centre views of all photos, normalised, and their classes."""
    with open_artefact(resolve_model(model)) as artefact:
        preprocessing = artefact.config.preprocessing
    found = scan_folder(folder, min_classes=2, min_side=preprocessing.resize_side)
    photos = [shrink(open_photo(photo.path, preprocessing.resize_side), preprocessing) for photo in found.photos]
    views = np.stack([center_view(photo, preprocessing) for photo in photos])
    number = {label: index for index, label in enumerate(found.classes)}
    labels = torch.tensor([number[photo.label] for photo in found.photos])
    return torch.from_numpy(normalise(views, preprocessing)), labels


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

        return build_vit(config.geometry, config.linears, read, config.preprocessing.image_size, head=False)


def gradients(
    model: VisionTransformer, head: object, pixels: Tensor, labels: Tensor, keep: Keep, rank: int, fresh: bool = True
) -> dict[str, Tensor]:
    """dW (O, I) of every linear."""
    linears = {name: linear for name, linear in model.linears().items() if isinstance(linear, WasiLinear)}
    if fresh:
        generator = torch.Generator().manual_seed(0)
        for linear in linears.values():
            linear.start_training(rank, model.tokens, generator)
    run = Pass(refresh_basis=True)
    features, saved = model.features(pixels, run, [keep] * len(model.blocks))
    assert saved is not None
    weight, bias = head  # type: ignore[misc]
    loss = cross_entropy(features @ weight.t() + bias, labels, torch.ones(len(labels)), len(labels), 0.1)
    found: dict[str, Tensor] = {}

    def collect(layer: str, parts: dict[str, Tensor]) -> None:
        for key, value in parts.items():
            if key.endswith(".projected"):
                name = f"{layer}.{key.removesuffix('.projected')}"
                found[name] = value @ linears[name].basis.t()  # type: ignore[union-attr]

    model.backward(saved, loss.dlogits @ weight, run, collect)
    return found


def relative(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Relative error over all linears together."""
    error = sum(float((actual[name] - value).square().sum()) for name, value in exact.items())
    return (error / sum(float(value.square().sum()) for value in exact.values())) ** 0.5


if __name__ == "__main__":
    sys.exit(main())
