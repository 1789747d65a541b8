"""From a budget to a plan: the fastest way to train that fits, or the smallest budget that would do.

A run has three phases whose peaks do not add up: decoding (before torch is imported), the closed-form head, and the
gradient steps. Decoding adapts itself to what is left of the budget; the other two are predicted here by arithmetic
(`memory.py`) on top of a measured base, and must fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from wasi_edge.errors import BudgetInfeasible
from wasi_edge.planner.memory import (
    Item,
    Workload,
    head_items,
    largest_linear_bytes,
    total,
    training_items,
    vanilla_items,
)
from wasi_edge.units import format_size

MICRO_BATCHES = (16, 12, 8, 6, 4, 3, 2, 1)
# A block that is recomputed runs forward once more, fc2's product excepted. An estimate, not fitted yet.
RECOMPUTE_COST = 0.30
# Per-call overhead of a micro-batch, in units of the time of one photo. An estimate, not fitted yet.
MICRO_BATCH_OVERHEAD = 0.25
# An update that rebuilds the Gram matrices of the factors instead of carrying them. An estimate, not fitted yet.
REBUILD_COST = 1.7
EVALUATION_BATCH = 8


@dataclass(frozen=True)
class Base:
    """Bytes of the process that no plan can change.

    start       peak before training begins: while torch is imported, while a dense checkpoint is converted
    steady      from then on, without the run's own tensors
    """

    start: int
    steady: int


@dataclass(frozen=True)
class Speed:
    """Seconds per photo on this machine, measured by the probe; `update` is one optimiser step."""

    train_seconds: float
    infer_seconds: float
    update_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Work:
    """How much there is to do."""

    num_train: int
    num_val: int
    epochs: int
    batch: int


@dataclass(frozen=True)
class Plan:
    """A run that fits.

    `peak_bytes` is the predicted peak of the whole process; `items` say where it goes, the base first.
    """

    method: str
    image_size: int
    micro_batch: int
    accumulation: int
    recomputed_blocks: int
    carried_grams: bool
    gradient_rank: int
    epochs: int
    peak_bytes: int
    seconds: float
    items: tuple[Item, ...]

    def to_dict(self) -> dict[str, object]:
        """What `report.json` says under `plan`."""
        return {
            "method": self.method,
            "image_size": self.image_size,
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "keep": "compact" if self.method == "wasi" else "everything" if self.method == "vanilla" else "nothing",
            "recomputed_blocks": self.recomputed_blocks,
            "carried_grams": self.carried_grams,
            "gradient_rank": self.gradient_rank,
            "epochs": self.epochs,
            "memory": [{"item": item.item, "bytes": item.bytes} for item in self.items],
        }


def choose_plan(load: Workload, work: Work, base: Base, budget_bytes: int, speed: Speed) -> Plan:
    """The fastest plan whose predicted peak is within the budget.

    Raises BudgetInfeasible, naming the smallest budget that would do, when there is none.
    """
    plans = list(candidates(load, work, base, speed))
    fitting = [plan for plan in plans if plan.peak_bytes <= budget_bytes]
    if not fitting:
        smallest = smallest_budget(plans)
        raise BudgetInfeasible(
            f"a budget of {format_size(budget_bytes)} is too small: this run needs at least {format_size(smallest)}; "
            f"try --budget {smallest // 2**20}MB, a smaller --image-size or a smaller model",
            smallest,
        )
    return min(fitting, key=lambda plan: (plan.seconds, plan.peak_bytes))


def smallest_budget(plans: list[Plan]) -> int:
    """The smallest budget that fits one of the plans, rounded up to whole MB."""
    return math.ceil(min(plan.peak_bytes for plan in plans) / 2**20) * 2**20


def candidates(load: Workload, work: Work, base: Base, speed: Speed) -> Iterator[Plan]:
    """Every way to run this, with its predicted peak and time."""
    num_photos = work.num_train + work.num_val
    if load.method == "head":
        for size in MICRO_BATCHES:
            if size > EVALUATION_BATCH:
                continue
            head = head_items(load, size, num_photos)
            yield _plan(load, work, base, speed, size, 0, head, head)
        return
    for size in MICRO_BATCHES:
        if size > work.batch:
            continue
        evaluated = min(size, EVALUATION_BATCH)
        if load.method == "vanilla":
            head = head_items(load, evaluated, num_photos)
            yield _plan(load, work, base, speed, size, 0, vanilla_items(load, size), head)
            continue
        for again in range(load.geometry.depth + 1):
            for carried in (True, False):
                head = head_items(load, evaluated, num_photos, carried)
                items = training_items(load, size, again, carried)
                yield _plan(load, work, base, speed, size, again, items, head, carried)


def _plan(
    load: Workload,
    work: Work,
    base: Base,
    speed: Speed,
    micro_batch: int,
    recomputed: int,
    train: list[Item],
    head: list[Item],
    carried_grams: bool = True,
) -> Plan:
    items = max(train, head, key=total)
    if load.method != "head" and load.ranks and any(rank is None for rank in load.ranks.values()):
        # multiplying factors out, or truncating a dense layer, holds one dense weight twice
        items = [*items, Item("one dense weight while loading", largest_linear_bytes(load))]
    accumulation = math.ceil(work.batch / micro_batch)
    steps = work.epochs * math.ceil(work.num_train / work.batch)
    overhead = (1 + MICRO_BATCH_OVERHEAD / micro_batch) / (1 + MICRO_BATCH_OVERHEAD / 4)
    slowdown = overhead * (1 + RECOMPUTE_COST * recomputed / load.geometry.depth)
    infer_seconds = speed.infer_seconds * overhead
    seconds = (work.num_train + work.num_val) * (speed.decode_seconds + infer_seconds)
    if load.method != "head":
        seconds += work.epochs * (work.num_train * speed.train_seconds * slowdown + work.num_val * infer_seconds)
        seconds += (
            steps * speed.update_seconds * (1.0 if carried_grams else REBUILD_COST) + work.num_train * infer_seconds
        )
    items = [Item("interpreter and libraries (measured)", base.steady), *items]
    if total(items) < base.start:
        items = [Item("importing the libraries or converting the model", base.start)]
    return Plan(
        method=load.method,
        image_size=load.image_size,
        micro_batch=micro_batch,
        accumulation=accumulation if load.method != "head" else 1,
        recomputed_blocks=recomputed,
        carried_grams=carried_grams,
        gradient_rank=load.gradient_rank,
        epochs=work.epochs if load.method != "head" else 0,
        peak_bytes=total(items),
        seconds=seconds,
        items=tuple(items),
    )
