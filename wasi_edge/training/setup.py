"""From a model on disk to a trainer, and back: the part of a run that knows both files and torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wasi_edge.artefact import ModelConfig, open_artefact, write_artefact
from wasi_edge.conversion.budget import calibration_photos
from wasi_edge.conversion.calibration import spread
from wasi_edge.conversion.convert import Calibration, Settings, convert
from wasi_edge.conversion.sources import open_source
from wasi_edge.method import Optimizer
from wasi_edge.models.network import VisionTransformer, build_network, resampled
from wasi_edge.training import defaults
from wasi_edge.training.methods import make_trainer
from wasi_edge.training.photos import PhotoSet
from wasi_edge.training.prepare import Prepared
from wasi_edge.training.request import Events
from wasi_edge.training.trainer import Recipe, Trainer


def convert_for(prepared: Prepared, photos: PhotoSet, out: Path, events: Events) -> None:
    """Factor the dense checkpoint of this run, calibrated on its own training photos, into the folder `out`."""
    geometry, size = prepared.model.geometry, prepared.model.preprocessing.image_size
    budget_bytes, base_bytes = prepared.request.budget_bytes, prepared.base.steady
    chosen = spread(len(photos), calibration_photos(geometry, size, len(photos), budget_bytes, base_bytes))
    assert prepared.model.convert_epsilon is not None
    settings = Settings(prepared.model.convert_epsilon, "float32", size, always_factor=True)
    events.stage("factoring", 2 * geometry.depth)  # all blocks are measured before the first is factored
    with open_source(prepared.model.folder) as source:
        convert(
            source,
            out,
            settings,
            Calibration(len(chosen), lambda index: photos.views([chosen[index]])[0]),
            on_progress=lambda done, _: events.advance(done),
        )


def usual_recipe(method: str, learning_rate: float | None = None, optimizer: Optimizer = Optimizer.POLAR) -> Recipe:
    """Of a method, at its usual learning rate or another one, which the other rates follow."""
    rate = learning_rate or defaults.learning_rate(method, optimizer)
    of_dense, of_head = defaults.relative_rates(method, optimizer)
    return Recipe(
        learning_rate=rate,
        dense_rate=rate * of_dense,
        head_rate=rate * of_head,
        weight_decay=defaults.weight_decay(optimizer),
        clip_norm=defaults.CLIP_NORM,
        label_smoothing=defaults.LABEL_SMOOTHING,
        stem_rate=defaults.STEM_RATE[method],
        optimizer=optimizer,
    )


def build_trainer(prepared: Prepared, model_folder: Path, active: Tensor | None) -> Trainer:
    """The trainer of this run's method on the model in `model_folder`, its head at zero; without the frozen blocks
    where their output is cached."""
    with _reader(prepared, model_folder, _held_type(prepared)) as read:
        return make_trainer(
            prepared.request.method,
            prepared.model.geometry,
            prepared.ranks,
            read,
            prepared.model.preprocessing.image_size,
            len(prepared.labels),
            usual_recipe(prepared.request.method, prepared.request.learning_rate, prepared.work.optimizer),
            prepared.plan,
            prepared.request.seed,
            active,
        )


def build_frozen(prepared: Prepared, model_folder: Path) -> VisionTransformer:
    """The blocks that do not learn."""
    geometry, size = prepared.model.geometry, prepared.model.preprocessing.image_size
    blocks = range(geometry.depth - prepared.plan.trained_blocks)
    with _reader(prepared, model_folder, _held_type(prepared)) as read:
        return build_network(geometry, prepared.ranks, read, size, head=False, blocks=blocks)


def earlier_head(config: ModelConfig, folder: Path) -> tuple[Tensor, Tensor]:
    """Weight (C, F) and bias (C,) of an artefact's classifier."""
    with open_artefact(folder) as artefact:
        weight = torch.from_numpy(artefact.tensors.read("head.weight", np.float32))
        return weight, torch.from_numpy(artefact.tensors.read("head.bias", np.float32))


def artefact_config(prepared: Prepared, training: dict[str, Any]) -> ModelConfig:
    """Configuration of this run's result; its position table is that of the training size."""
    model, request = prepared.model, prepared.request
    size = model.preprocessing.image_size
    geometry = model.geometry.at_size(size)
    provenance: Mapping[str, Any] = {} if model.config is None else model.config.provenance
    return ModelConfig(
        name=model.name,
        geometry=geometry,
        linears=prepared.ranks,
        preprocessing=model.preprocessing,
        epsilon=None if request.method.has_dense_weights else model.epsilon,
        dtype="float32",
        id2label=dict(enumerate(prepared.labels)),
        provenance={**provenance, "fine_tuned_from": model.name},
        training=training,
    )


def save_model(trainer: Trainer, prepared: Prepared, model_folder: Path, config: ModelConfig, out: Path) -> None:
    """Write the trainer's parameters as an artefact, atomically; frozen ones it does not hold come from the start."""
    parameters = trainer.parameters()
    names = list(config.tensor_shapes())
    has_frozen = any(name not in parameters for name in names)
    # a model that is all here needs its start no more, which may be on a stick that is gone
    start = _reader(prepared, model_folder, np.float32) if has_frozen else nullcontext(parameters.__getitem__)
    with start as read, write_artefact(out, config) as writer:
        for name in names:
            value = parameters[name] if name in parameters else read(name)
            if name not in parameters:
                value = resampled(name, value, prepared.model.geometry, prepared.model.preprocessing.image_size)
            writer.add(name, value.float().contiguous().numpy())


def load_parameters(trainer: Trainer, folder: Path) -> None:
    """Take the parameters of an artefact that `save_model` wrote, those that the trainer holds."""
    parameters = trainer.parameters()
    with open_artefact(folder) as artefact, torch.no_grad():
        for name in artefact.tensors:
            if name in parameters:
                parameters[name].copy_(torch.from_numpy(artefact.tensors.read(name, np.float32)))


def _held_type(prepared: Prepared) -> type:
    return np.float16 if prepared.plan.weight_bits == 16 else np.float32


@contextmanager
def _reader(prepared: Prepared, folder: Path, held: type) -> Iterator[Callable[[str], Tensor]]:
    """Tensors of the starting point by name: float32, factors as `held`, the head at zero."""
    geometry, num_classes = prepared.model.geometry, len(prepared.labels)
    head = {
        "head.weight": torch.zeros(num_classes, geometry.feature_width),
        "head.bias": torch.zeros(num_classes),
    }
    stays_dense = prepared.model.config is None and prepared.model.convert_epsilon is None
    if stays_dense or prepared.request.method.has_dense_weights:
        with open_source(folder) as source:
            yield lambda name: head[name] if name in head else torch.from_numpy(source.read(name))
        return
    with open_artefact(folder) as artefact:

        def read(name: str) -> Tensor:
            if name in head:
                return head[name]
            is_factor = name.endswith((".left", ".right"))
            return torch.from_numpy(artefact.tensors.read(name, held if is_factor else np.float32))

        yield read
