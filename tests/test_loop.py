"""Where a run ends, and what it takes up again: the loop with a trainer that only counts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from wasi_edge.training.choosing import is_kept
from wasi_edge.training.loop import Hooks, LoopSettings, Progress, train
from wasi_edge.training.loss import Loss

TRAIN, HELD_OUT, CLASSES = 10, 7, 2


class Photos:
    """Of a side of the split what the loop asks for; photos are their own positions."""

    def __init__(self, count: int) -> None:
        self.count, self.batch = count, 4
        self.labels, self.weight = torch.zeros(count, dtype=torch.long), torch.ones(count)

    def __len__(self) -> int:
        return self.count

    def inputs(self, positions: Iterable[int]) -> Tensor:
        return torch.tensor(list(positions))

    def augmented(self, positions: Iterable[int], seed: int, epoch: int) -> Tensor:
        return torch.tensor([int(position) for position in positions])


class CountingTrainer:
    """Never gets any better."""

    def __init__(self) -> None:
        self.steps, self.validated, self.trained = 0, [], 0

    def logits(self, inputs: Tensor) -> Tensor:
        self.validated.append(len(inputs))
        return torch.tensor([[1.0, 0.0]]).repeat(len(inputs), 1)

    def micro_batch(self, inputs: Tensor, *_: Any) -> Loss:
        self.trained += len(inputs)
        return Loss(0.0, 0, torch.zeros(len(inputs), CLASSES))

    def apply(self, step: int, schedule: float) -> float:
        self.steps += 1
        return 0.0

    def abandon(self) -> None:
        pass


class Silent:
    def __getattr__(self, _: str) -> Any:
        return lambda *_: None


def go(trainer: CountingTrainer, progress: Progress, stop_at: int | None = None, epochs: int = 10) -> str:
    hooks = Hooks(
        elapsed=lambda: 0.0,
        stop_wanted=lambda: stop_at is not None and progress.step >= stop_at,
        on_best=lambda: None,
        on_gradients=lambda: None,
        on_step=lambda _: None,
        peak_bytes=lambda: 0,
    )
    settings = LoopSettings(epochs=epochs, batch=4, micro_batch=4, seed=0, patience=2, max_seconds=None, warm_up=0.1)
    return train(trainer, Photos(TRAIN), Photos(HELD_OUT), settings, progress, Silent(), hooks)  # type: ignore[arg-type]


def started() -> Progress:
    """After the head, which no epoch beats."""
    return Progress(best_accuracy=1.0, best_loss=0.0)


def test_a_run_stopped_where_patience_ends_does_not_train_on_when_it_is_resumed():
    straight = CountingTrainer()
    assert go(straight, started()) == "early_stopped"
    assert straight.steps == (5 + 2) * 3  # the first half, in which the rate is high, and then the patience
    progress, first = started(), CountingTrainer()
    assert go(first, progress, stop_at=21) == "interrupted" and first.steps == 21
    second = CountingTrainer()
    assert go(second, Progress.from_dict(progress.to_dict())) == "early_stopped" and second.steps == 0


def test_all_epochs_are_run_where_patience_does_not_end_them():
    progress, trainer = started(), CountingTrainer()
    assert go(trainer, progress, epochs=3) == "completed" and trainer.steps == 9


def test_patience_counts_from_the_best_where_that_is_in_the_second_half():
    progress, trainer = started(), CountingTrainer()
    progress.best_epoch = 7
    assert go(trainer, progress) == "early_stopped" and trainer.steps == (7 + 2) * 3


@pytest.mark.parametrize(
    ("accuracy", "loss", "kept"),
    [
        (0.92, 0.5, False),  # more right answers, but fewer than the error of 100 photos: the loss counts
        (0.94, 0.5, True),
        (0.89, 0.3, True),
        (0.86, 0.3, False),
        (0.90, 0.4, False),
        (0.91, 0.4, True),
    ],
)
def test_what_is_kept_is_the_lowest_loss_within_an_error_of_the_highest_accuracy(accuracy, loss, kept):
    assert is_kept(accuracy, loss, kept_accuracy=0.9, kept_loss=0.4, highest=0.91, photos=100) == kept


def test_the_highest_accuracy_counts_even_where_that_model_was_not_kept():
    assert is_kept(0.86, 0.3, kept_accuracy=0.88, kept_loss=0.4, highest=0.88, photos=100)
    assert not is_kept(0.86, 0.3, kept_accuracy=0.88, kept_loss=0.4, highest=0.91, photos=100)
    assert is_kept(1.0, 0.2, kept_accuracy=1.0, kept_loss=0.3, highest=1.0, photos=1)


def test_photos_are_counted_as_they_are_trained_on_with_a_smaller_last_batch():
    progress, trainer = started(), CountingTrainer()
    go(trainer, progress, stop_at=5)
    assert progress.photos_seen(TRAIN, 4) == trainer.trained == TRAIN + 8
    assert Progress(epoch=3).photos_seen(TRAIN, 4) == 2 * TRAIN


def test_a_smaller_micro_batch_is_kept_to_while_validating():
    progress, trainer = started(), CountingTrainer()
    progress.micro_batch = 2
    go(trainer, progress, epochs=1)
    assert max(trainer.validated) == 2 and sum(trainer.validated) == HELD_OUT
