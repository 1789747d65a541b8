"""How far a compressed gradient is from the exact one, on real photos: speed without it does not count.

The reference is the exact gradient of the same network in float32, nothing compressed, rounded or rebuilt. Bases are
warm-started over a few batches as in training before anything is compared. The classifier is fitted in closed form on
photos that are not compared, as a run begins.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wasi_edge.data.folder import scan_folder
from wasi_edge.keep import EXACT, Keep
from wasi_edge.layers.linear import SubspaceLinear
from wasi_edge.layers.saving import Pass
from wasi_edge.models.network import VisionTransformer
from wasi_edge.preprocess import center_view, normalise, open_photo, shrink
from wasi_edge.preprocessing import Preprocessing
from wasi_edge.training.head import Head, fit_head
from wasi_edge.training.loss import cross_entropy

BATCH, WARM_UP, HEAD_PHOTOS = 16, 6, 200
# a rank that no layer has: nothing is compressed
EVERYTHING = 1_000_000
_SMOOTHING = 0.1


@dataclass(frozen=True)
class Sample:
    """Centre views (n, 3, S, S), normalised, and their classes (n,), in a random order that is always the same."""

    pixels: Tensor
    labels: Tensor

    @property
    def for_head(self) -> slice:
        """Photos that the classifier is fitted on; the others are compared."""
        return slice(0, min(HEAD_PHOTOS, len(self.labels) // 2))

    def batches(self, count: int, warm_up: int = WARM_UP) -> list[slice]:
        """Of `BATCH` photos, warming up included, as many as there are."""
        first = self.for_head.stop
        starts = range(first, len(self.labels) - BATCH + 1, BATCH)
        return [slice(start, start + BATCH) for start in starts][: warm_up + count]


def load_sample(folder: Path, preprocessing: Preprocessing, most: int) -> Sample:
    """At most so many photos of class folders. Raises NoUsableData where there are none."""
    found = scan_folder(folder, min_classes=2, min_side=preprocessing.resize_side)
    order = torch.randperm(len(found.photos), generator=torch.Generator().manual_seed(0)).tolist()[:most]
    photos = [found.photos[index] for index in order]
    shrunk = (shrink(open_photo(photo.path, preprocessing.resize_side), preprocessing) for photo in photos)
    views = np.stack([center_view(pixels, preprocessing) for pixels in shrunk])
    number = {label: index for index, label in enumerate(found.classes)}
    labels = torch.tensor([number[photo.label] for photo in photos])
    return Sample(torch.from_numpy(normalise(views, preprocessing)), labels)


def closed_form_head(network: VisionTransformer, sample: Sample) -> Head:
    """The classifier that a run begins with."""
    pixels, labels = sample.pixels[sample.for_head], sample.labels[sample.for_head]
    features = torch.cat([network.features(part, Pass())[0].clone() for part in pixels.split(8)])
    return fit_head(features, labels, int(sample.labels.max()) + 1)


def weight_gradients(
    network: VisionTransformer, head: Head, pixels: Tensor, labels: Tensor, keep: Keep = EXACT, refresh: bool = True
) -> dict[str, Tensor]:
    """P U^T (O, I) of every linear that learns so, for one batch; training state must be there."""
    linears = {n: linear for n, linear in network.linears().items() if isinstance(linear, SubspaceLinear)}
    run = Pass(refresh_basis=refresh)
    features, saved = network.features(pixels, run, [keep] * len(network.blocks))
    assert saved is not None
    logits = features @ head.weight.t() + head.bias
    loss = cross_entropy(logits, labels, torch.ones(len(labels)), len(labels), _SMOOTHING)
    found: dict[str, Tensor] = {}

    def collect(layer: str, parts: Mapping[str, Tensor]) -> None:
        for key, value in parts.items():
            if key.endswith(".projected"):
                name = f"{layer}.{key.removesuffix('.projected')}"
                basis = linears[name].basis
                assert basis is not None
                found[name] = value @ basis.t()

    network.backward(saved, loss.dlogits @ head.weight, run, collect)
    return found


def start(network: VisionTransformer, gradient_rank: int | Mapping[str, int]) -> None:
    """Random bases for every linear, of one rank or of a rank each."""
    generator = torch.Generator().manual_seed(0)
    for name, linear in network.linears().items():
        if isinstance(linear, SubspaceLinear):
            rank = gradient_rank if isinstance(gradient_rank, int) else gradient_rank[name]
            linear.start_training(rank, network.tokens_of(name), generator)


def gradient_errors(
    build: Callable[[], VisionTransformer],
    gradient_rank: int | Mapping[str, int],
    sample: Sample,
    batches: int = 4,
    warm_up: int = WARM_UP,
) -> tuple[float, dict[str, float]]:
    """Relative error ||dW - P U^T|| / ||dW||: mean over linears and batches, and the means of each kind of layer.

    `build` makes the network of factors (or of dense weights) whose gradients are P U^T, twice.
    """
    errors = errors_by_linear(build, gradient_rank, sample, batches, warm_up)
    by_kind: dict[str, list[float]] = {}
    for name, values in errors.items():
        by_kind.setdefault(name.rpartition(".")[2], []).extend(values)
    every = [error for values in errors.values() for error in values]
    return statistics.fmean(every), {kind: statistics.fmean(values) for kind, values in by_kind.items()}


def errors_by_linear(
    build: Callable[[], VisionTransformer],
    gradient_rank: int | Mapping[str, int],
    sample: Sample,
    batches: int = 4,
    warm_up: int = WARM_UP,
) -> dict[str, list[float]]:
    """The relative errors of `gradient_errors`, of each linear in each batch."""
    compressed, exact = build(), build()
    head = closed_form_head(exact, sample)
    start(compressed, gradient_rank)
    start(exact, EVERYTHING)
    errors: dict[str, list[float]] = {}
    for number, part in enumerate(sample.batches(batches, warm_up)):
        found = weight_gradients(compressed, head, sample.pixels[part], sample.labels[part])
        if number < warm_up:
            continue
        # a complete basis is exact whichever it is: nothing to refresh
        wanted = weight_gradients(exact, head, sample.pixels[part], sample.labels[part], refresh=False)
        for name, value in wanted.items():
            error = float((found[name] - value).norm() / value.norm().clamp_min(1e-30))
            errors.setdefault(name, []).append(error)
    return errors
