"""One fine-tuning run in memory: the same loop, trainers and head as `finetune`, on a split of `datasets`.

Test photos choose nothing: what counts is their accuracy after the epoch that validation chooses. They are looked at
after every epoch, or, where there are many of them, only with the head, the model that is kept and the last one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy.datasets import Photos, Split
from wasi_edge.bench.contestant import free_choices
from wasi_edge.bench.subject import Read, Subject
from wasi_edge.data.augment import SCALE_RANGE, augment
from wasi_edge.layers.saving import Pass
from wasi_edge.method import Method, Optimizer
from wasi_edge.models.network import build_network
from wasi_edge.planner.choices import usual_blocks
from wasi_edge.preprocess import normalise
from wasi_edge.training import defaults
from wasi_edge.training.choosing import is_kept
from wasi_edge.training.head import fit_head
from wasi_edge.training.loop import Hooks, LoopSettings, Progress, note_epoch, train, validate
from wasi_edge.training.methods import make_trainer
from wasi_edge.training.photos import PhotoSet
from wasi_edge.training.setup import usual_recipe
from wasi_edge.training.trainer import Recipe, Trainer

_AT_ONCE = 32
# how blocks learnt before their rates differed and the first ones were frozen: what earlier studies were made with
ONE_RATE: dict[str, Any] = {"learning_rate": 6e-5, "stem_rate": 1.0, "trained_share": 1.0}


@dataclass(frozen=True)
class Variant:
    """What is compared. None: the default of the method; rates are relative to `learning_rate`, `trained_share` is the
    share of the blocks that learns."""

    method: str = "wasi"
    epsilon: float | None = None
    learning_rate: float | None = None
    dense_rate: float | None = None
    head_rate: float | None = None
    stem_rate: float | None = None
    trained_share: float | None = None
    warm_up: float | None = None
    epochs: int = 6
    label_smoothing: float = defaults.LABEL_SMOOTHING
    weight_decay: float = defaults.WEIGHT_DECAY
    gradient_rank: int = defaults.GRADIENT_RANK
    smallest_crop: float = SCALE_RANGE[0]
    batch: int = defaults.BATCH
    optimizer: Optimizer = Optimizer.POLAR

    @property
    def warm_up_share(self) -> float:
        """Of the steps."""
        return defaults.WARM_UP[self.method] if self.warm_up is None else self.warm_up

    def trained_blocks(self, depth: int) -> int:
        """How many of so many blocks learn, counted from the end."""
        if self.trained_share is not None:
            return math.ceil(self.trained_share * depth)
        return usual_blocks(Method(self.method), depth, defaults.TRAINED_SHARE)

    @property
    def recipe(self) -> Recipe:
        """Rates of a step before the schedule."""
        usual = usual_recipe(self.method, self.learning_rate, self.optimizer)
        relative = {"dense_rate": self.dense_rate, "head_rate": self.head_rate}
        rates = {name: share * usual.learning_rate for name, share in relative.items() if share is not None}
        stem = usual.stem_rate if self.stem_rate is None else self.stem_rate
        more = {"weight_decay": self.weight_decay, "label_smoothing": self.label_smoothing, "stem_rate": stem}
        return dataclasses.replace(usual, **rates, **more)


@dataclass(frozen=True)
class _Part(PhotoSet):
    """Photos of one part, in crops as small as a variant says."""

    smallest_crop: float = SCALE_RANGE[0]

    def augmented(self, positions: Any, seed: int, epoch: int) -> torch.Tensor:
        size, scale = self.preprocessing.image_size, (self.smallest_crop, SCALE_RANGE[1])
        chosen = [int(self.indices[p]) for p in positions]
        views = [augment(self.cache.read(i), size, seed, epoch, i, scale) for i in chosen]
        return torch.from_numpy(normalise(np.stack(views), self.preprocessing))


class _Quiet:
    """Events that nobody watches."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def learn(
    subject: Subject,
    photos: Photos,
    split: Split,
    variant: Variant,
    seed: int,
    watch: Callable[[int, Trainer], None] = lambda epoch, trainer: None,
    test_always: bool = True,
) -> dict[str, Any]:
    """Accuracies of the closed-form head and after every epoch, and of the best of them by validation; `test_always`
    False: test photos are looked at three times, and the entries of other epochs have none.

    `seconds` of an epoch's entry: features, head and training up to its end, without validation; a step counts as the
    median of its epoch, so that a machine busy for a while does not. `watch` is called
    before the first epoch, as epoch 0, and after every one.
    """
    torch.set_grad_enabled(False)
    method = Method(variant.method)
    choices = free_choices(variant.batch, variant.trained_blocks(subject.geometry.depth), variant.gradient_rank)
    epsilon = (variant.epsilon or subject.own_epsilon) if method.has_factors else None
    built = make_trainer(
        method,
        subject.geometry,
        subject.ranks(epsilon),
        _with_head(subject.reader(epsilon), len(photos.classes), subject.geometry.feature_width),
        subject.image_size,
        len(photos.classes),
        variant.recipe,
        choices,
        seed,
    )
    parts = {name: _part(photos, getattr(split, name), variant) for name in ("train", "val", "test")}
    began = time.monotonic()
    features = torch.cat([built.features(p).clone() for p in _inputs(parts["train"])])
    built.set_head(fit_head(features, parts["train"].labels, len(photos.classes)))
    head_seconds = time.monotonic() - began
    progress = Progress()
    first, head_test = validate(built, parts["val"]), validate(built, parts["test"])
    progress.best_accuracy, progress.best_loss = first.accuracy or 0.0, first.loss or 0.0
    note_epoch(progress, 0, first, 0.0, 0)
    tests: list[float | None] = [head_test.accuracy]
    history = [
        {
            "epoch": 0,
            "val": first.accuracy,
            "val_loss": first.loss,
            "test": tests[0],
            "seconds": round(head_seconds, 1),
        }
    ]
    steps, times = [0.0], [0.0]
    settings = LoopSettings(
        variant.epochs, variant.batch, variant.batch, seed, variant.epochs, None, variant.warm_up_share
    )

    def on_step(at: Progress) -> None:
        steps.append(at.train_seconds)
        if at.epoch_step == 0:  # the last of an epoch
            taken = np.diff(steps)
            times.append(times[-1] + float(np.median(taken)) * len(taken))
            steps[:] = steps[-1:]
            is_last = len(times) - 1 == variant.epochs
            tests.append(validate(built, parts["test"]).accuracy if test_always or is_last else None)
            watch(len(times) - 1, built)

    kept: dict[str, torch.Tensor] = {}

    def on_best() -> None:
        if not test_always:
            kept.update({name: value.clone() for name, value in built.parameters().items()})

    hooks = Hooks(lambda: 0.0, lambda: False, on_best, lambda: None, on_step, lambda: 0)
    watch(0, built)
    if method is not Method.HEAD:
        train(built, parts["train"], parts["val"], settings, progress, _Quiet(), hooks)  # type: ignore[arg-type]
    if kept and tests[progress.best_epoch] is None:
        built.end_training()
        for name, parameter in built.parameters().items():
            parameter.copy_(kept[name])
        tests[progress.best_epoch] = validate(built, parts["test"]).accuracy
    for entry, test, seconds in zip(progress.history[1:], tests[1:], times[1:], strict=True):
        history.append(
            {
                "epoch": entry["epoch"],
                "val": entry["val_accuracy"],
                "val_loss": entry["val_loss"],
                "test": test,
                "train_loss": entry["train_loss"],
                "seconds": round(head_seconds + seconds, 1),
            }
        )
    chosen = history[progress.best_epoch]
    return {
        "variant": dataclasses.asdict(variant),
        "seed": seed,
        "head_test": tests[0],
        "best": {key: chosen[key] for key in ("epoch", "val", "val_loss", "test")},
        "history": history,
    }


