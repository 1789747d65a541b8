"""One method, ready to take training steps and to answer: what the stopwatch and the memory probe hold in hands.

Every contestant gets the same pixels, in memory, and the same effective batch. A step is all of it: forward, backward,
clipping, update, upkeep of the subspaces.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wasi_edge.bench.subject import CLASSES, Subject
from wasi_edge.chunks import TURNS
from wasi_edge.errors import UsageError
from wasi_edge.method import Method
from wasi_edge.planner.choices import Choices
from wasi_edge.training.factor_update import ORTHONORMALISE_EVERY
from wasi_edge.training.methods import make_trainer
from wasi_edge.training.trainer import Recipe, SubspaceTrainer, Trainer
from wasi_edge.training.vanilla_trainer import VanillaTrainer
from wasi_edge.units import parse_size

# steps so small that a thousand of them change nothing; clipping and decay at work all the same
_RECIPE = Recipe(1e-6, 1e-6, 1e-6, 0.01, 1.0, 0.1)
_CHECKPOINT = "+checkpoint"


@dataclass(frozen=True)
class Entry:
    """A method as it is named on the command line: `wasi@512MB`, `vanilla+checkpoint`, `lora`.

    `epsilon` None where weights are dense; `budget_bytes` None where memory does not matter.
    """

    name: str
    method: Method
    epsilon: float | None = None
    budget_bytes: int | None = None

    @property
    def is_checkpointed(self) -> bool:
        """Whether blocks run forward twice instead of keeping what they need."""
        return self.name.endswith(_CHECKPOINT)


def parse_methods(text: str, epsilons: tuple[float, ...]) -> list[Entry]:
    """Entries of a comma-separated list, those with factors once for each epsilon; vanilla comes first, always.

    Raises UsageError for a name that is none.
    """
    entries = [Entry("vanilla", Method.VANILLA)]
    for name in dict.fromkeys(word.strip() for word in text.split(",")):
        match = re.fullmatch(r"(\w+)(\+checkpoint)?(?:@(\w+))?", name)
        try:
            method = Method(match[1] if match else "")
        except ValueError:
            known = ", ".join([*Method, "vanilla+checkpoint", "wasi@512MB"])
            raise UsageError(f"--methods: {name!r} is none of {known}") from None
        assert match is not None
        if (match[2] and method is not Method.VANILLA) or (match[3] and not method.is_explicit):
            raise UsageError(f"--methods: {name!r}: +checkpoint is for vanilla, @budget for wasi, wsi and asi")
        budget = None if match[3] is None else parse_size(match[3])
        for epsilon in epsilons if method.has_factors else (None,):
            entries.append(Entry(name, method, epsilon, budget))
    return list(dict.fromkeys(entries))


class Contestant:
    """`entry` built on `subject` with the choices of a plan, for steps of `batch` photos."""

    def __init__(
        self, subject: Subject, entry: Entry, choices: Choices, batch: int, seed: int, recipe: Recipe = _RECIPE
    ) -> None:
        self.entry, self.choices, self.batch = entry, choices, batch
        self._trainer = _build(subject, entry, choices, seed, recipe)
        self._has_windows = subject.geometry.has_windows
        generator = torch.Generator().manual_seed(seed)
        size = subject.image_size
        self._pixels = torch.randn(batch, 3, size, size, generator=generator)
        self._labels = torch.randint(0, CLASSES, (batch,), generator=generator)
        self._weight = torch.ones(batch)
        self._steps = 0

    @property
    def learns(self) -> bool:
        """Whether a training step is more than a forward pass."""
        return self.entry.method is not Method.HEAD

    def step(self) -> None:
        """One optimiser step; of `head` the pass that its closed form needs of each photo."""
        if not self.learns:
            self._for_parts(self._trainer.features)
            return
        size = self.choices.micro_batch
        for first in range(0, self.batch, size):
            part = slice(first, first + size)
            self._trainer.micro_batch(
                self._pixels[part], self._labels[part], self._weight[part], first == 0, self.batch
            )
        self._steps += 1
        self._trainer.apply(self._steps, 1.0)

    def upkeep_fraction(self, rounds: int) -> float | None:
        """Share of a step that keeps subspaces and weights current: refreshing the bases, the steps of the weights, and
        of making pairs orthonormal again the part that falls on one step. None for methods that have no subspace."""
        if not isinstance(self._trainer, SubspaceTrainer):
            return None
        shares = []
        for _ in range(rounds):
            before, began = self._trainer.upkeep_seconds, time.perf_counter()
            for _ in range(TURNS):
                self.step()
            over = time.perf_counter()
            self._trainer.orthonormalise()
            rare = (time.perf_counter() - over) * TURNS / ORTHONORMALISE_EVERY
            shares.append((self._trainer.upkeep_seconds - before + rare) / (over - began + rare))
        return statistics.median(shares)

    def window_copies_fraction(self, rounds: int) -> float | None:
        """Share of a step that brings tokens from the windows of one block to those of the next. None where there are
        no windows, and for methods that leave them to autograd."""
        if not isinstance(self._trainer, SubspaceTrainer) or not self._has_windows:
            return None
        before, began = self._trainer.gather_seconds, time.perf_counter()
        for _ in range(rounds):
            self.step()
        return (self._trainer.gather_seconds - before) / (time.perf_counter() - began)

    def infer(self) -> None:
        """Logits of all photos."""
        self._for_parts(self._trainer.logits)

    def counts(self) -> tuple[int, int]:
        """Parameters that learn, and parameters that are stored."""
        stored = sum(value.numel() for value in self._trainer.parameters().values())
        if isinstance(self._trainer, VanillaTrainer):
            return sum(p.numel() for p in self._trainer.model.parameters() if p.requires_grad), stored
        if not self.learns:
            return sum(v.numel() for k, v in self._trainer.parameters().items() if k.startswith("head.")), stored
        return stored, stored

    def _for_parts(self, work: Any) -> None:
        with torch.no_grad():
            for part in self._pixels.split(max(1, self.choices.micro_batch)):
                work(part)


def free_choices(batch: int, blocks: int, gradient_rank: int) -> Choices:
    """With all the memory it likes: everything at once, nothing rounded, nothing rebuilt. `blocks` learn."""
    return Choices(micro_batch=batch, trained_blocks=blocks, gradient_rank=gradient_rank, compact=False, trimmed=False)


def choices_from(values: dict[str, Any]) -> Choices:
    """The inverse of `Choices.choices`."""
    return Choices(**{field.name: values[field.name] for field in dataclasses.fields(Choices)})


def _build(subject: Subject, entry: Entry, choices: Choices, seed: int, recipe: Recipe) -> Trainer:
    read = subject.reader(entry.epsilon)

    def held(name: str) -> Tensor:
        value = read(name)
        return value.half() if choices.weight_bits == 16 and name.endswith((".left", ".right")) else value

    return make_trainer(
        entry.method,
        subject.geometry,
        subject.ranks(entry.epsilon),
        held,
        subject.image_size,
        CLASSES,
        recipe,
        choices,
        seed,
        checkpointed=entry.is_checkpointed,
    )
