"""The watchdog: a plan is a prediction, the budget is a promise.

Before and after every optimiser step the memory of the process tree is compared with the budget. Where it came close
(another torch, another allocator, a library that grows) the run goes on with smaller micro-batches, which give the same
gradients up to the basis that a step's first micro-batch chooses, instead of being killed or breaking its word.
"""

from __future__ import annotations

from collections.abc import Callable

from wasi_edge.memory.malloc import release_free_memory
from wasi_edge.memory.process import total_memory
from wasi_edge.planner.choices import MICRO_BATCHES
from wasi_edge.training.loop import Progress
from wasi_edge.training.request import Events
from wasi_edge.training.trainer import Trainer
from wasi_edge.units import format_size

# how near the budget counts as too near
MARGIN_SHARE = 0.01


class MemoryGuard:
    """Watches one run. `held_bytes` measures; tests replace it."""

    def __init__(
        self,
        budget_bytes: int,
        planned_bytes: int,
        micro_batch: int,
        events: Events,
        held_bytes: Callable[[], int] = total_memory,
    ) -> None:
        # a plan may use all of the budget: what it foresaw is no reason to interfere
        self._limit_bytes = max(int(budget_bytes * (1 - MARGIN_SHARE)), min(planned_bytes, budget_bytes))
        self._budget_bytes, self._planned, self._events = budget_bytes, micro_batch, events
        self._held_bytes = held_bytes
        self._warned = False
        self._observed_bytes = 0

    def observe(self) -> None:
        """Note what is held now: a step's memory is highest when its gradients are complete."""
        self._observed_bytes = max(self._observed_bytes, self._held_bytes())

    def check(self, progress: Progress, trainer: Trainer) -> None:
        """Give buffers back and take smaller micro-batches from here on, if memory came too near the budget."""
        self.observe()
        held, self._observed_bytes = self._observed_bytes, 0
        if held <= self._limit_bytes:
            return
        current = progress.micro_batch or self._planned
        smaller = max((size for size in MICRO_BATCHES if size < current), default=None)
        trainer.release_buffers()
        release_free_memory()
        state = f"memory is at {format_size(held)} of the {format_size(self._budget_bytes)} budget"
        if smaller is None:
            if not self._warned:
                self._warned = True
                self._events.message(f"{state}, and micro-batches are as small as they can be")
            return
        progress.micro_batch = smaller
        progress.degraded.append({"step": progress.step, "held_bytes": held, "micro_batch": smaller})
        self._events.message(f"{state}: going on with micro-batches of {smaller} instead of {current}")
