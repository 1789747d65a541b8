"""From a budget to a plan: the fastest way to train that fits, or the smallest budget that would do.

A run has three phases whose peaks do not add up: decoding (before torch is imported), the closed-form head, and the
gradient steps. Decoding adapts itself to what is left of the budget; the other two are predicted here by arithmetic
(`memory.py`) on top of a measured base, and must fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from wasi_edge.errors import BudgetInfeasible
from wasi_edge.planner.memory import (
    Choices,
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
# The first three are ratios fitted to `benchmarks/plan_costs.py` (ViT-S/14, 168 px, two cores).
# A block that is recomputed runs forward once more, fc2's product excepted: 1.32 measured.
RECOMPUTE_COST = 0.32
# Per-call overhead of a micro-batch, in units of the time of one photo: 1.57, 1.22, 1.03 measured for 1, 2, 4 photos
# against 8, where this gives 1.53, 1.23, 1.08.
MICRO_BATCH_OVERHEAD = 0.65
# An update that rebuilds the Gram matrices of the factors instead of carrying them: 1.49 measured.
REBUILD_COST = 1.5
# One that also rounds factors to 16 bits, and widening them for a pass, in photo times at the probe's size. Estimates,
# not measured yet.
ROUNDING_COST = 1.8
WIDENING_COST = 0.2
# Autograd's tape in memory that is mapped anew each time: 150 ms a photo without, 265 with.
FAULT_COST = 1.75
_PROBED_PHOTOS, _PROBED_TOKENS = 4, 145
EVALUATION_BATCH = 8
# share of the time below which another budget is not worth mentioning
NOTICEABLE = 0.03


@dataclass(frozen=True)
class Base:
    """Bytes of the process that no plan can change.

    start       peak before training begins: while torch is measured in a child process, while it is imported, while
                a dense checkpoint is converted
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


@dataclass(frozen=True, kw_only=True)
class Plan(Choices):
    """A run that fits.

    `peak_bytes` is the predicted peak of the whole process; `items` say where it goes, the base first. `others` are
    the plans that the next smaller and the next larger budget with another outcome would give.
    """

    method: str
    image_size: int
    accumulation: int
    gradient_rank: int
    epochs: int
    peak_bytes: int
    seconds: float
    items: tuple[Item, ...]
    others: tuple[Plan, ...] = field(default=(), compare=False)

    @property
    def smallest_budget(self) -> int:
        """The smallest budget, whole MB in bytes, that this plan fits."""
        return math.ceil(self.peak_bytes / 2**20) * 2**20

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
            "weight_bits": self.weight_bits,
            "reused_heap": self.reused_heap,
            "gradient_rank": self.gradient_rank,
            "epochs": self.epochs,
            "memory": [{"item": item.item, "bytes": item.bytes} for item in self.items],
            "other_budgets": [
                {
                    "budget_bytes": other.smallest_budget,
                    "seconds": round(other.seconds, 1),
                    **{key: value for key, value in other._choices().items() if value != self._choices()[key]},
                }
                for other in self.others
            ],
        }

    def _choices(self) -> dict[str, object]:
        return {key.name: getattr(self, key.name) for key in dataclasses.fields(Choices)}


def choose_plan(load: Workload, work: Work, base: Base, budget_bytes: int, speed: Speed) -> Plan:
    """The fastest plan whose predicted peak is within the budget.

    Raises BudgetInfeasible, naming the smallest budget that would do, when there is none.
    """
    plans = list(candidates(load, work, base, speed))
    fitting = [plan for plan in plans if plan.peak_bytes <= budget_bytes]
    if not fitting:
        smallest = min(plan.smallest_budget for plan in plans)
        raise BudgetInfeasible(
            f"a budget of {format_size(budget_bytes)} is too small: this run needs at least {format_size(smallest)}; "
            f"try --budget {smallest // 2**20}MB, a smaller --image-size or a smaller model",
            smallest,
        )
    chosen = _fastest(fitting)
    return dataclasses.replace(chosen, others=tuple(_neighbours(plans, chosen)))


def _fastest(plans: Iterable[Plan]) -> Plan:
    return min(plans, key=lambda plan: (plan.seconds, plan.peak_bytes))


