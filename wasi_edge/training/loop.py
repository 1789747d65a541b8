"""Epochs and steps: order, schedule, accumulation, validation, early stopping, checkpoints, stopping on time.

Every random choice is a function of (seed, epoch, photo), so that where a run stands is a handful of numbers
(`Progress`) and a resumed run repeats nothing and skips nothing.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wasi_edge.data.augment import epoch_order
from wasi_edge.training.choosing import is_kept
from wasi_edge.training.photos import PhotoSet
from wasi_edge.training.request import Events
from wasi_edge.training.trainer import Trainer


@dataclass
class Progress:
    """Where a run stands; plain JSON values. `epoch` counts from 1, `epoch_step` the finished steps of it.

    `micro_batch` is set where memory forced another than the plan's; `degraded` says when and why.
    """

    step: int = 0
    epoch: int = 1
    epoch_step: int = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    best_accuracy: float = -1.0
    best_loss: float = math.inf
    best_epoch: int = 0
    train_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    micro_batch: int | None = None
    degraded: list[dict[str, int]] = field(default_factory=list)

    def photos_seen(self, num_train: int, batch: int) -> int:
        """Photos trained on so far, those of earlier epochs again; the last batch of an epoch may be a smaller one."""
        return (self.epoch - 1) * num_train + min(self.epoch_step * batch, num_train)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; infinity becomes None."""
        values = dataclasses.asdict(self)
        values["best_loss"] = None if math.isinf(self.best_loss) else self.best_loss
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """The inverse of `to_dict`."""
        best_loss = values["best_loss"]
        return cls(**{**values, "best_loss": math.inf if best_loss is None else best_loss})


@dataclass(frozen=True)
class LoopSettings:
    """How long and in what portions. `warm_up`: share of the steps in which the rate rises; `patience`: epochs of
    the second half without a better validation before stopping early; `closing_photos`: photos that are looked at once
    more when training is over."""

    epochs: int
    batch: int
    micro_batch: int
    seed: int
    patience: int
    max_seconds: float | None
    warm_up: float
    closing_photos: int = 0


@dataclass(frozen=True)
class Hooks:
    """What the run does at the loop's marks.

    elapsed         seconds since the command began
    stop_wanted     a signal has come
    on_best         the validation has improved: keep this model
    on_gradients    before every optimiser step, when all that it needs is held
    on_step         after every optimiser step (checkpoint if one is due)
    peak_bytes      peak resident memory of the process so far
    """

    elapsed: Callable[[], float]
    stop_wanted: Callable[[], bool]
    on_best: Callable[[], None]
    on_gradients: Callable[[], None]
    on_step: Callable[[Progress], None]
    peak_bytes: Callable[[], int]


@dataclass(frozen=True)
class Validation:
    """Accuracy and mean cross-entropy over a photo set, and the logits (n, C)."""

    accuracy: float | None
    loss: float | None
    logits: Tensor


def validate(
    trainer: Trainer,
    photos: PhotoSet,
    events: Events | None = None,
    name: str = "validating",
    most_at_once: int | None = None,
) -> Validation:
    """Logits of every photo, in order, `photos.batch` or at most so many at once."""
    batch = min(photos.batch, most_at_once or photos.batch)
    if len(photos) == 0:
        return Validation(None, None, torch.zeros(0, 0))
    if events is not None:
        events.stage(name, len(photos))
    parts = []
    for first in range(0, len(photos), batch):
        chosen = range(first, min(first + batch, len(photos)))
        parts.append(trainer.logits(photos.inputs(chosen)).clone())
        if events is not None:
            events.advance(chosen[-1] + 1)
    logits = torch.cat(parts)
    correct = (logits.argmax(1) == photos.labels).float().mean()
    loss = torch.nn.functional.cross_entropy(logits, photos.labels)
    return Validation(float(correct), float(loss), logits)


def train(
    trainer: Trainer,
    photos: PhotoSet,
    held_out: PhotoSet,
    settings: LoopSettings,
    progress: Progress,
    events: Events,
    hooks: Hooks,
) -> str:
    """Run until done; returns 'completed', 'early_stopped', 'time_limit' or 'interrupted'. Updates `progress`."""
    steps = math.ceil(len(photos) / settings.batch)
    total_steps = steps * settings.epochs
    while progress.epoch <= settings.epochs:
        epoch = progress.epoch
        # asked for before an epoch begins, so that a run resumed just here stops where it would have stopped
        if len(held_out) and progress.epoch_step == 0 and _lost_patience(settings, progress):
            return "early_stopped"
        order = epoch_order(len(photos), settings.seed, epoch)
        events.stage(f"epoch {epoch} of {settings.epochs}", len(photos))
        for index in range(progress.epoch_step, steps):
            chosen = order[index * settings.batch : (index + 1) * settings.batch]
            began = time.monotonic()
            if not _step(trainer, photos, chosen, settings, progress, total_steps, hooks):
                trainer.abandon()
                return "interrupted"
            progress.train_seconds += time.monotonic() - began
            progress.epoch_step = index + 1
            loss = progress.loss_sum / max(progress.weight_sum, 1e-12)
            events.advance(min((index + 1) * settings.batch, len(photos)), f"loss {loss:.3f}")
            if progress.epoch_step < steps:
                hooks.on_step(progress)
                if _out_of_time(settings, hooks, progress, len(photos), len(held_out)):
                    _end_epoch(trainer, held_out, progress, settings, events, hooks, (index + 1) / steps)
                    return "time_limit"
        _end_epoch(trainer, held_out, progress, settings, events, hooks, 1.0)
        progress.epoch, progress.epoch_step = epoch + 1, 0
        progress.loss_sum, progress.weight_sum, progress.correct, progress.seen = 0.0, 0.0, 0, 0
        hooks.on_step(progress)
        if progress.epoch > settings.epochs:
            break
        if hooks.stop_wanted():
            return "interrupted"
        if _out_of_time(settings, hooks, progress, len(photos), len(held_out)):
            return "time_limit"
    return "completed"


