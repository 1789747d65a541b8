"""What is measured: a model of ours, a dense checkpoint, or a well-known geometry with synthetic weights.

`Subject.ranks` and `Subject.reader` give the same network dense and in factors at any epsilon. Synthetic weights are
random: their ranks are fixed by what epsilon gives on pretrained networks of the kind, and what they learn means
nothing; time and memory do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wasi_edge.artefact import is_artefact, open_artefact, read_config
from wasi_edge.bench.synthetic import EPSILON_SHARES, GEOMETRIES, synthetic_geometry, synthetic_ranks
from wasi_edge.conversion.convert import Settings, choose_ranks
from wasi_edge.conversion.factorise import factorise
from wasi_edge.conversion.sources import open_source
from wasi_edge.errors import UsageError
from wasi_edge.models.geometry_swin import Geometry
from wasi_edge.models.locate import resolve_model
from wasi_edge.preprocessing import Preprocessing

Read = Callable[[str], Tensor]
CLASSES = 5


@dataclass(frozen=True)
class Subject:
    """A network at one input size. `folder` None: synthetic, with `rank_part` of the ranks usual at an epsilon.
    `own_epsilon`: what it is truncated at already."""

    name: str
    geometry: Geometry
    image_size: int
    preprocessing: Preprocessing
    folder: Path | None
    own_epsilon: float | None
    rank_part: float = 1.0

    @property
    def is_synthetic(self) -> bool:
        """Whether its weights are random."""
        return self.folder is None

    def ranks(self, epsilon: float | None) -> dict[str, int | None]:
        """Rank of each linear at `epsilon`, None where the model stores it dense at its own; `epsilon` None: all dense.
        Raises UsageError where it has no such ranks."""
        if epsilon is None:
            return dict.fromkeys(self.geometry.linear_shapes())
        return _ranks(self, epsilon)

    def reader(self, epsilon: float | None) -> Read:
        """Tensors by artefact name, float32, dense or in the factors of `ranks(epsilon)`; the head small and random."""
        if self.folder is None:
            return _synthetic_reader(self.geometry, self.ranks(epsilon))
        head = _synthetic_reader(self.geometry, {})
        stored = _stored_reader(self, epsilon)
        return lambda name: head(name) if name.startswith("head.") else stored(name)


def find_subject(model: str, image_size: int | None = None) -> Subject:
    """The geometry of that name with synthetic weights, or the model in a folder (or `default`)."""
    if model in GEOMETRIES:
        size = image_size or 224
        return Subject(model, synthetic_geometry(model, size), size, Preprocessing(image_size=size), None, None)
    folder = resolve_model(model)
    with open_source(folder) as source:
        preprocessing = source.preprocessing if image_size is None else source.preprocessing.with_image_size(image_size)
        source.geometry.tokens(preprocessing.image_size)
        own = read_config(folder).epsilon if is_artefact(folder) else None
        return Subject(source.name, source.geometry, preprocessing.image_size, preprocessing, folder, own)


@lru_cache(maxsize=8)
def _ranks(subject: Subject, epsilon: float) -> dict[str, int | None]:
    shapes = subject.geometry.linear_shapes()
    if subject.folder is None:
        if epsilon not in EPSILON_SHARES:
            known = " and ".join(f"{value:g}" for value in EPSILON_SHARES)
            raise UsageError(f"synthetic weights have ranks for epsilon {known}, not {epsilon:g}")
        return synthetic_ranks(subject.geometry, EPSILON_SHARES[epsilon] * subject.rank_part)
    if subject.own_epsilon is not None:
        if epsilon > subject.own_epsilon:
            raise UsageError(
                f"{subject.name} was truncated at epsilon {subject.own_epsilon:g}, so {epsilon:g} cannot be had from it"
            )
        if epsilon == subject.own_epsilon:
            stored = read_config(subject.folder).linears
            return {name: stored[name] for name in shapes}
    with open_source(subject.folder) as source:
        return choose_ranks(source, Settings(epsilon, always_factor=True))


def _stored_reader(subject: Subject, epsilon: float | None) -> Read:
    """From the folder: dense as the source gives it; in factors as they are stored where the ranks agree, else the
    dense weight truncated."""
    assert subject.folder is not None
    folder, ranks, factored = subject.folder, subject.ranks(epsilon), {}

    def read(name: str) -> Tensor:
        linear, _, key = name.rpartition(".")
        if key not in ("left", "right"):
            with open_source(folder) as source:
                return torch.from_numpy(source.read(name))
        rank = ranks[linear]
        assert rank is not None
        if is_artefact(folder) and read_config(folder).linears[linear] == rank:
            with open_artefact(folder) as artefact:
                return torch.from_numpy(artefact.tensors.read(name, np.float32))
        if name not in factored:
            with open_source(folder) as source:
                left, right = factorise(torch.from_numpy(source.read(f"{linear}.weight")), rank)
            factored.update({f"{linear}.left": left, f"{linear}.right": right})
        return factored.pop(name)

    return read


def _synthetic_reader(geometry: Geometry, ranks: dict[str, int | None]) -> Read:
    """Random tensors, each of a generator keyed by its name, scaled like those of a trained network."""
    shapes = geometry.tensor_shapes(ranks or dict.fromkeys(geometry.linear_shapes()), CLASSES)

    def read(name: str) -> Tensor:
        shape = shapes[name]
        generator = torch.Generator().manual_seed(sum(name.encode()) * 7919)
        value = torch.randn(shape, generator=generator)
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) or ".scale" in name:
            return 1 + 0.1 * value
        if len(shape) == 1 or name == "position" or name.endswith("bias_table"):
            return 0.02 * value
        if name.endswith(".left"):
            return value / shape[0] ** 0.5
        return value / shape[-1] ** 0.5

    return read
