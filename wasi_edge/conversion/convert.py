"""A dense checkpoint into factors, block by block.

Without photos every linear is truncated by plain SVD at the rank where `epsilon` of its squared singular values is
kept. With calibration photos epsilon fixes how many parameters are stored, and the photos decide the rest: which
linear gets how many of them (`allocate.py`), and the factors and bias that bring the network's tokens closest to the
dense network's (`walk.py`, `regression.py`).

In memory are one dense block, its factors, the moments of its linears (all four while the ranks are chosen, then one at
a time) and the tokens of all calibration photos in float16, twice; written factors leave at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wasi_edge.artefact import ModelConfig, write_artefact
from wasi_edge.conversion.allocate import allocate_ranks
from wasi_edge.conversion.factorise import factorise, singular_values
from wasi_edge.conversion.sources import DenseSource
from wasi_edge.conversion.walk import Calibration, Walk
from wasi_edge.models.geometry_swin import Geometry
from wasi_edge.subspace.ranks import break_even_rank, rank_for_explained_variance

OnProgress = Callable[[int, int], None]


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
    geometry, read = source.geometry, _torch_reader(source)
    ranks = choose_ranks(source, settings)
    preprocessing = source.preprocessing.with_image_size(settings.image_size)
    walk, blocks, done = None, geometry.depth, 0

    def on_block() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, blocks)

    if calibration is not None and any(ranks.values()):
        walk, blocks = Walk(geometry, read, calibration, preprocessing), 2 * geometry.depth
        ranks = _spread(ranks, walk, geometry, on_block)
    config = ModelConfig(
        name=source.name,
        geometry=geometry,
        linears=ranks,
        preprocessing=preprocessing,
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
    rounded = torch.float16 if stored is np.float16 else torch.float32
    shapes = config.tensor_shapes()
    with write_artefact(out, config) as writer:
        for name in shapes:
            if not name.startswith("blocks."):
                writer.add(name, source.read(name).astype(stored))
        for index in range(geometry.depth):
            own = [name for name in ranks if name.startswith(f"blocks.{index}.")]
            tensors = _truncated(own, ranks, read) if walk is None else walk.factored(index, ranks, rounded)
            for name in shapes:
                if name.startswith(f"blocks.{index}."):
                    tensor = tensors.pop(name) if name in tensors else read(name)
                    writer.add(name, tensor.numpy().astype(stored))
            del tensors  # before the next block is read
            on_block()
    return config


def _truncated(linears: list[str], ranks: dict[str, int | None], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Linears of one block by plain SVD."""
    tensors: dict[str, Tensor] = {}
    for name in linears:
        rank, weight = ranks[name], read(f"{name}.weight")
        if rank is None:
            tensors[f"{name}.weight"] = weight
        else:
            tensors[f"{name}.left"], tensors[f"{name}.right"] = factorise(weight, rank)
    return tensors


def _spread(
    ranks: dict[str, int | None], walk: Walk, geometry: Geometry, on_block: Callable[[], None]
) -> dict[str, int | None]:
    """Other ranks for the same number of parameters: those that keep most of what the photos make of the layers.
    Linears that stay dense stay so."""
    shapes = geometry.linear_shapes()
    factored = {name: rank for name, rank in ranks.items() if rank is not None}
    spectra: dict[str, np.ndarray] = {}
    for index in range(geometry.depth):
        spectra |= {name: found for name, found in walk.spectra(index).items() if name in factored}
        on_block()
    walk.start_again()
    return {**ranks, **allocate_ranks(spectra, shapes, sum(rank * sum(shapes[n]) for n, rank in factored.items()))}


def _torch_reader(source: DenseSource) -> Callable[[str], Tensor]:
    return lambda name: torch.from_numpy(source.read(name))
