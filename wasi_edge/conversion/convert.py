"""A dense checkpoint into factors, block by block.

Without photos every linear is truncated by plain SVD at the rank where `epsilon` of its squared singular values is
kept. With calibration photos the ranks are the same (epsilon fixes what is stored), but the factors are those that
keep the layer's *outputs*, and the bias takes up what the truncation would shift (`factorise.py`).

The calibration photos' tokens walk through the network one block at a time: a block is read, run dense while the
second moments of the inputs of its four linears are summed, factored, and run once more in factors, so that the next
block is calibrated on what it will really see. In memory are one dense block, four moments and the tokens of all
calibration photos in float16; written factors leave at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wasi_edge.artefact import ModelConfig, write_artefact
from wasi_edge.chunks import CONVERSION_PHOTOS, WIDE_INPUT
from wasi_edge.conversion.factorise import Moments, bias_correction, factorise, singular_values
from wasi_edge.conversion.sources import DenseSource
from wasi_edge.layers.linear import DenseLinear
from wasi_edge.layers.saving import Pass
from wasi_edge.models.vit import build_block, build_stem
from wasi_edge.preprocess import normalise
from wasi_edge.subspace.ranks import break_even_rank, rank_for_explained_variance

LINEARS = ("qkv", "proj", "fc1", "fc2")
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """`count` photos; `read(i)` gives photo i as uint8 (S, S, 3) at the size of the preprocessing."""

    count: int
    read: Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Settings:
    """How to truncate.

    epsilon         share of the squared singular values of each linear that is kept, in (0, 1]
    dtype           'float32' or 'float16' of the stored tensors
    image_size      input size of the calibration and default of the result
    always_factor   factor a linear whose rank lies above break-even too, just below it
    """

    epsilon: float = 0.8
    dtype: str = "float32"
    image_size: int = 224
    always_factor: bool = False


def choose_ranks(source: DenseSource, settings: Settings) -> dict[str, int | None]:
    """Rank of each linear, None where factors would be larger than the weight.

    For a linear that is itself truncated (in an artefact of ours at a larger epsilon) its own loss is counted: the
    product holds only its epsilon of the original's squared singular values, and beyond its rank only rounding.
    """
    config = source.config
    ranks: dict[str, int | None] = {}
    for name, (out_features, in_features) in source.geometry.linear_shapes().items():
        weight = torch.from_numpy(source.read(f"{name}.weight"))
        values = singular_values(weight).numpy()
        share, own = settings.epsilon, None if config is None else config.linears.get(name)
        if own is not None:
            values = values[:own]
            if config is not None and config.epsilon is not None:
                share = min(1.0, settings.epsilon / config.epsilon)
        rank = rank_for_explained_variance(values, share)
        highest = break_even_rank(out_features, in_features)
        if rank <= highest:
            ranks[name] = rank
        else:
            ranks[name] = highest if settings.always_factor else None
    return ranks


@torch.no_grad()
def convert(
    source: DenseSource,
    out: Path,
    settings: Settings,
    calibration: Calibration | None = None,
    provenance: dict[str, object] | None = None,
    on_progress: OnProgress | None = None,
) -> ModelConfig:
    """Write the artefact `out` and return its configuration. `on_progress(done, all)` counts blocks.

    Raises ConversionError or ArtefactError for damaged sources; nothing is left at `out` then.
    """
    geometry = source.geometry
    ranks = choose_ranks(source, settings)
    config = ModelConfig(
        name=source.name,
        geometry=geometry,
        linears=ranks,
        preprocessing=source.preprocessing.with_image_size(settings.image_size),
        epsilon=settings.epsilon,
        dtype=settings.dtype,
        id2label=source.id2label,
        provenance={
            **source.provenance,
            **(provenance or {}),
            "calibration_photos": 0 if calibration is None else calibration.count,
        },
    )
    stored = np.float16 if settings.dtype == "float16" else np.float32
    read = _torch_reader(source)
    walk = None if calibration is None else _Walk(source, config, calibration)
    with write_artefact(out, config) as writer:
        for name in config.tensor_shapes():
            if not name.startswith("blocks."):
                writer.add(name, source.read(name).astype(stored))
        for index in range(geometry.depth):
            tensors = _factored_block(geometry.tensor_shapes(ranks, None), index, ranks, read, walk)
            for name, tensor in tensors.items():
                writer.add(name, tensor.numpy().astype(stored))
            if walk is not None:
                # the next block is calibrated on what rounding leaves of this one
                walk.advance(index, ranks, {n: t.to(_torch_dtype(stored)).float() for n, t in tensors.items()})
            del tensors  # before the next block is read
            if on_progress is not None:
                on_progress(index + 1, geometry.depth)
    return config


def _factored_block(
    shapes: dict[str, tuple[int, ...]],
    index: int,
    ranks: dict[str, int | None],
    read: Callable[[str], Tensor],
    walk: _Walk | None,
) -> dict[str, Tensor]:
    """All tensors of block `index`, factored as `ranks` says."""
    prefix = f"blocks.{index}."
    moments = {} if walk is None else walk.moments(index)
    tensors: dict[str, Tensor] = {}
    for linear in LINEARS:
        name = prefix + linear
        rank, weight, bias = ranks[name], read(f"{name}.weight"), read(f"{name}.bias")
        if rank is None:
            tensors[f"{name}.weight"] = weight
        else:
            moment = moments.pop(linear, None)
            mean = None if moment is None else moment.mean()
            left, right = factorise(weight, rank, None if moment is None else moment.covariance(consume=True))
            if mean is not None:
                bias = bias + bias_correction(weight, left, right, mean)
            tensors[f"{name}.left"], tensors[f"{name}.right"] = left, right
        tensors[f"{name}.bias"] = bias
    for name in shapes:
        if name.startswith(prefix) and name not in tensors:
            tensors[name] = read(name)
    return tensors


class _ObservedLinear(DenseLinear):
    """A dense linear that adds its inputs to `moments`."""

    moments: Moments

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        self.moments.add(x)
        return super().forward(x, *args, **kwargs)


class _Walk:
    """The calibration photos' tokens (n, N, D) on their way through the network."""

    def __init__(self, source: DenseSource, config: ModelConfig, calibration: Calibration) -> None:
        self.geometry = source.geometry
        self._read = _torch_reader(source)
        self._run = Pass()
        stem = build_stem(source.geometry, self._read, config.preprocessing.image_size)
        states = []
        for first in range(0, calibration.count, CONVERSION_PHOTOS):
            chosen = range(first, min(first + CONVERSION_PHOTOS, calibration.count))
            batch = np.stack([calibration.read(photo) for photo in chosen])
            pixels = torch.from_numpy(normalise(batch, config.preprocessing))
            states.append(stem.forward(pixels, self._run)[0].half())
        self._tokens = torch.cat(states)

    def moments(self, index: int) -> dict[str, Moments]:
        """Moments of the inputs of the four linears of block `index`, run dense."""
        dense: dict[str, int | None] = {f"blocks.{index}.{linear}": None for linear in LINEARS}
        block = build_block(self.geometry, index, dense, self._read)
        observed: dict[str, Moments] = {}
        for linear in LINEARS:
            layer = getattr(block, linear)
            layer.__class__ = _ObservedLinear
            width = layer.shape[1]
            layer.moments = observed[linear] = Moments(width, torch.float32 if width > WIDE_INPUT else torch.float64)
        for chunk in self._tokens.split(CONVERSION_PHOTOS):
            block.forward(chunk.float(), self._run, None)
        self._run.workspace.clear()  # factoring needs the room
        return observed

    def advance(self, index: int, ranks: dict[str, int | None], tensors: dict[str, Tensor]) -> None:
        """Replace the tokens by what block `index`, with these tensors, makes of them."""
        block = build_block(self.geometry, index, ranks, tensors.__getitem__)
        for chunk in self._tokens.split(CONVERSION_PHOTOS):
            chunk.copy_(block.forward(chunk.float(), self._run, None)[0])


def _torch_reader(source: DenseSource) -> Callable[[str], Tensor]:
    return lambda name: torch.from_numpy(source.read(name))


def _torch_dtype(stored: type) -> torch.dtype:
    return torch.float16 if stored is np.float16 else torch.float32