def _neighbours(plans: list[Plan], chosen: Plan) -> Iterator[Plan]:
    """What the next smaller budget would have to do with, and the first larger one that saves a noticeable time."""
    smaller = [plan for plan in plans if plan.smallest_budget < chosen.smallest_budget]
    if smaller:
        yield _fastest(smaller)
    faster = [plan for plan in plans if plan.seconds < (1 - NOTICEABLE) * chosen.seconds]
    if faster:
        yield min(faster, key=lambda plan: (plan.peak_bytes, plan.seconds))


def candidates(load: Workload, work: Work, base: Base, speed: Speed) -> Iterator[Plan]:
    """Every way to run this, with its predicted peak and time."""
    num_photos = work.num_train + work.num_val
    for size in MICRO_BATCHES:
        evaluated = min(size, EVALUATION_BATCH)
        if load.method == "head" and size <= EVALUATION_BATCH:
            for bits in (32, 16) if all(load.ranks.values()) else (32,):
                choices = Choices(micro_batch=size, carried_grams=False, weight_bits=bits)
                head = head_items(load, size, num_photos, choices)
                yield _plan(load, work, base, speed, choices, head, head)
        elif load.method == "vanilla" and size <= work.batch:
            head = head_items(load, evaluated, num_photos)
            for reused in (True, False):
                choices = Choices(micro_batch=size, reused_heap=reused)
                yield _plan(load, work, base, speed, choices, vanilla_items(load, choices), head)
        elif load.method == "wasi" and size <= work.batch:
            for carried, bits in ((True, 32), (False, 32), (False, 16)):
                kept = Choices(micro_batch=size, carried_grams=carried, weight_bits=bits)
                head = head_items(load, evaluated, num_photos, kept)
                for again in range(load.geometry.depth + 1):
                    choices = dataclasses.replace(kept, recomputed_blocks=again)
                    yield _plan(load, work, base, speed, choices, training_items(load, choices), head)


def _plan(
    load: Workload, work: Work, base: Base, speed: Speed, choices: Choices, train: list[Item], head: list[Item]
) -> Plan:
    items = max(train, head, key=total)
    if load.method != "head" and load.ranks and any(rank is None for rank in load.ranks.values()):
        # multiplying factors out, or truncating a dense layer, holds one dense weight twice
        items = [*items, Item("one dense weight while loading", largest_linear_bytes(load))]
    items = [Item("interpreter and libraries (measured)", base.steady), *items]
    if total(items) < base.start:
        items = [Item("measuring and importing the libraries, or converting the model", base.start)]
    is_head = load.method == "head"
    return Plan(
        **dataclasses.asdict(choices),
        method=load.method,
        image_size=load.image_size,
        accumulation=1 if is_head else math.ceil(work.batch / choices.micro_batch),
        gradient_rank=load.gradient_rank,
        epochs=0 if is_head else work.epochs,
        peak_bytes=total(items),
        seconds=_seconds(load, work, speed, choices),
        items=tuple(items),
    )


def _seconds(load: Workload, work: Work, speed: Speed, choices: Choices) -> float:
    """How long the whole run takes."""
    widening = WIDENING_COST * _PROBED_TOKENS / load.tokens if choices.weight_bits == 16 else 0.0
    infer_seconds = speed.infer_seconds * _overhead(choices.micro_batch, widening)
    seconds = (work.num_train + work.num_val) * (speed.decode_seconds + infer_seconds)
    if load.method == "head":
        return seconds
    slowdown = _overhead(choices.micro_batch, widening)
    slowdown *= 1.0 if choices.reused_heap else FAULT_COST
    slowdown *= 1 + RECOMPUTE_COST * choices.recomputed_blocks / load.geometry.depth
    update = REBUILD_COST if not choices.carried_grams else 1.0
    if choices.weight_bits == 16:
        update = ROUNDING_COST
    seconds += work.epochs * (work.num_train * speed.train_seconds * slowdown + work.num_val * infer_seconds)
    seconds += work.epochs * math.ceil(work.num_train / work.batch) * speed.update_seconds * update
    return seconds + work.num_train * infer_seconds


def _overhead(micro_batch: int, per_pass: float) -> float:
    """Time of a photo in micro-batches of this size, relative to the probe's, `per_pass` photo times added to each."""
    return (1 + (MICRO_BATCH_OVERHEAD + per_pass) / micro_batch) / (1 + MICRO_BATCH_OVERHEAD / _PROBED_PHOTOS)