def _lost_patience(settings: LoopSettings, progress: Progress) -> bool:
    """Whether the last `patience` epochs of the second half brought nothing better. While the rate is high models are
    worse than they will be when it has fallen: the first half says nothing."""
    waited = progress.epoch - 1 - max(progress.best_epoch, math.ceil(settings.epochs / 2))
    return waited >= settings.patience


def schedule(step: int, total_steps: int, warm_up: float) -> float:
    """Half a cosine from one down to zero, times a linear rise over the first `warm_up` of the steps. `step` counts
    from 1."""
    done = step / total_steps
    return min(1.0, done / warm_up) * 0.5 * (1 + math.cos(math.pi * (step - 1) / total_steps))


def _step(
    trainer: Trainer,
    photos: PhotoSet,
    chosen: np.ndarray,
    settings: LoopSettings,
    progress: Progress,
    total_steps: int,
    hooks: Hooks,
) -> bool:
    """One optimiser step over the photos `chosen`; False if a signal came before its gradients were complete."""
    loss_sum = weight_sum = 0.0
    correct = 0
    size = progress.micro_batch or settings.micro_batch
    for first in range(0, len(chosen), size):
        if hooks.stop_wanted():
            return False
        part = chosen[first : first + size]
        inputs = photos.augmented(part, settings.seed, progress.epoch)
        weight = photos.weight[part]
        loss = trainer.micro_batch(inputs, photos.labels[part], weight, first == 0, len(chosen))
        loss_sum += loss.value
        weight_sum += float(weight.sum())
        correct += loss.correct
    done = progress.step + 1
    factor = schedule(done, total_steps, settings.warm_up)
    if settings.max_seconds is not None:
        # a run that will be cut off anneals by the clock
        factor = min(factor, 0.5 * (1 + math.cos(math.pi * min(1.0, hooks.elapsed() / settings.max_seconds))))
    hooks.on_gradients()
    trainer.apply(done, factor)
    progress.step = done
    progress.loss_sum += loss_sum
    progress.weight_sum += weight_sum
    progress.correct += correct
    progress.seen += len(chosen)
    return True


def _out_of_time(settings: LoopSettings, hooks: Hooks, progress: Progress, num_train: int, num_val: int) -> bool:
    """Whether another step, the validation and the closing passes would no longer fit `max_seconds`."""
    if settings.max_seconds is None:
        return False
    per_photo = progress.train_seconds / max(1, progress.photos_seen(num_train, settings.batch))
    # a forward pass is about a third of a training pass; the end of a run looks at the held-out photos twice
    passes = 2 * num_val + min(settings.closing_photos, num_train)
    closing = per_photo * (settings.batch + 0.4 * passes) + 2.0
    return hooks.elapsed() + closing >= settings.max_seconds


def note_epoch(
    progress: Progress, epoch: float, validation: Validation, seconds: float, peak_bytes: int
) -> dict[str, Any]:
    """Add an entry to the history and return it; training figures are None before the first step."""
    entry = {
        "epoch": epoch,
        "train_loss": progress.loss_sum / max(progress.weight_sum, 1e-12) if progress.seen else None,
        "train_accuracy": progress.correct / progress.seen if progress.seen else None,
        "val_accuracy": validation.accuracy,
        "val_loss": validation.loss,
        "steps": progress.step,
        "seconds": round(seconds, 1),
        "peak_rss_bytes": peak_bytes,
    }
    progress.history.append(entry)
    return entry


def _end_epoch(
    trainer: Trainer,
    held_out: PhotoSet,
    progress: Progress,
    settings: LoopSettings,
    events: Events,
    hooks: Hooks,
    share: float,
) -> None:
    """Validate, note the history, keep the model if it is the best so far."""
    # buffers that a smaller micro-batch gave back are not to come back for a validation
    result = validate(trainer, held_out, events, most_at_once=progress.micro_batch)
    entry = note_epoch(progress, round(progress.epoch - 1 + share, 3), result, hooks.elapsed(), hooks.peak_bytes())
    if result.accuracy is None or result.loss is None:
        better = True  # nothing to choose by: the last one counts
    else:
        highest = max(entry["val_accuracy"] for entry in progress.history if entry["val_accuracy"] is not None)
        kept = progress.best_accuracy, progress.best_loss
        better = is_kept(result.accuracy, result.loss, *kept, highest, len(held_out))
    if better:
        progress.best_accuracy = -1.0 if result.accuracy is None else result.accuracy
        progress.best_loss = math.inf if result.loss is None else result.loss
        progress.best_epoch = progress.epoch
        hooks.on_best()
    events.epoch(entry)
