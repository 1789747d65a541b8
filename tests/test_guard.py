"""The watchdog takes smaller micro-batches before the budget is exceeded, and the training stays what it was."""

from __future__ import annotations

from typing import Any

import torch
from models import TINY, multiplied_out, random_tensors

from wasi_edge.keep import COMPACT
from wasi_edge.models.network import build_network
from wasi_edge.training.guard import MemoryGuard
from wasi_edge.training.loop import Progress
from wasi_edge.training.trainer import Recipe, SubspaceTrainer

MB = 2**20


class Recorder:
    """Events that remember the messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def __getattr__(self, _: str) -> Any:
        return lambda *_: None


def small_trainer() -> SubspaceTrainer:
    ranks, tensors = random_tensors(TINY, 6, 3, dtype=torch.float32)
    model = build_network(TINY, ranks, tensors.__getitem__, 16, head=True)
    return SubspaceTrainer(model, Recipe(1e-3, 1e-3, 1e-3, 0.01, 2.0, 0.1), [COMPACT] * TINY.depth, 5, 0)


def step(trainer: SubspaceTrainer, size: int, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    pixels, labels = torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 3
    with torch.no_grad():
        for first in range(0, 8, size):
            part = slice(first, first + size)
            trainer.micro_batch(pixels[part], labels[part], torch.ones(len(labels[part])), first == 0, 8)
        trainer.apply(number, 1.0)


def test_far_from_the_budget_nothing_changes():
    trainer, progress, events = small_trainer(), Progress(step=3), Recorder()
    step(trainer, 8, 1)
    held = trainer.held_bytes()
    MemoryGuard(100 * MB, 90 * MB, 8, events, held_bytes=lambda: 98 * MB).check(progress, trainer)
    assert progress.micro_batch is None and progress.degraded == [] and events.messages == []
    assert trainer.held_bytes() == held > 0


def test_a_plan_that_uses_all_of_the_budget_is_left_to_do_so():
    progress, events = Progress(step=3), Recorder()
    for held, smaller in ((99.8, None), (100.2, 6)):
        guard = MemoryGuard(100 * MB, int(99.9 * MB), 8, events, held_bytes=lambda held=held: int(held * MB))
        guard.check(progress, small_trainer())
        assert progress.micro_batch == smaller


def test_what_was_held_before_the_update_counts():
    progress, readings = Progress(step=3), iter([120 * MB, 80 * MB])
    guard = MemoryGuard(100 * MB, 90 * MB, 8, Recorder(), held_bytes=lambda: next(readings))
    guard.observe()
    guard.check(progress, small_trainer())
    assert progress.micro_batch == 6


def test_near_the_budget_micro_batches_shrink_until_memory_fits():
    trainer, progress, events = small_trainer(), Progress(step=3), Recorder()
    step(trainer, 8, 1)
    before = trainer.held_bytes()
    readings = iter([99.5 * MB, 99.9 * MB, 80 * MB])
    guard = MemoryGuard(100 * MB, 90 * MB, 8, events, held_bytes=lambda: int(next(readings)))
    guard.check(progress, trainer)
    assert progress.micro_batch == 6 and trainer.held_bytes() == 0
    guard.check(progress, trainer)
    guard.check(progress, trainer)
    assert progress.micro_batch == 4
    assert [entry["micro_batch"] for entry in progress.degraded] == [6, 4] and progress.degraded[0]["step"] == 3
    assert len(events.messages) == 2 and "6 instead of 8" in events.messages[0]
    step(trainer, progress.micro_batch, 2)
    assert trainer.held_bytes() < before
    assert Progress.from_dict(progress.to_dict()) == progress  # a resumed run keeps the smaller micro-batch


def test_at_the_smallest_micro_batch_it_says_so_once():
    trainer, progress, events = small_trainer(), Progress(), Recorder()
    guard = MemoryGuard(100 * MB, 90 * MB, 1, events, held_bytes=lambda: 120 * MB)
    guard.check(progress, trainer)
    guard.check(progress, trainer)
    assert progress.micro_batch is None and progress.degraded == [] and len(events.messages) == 1


def test_smaller_micro_batches_give_the_same_step_up_to_rounding_and_basis():
    whole, parts, still = small_trainer(), small_trainer(), small_trainer()
    # the basis of a step comes from its first micro-batch: with all of it at hand both see the same
    for number in (1, 2, 3):
        step(whole, 8, number)
        step(parts, 4, number)
    apart = moved = 0.0
    ours, theirs, before = (multiplied_out(trainer.parameters()) for trainer in (whole, parts, still))
    for name, value in ours.items():
        apart += float((value - theirs[name]).square().sum())
        moved += float((value - before[name]).square().sum())
    assert 0 < apart < 0.15 * moved
