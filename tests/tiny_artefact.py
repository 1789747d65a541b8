"""A small random model folder for tests of what runs on artefacts: two blocks, 16 px, three classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from models import TINY, random_tensors

from wasi_edge.artefact import ModelConfig, write_artefact
from wasi_edge.models.geometry_swin import Geometry
from wasi_edge.preprocessing import Preprocessing

LABELS = ("cat", "dog", "grün")


def write_tiny(
    folder: Path,
    rank: int | Mapping[str, int | None] | None = 6,
    dtype: str = "float32",
    labels: tuple[str, ...] | None = LABELS,
    epsilon: float | None = None,
    seed: int = 0,
    geometry: Geometry = TINY,
    preprocessing: Preprocessing | None = None,
) -> Path:
    """Write the model; `rank` None, of all or of one by name, stores dense linears, `labels` None leaves the classifier
    away."""
    classes = None if labels is None else len(labels)
    ranks, tensors = random_tensors(geometry, rank, classes, seed)
    if epsilon is None and rank is not None:
        epsilon = 0.8
    config = ModelConfig(
        name="tiny",
        geometry=geometry,
        linears=ranks,
        preprocessing=preprocessing or Preprocessing(image_size=16),
        epsilon=epsilon,
        dtype=dtype,
        id2label=None if labels is None else dict(enumerate(labels)),
        provenance={"source": "drawn at random"},
    )
    with write_artefact(folder, config) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor.numpy().astype(np.dtype(dtype)))
    return folder