def kept_epochs(history: Sequence[dict[str, Any]], photos: int) -> list[int]:
    """After each epoch of a run, from 0, the one whose model `finetune` would keep, of so many validation `photos`."""
    found, highest = [0], history[0]["val"]
    for epoch, entry in enumerate(history[1:], 1):
        highest, kept = max(highest, entry["val"]), history[found[-1]]
        better = is_kept(entry["val"], entry["val_loss"], kept["val"], kept["val_loss"], highest, photos)
        found.append(epoch if better else found[-1])
    return found


def settings_of(variant: Variant, subject: Subject, **more: Any) -> dict[str, Any]:
    """What the result of `learn` depends on: a variant with its defaults resolved, weights, the input size."""
    return {
        "variant": _named(variant),
        "recipe": _named(variant.recipe) | {"warm_up": variant.warm_up_share},
        "trained_blocks": variant.trained_blocks(subject.geometry.depth),
        "weights": _fingerprint(subject.folder) if subject.folder else subject.name,
        "image_size": subject.image_size,
        **more,
    }


def _named(values: Variant | Recipe) -> dict[str, Any]:
    """By name; the optimizer only where it is not the first there was, so that older results still count."""
    named = dataclasses.asdict(values)
    if values.optimizer is Optimizer.POLAR:
        del named["optimizer"]
    return named


@lru_cache
def _fingerprint(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def _with_head(read: Read, classes: int, features: int) -> Read:
    """`read` with an empty classifier for these classes: the closed-form fit fills it."""
    empty = {"head.weight": torch.zeros(classes, features), "head.bias": torch.zeros(classes)}
    return lambda name: empty[name] if name in empty else read(name)


def photo_features(subject: Subject, photos: Photos) -> torch.Tensor:
    """What the closed-form head sees of every photo, (n, F): of a model in its stored factors, or of a dense one."""
    torch.set_grad_enabled(False)
    ranks, read = subject.ranks(subject.own_epsilon), subject.reader(subject.own_epsilon)
    network = build_network(subject.geometry, ranks, read, subject.image_size, head=False)
    parts = [range(first, min(first + _AT_ONCE, len(photos))) for first in range(0, len(photos), _AT_ONCE)]
    return torch.cat([network.features(photos.inputs(part), Pass())[0].clone() for part in parts])


def head_accuracy(features: torch.Tensor, photos: Photos, train: np.ndarray, test: np.ndarray) -> float:
    """Accuracy on `test` of the head fitted on `train`."""
    seen, unseen = torch.from_numpy(train), torch.from_numpy(test)
    head = fit_head(features[seen], photos.labels[seen], len(photos.classes))
    logits = features[unseen] @ head.weight.t() + head.bias
    return float((logits.argmax(1) == photos.labels[unseen]).float().mean())


def _part(photos: Photos, indices: np.ndarray, variant: Variant) -> _Part:
    labels, cache = photos.labels[torch.from_numpy(indices)], photos
    return _Part(
        cache,  # type: ignore[arg-type]
        indices,
        labels,
        torch.ones(len(indices)),
        photos.preprocessing,
        _AT_ONCE,
        variant.smallest_crop,
    )


def _inputs(part: _Part) -> Any:
    for first in range(0, len(part), _AT_ONCE):
        yield part.inputs(range(first, min(first + _AT_ONCE, len(part))))
