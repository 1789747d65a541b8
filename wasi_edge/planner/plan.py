"""From a budget to a plan: the fastest way to train that fits, or the smallest budget that would do.

A run has three phases whose peaks do not add up: decoding (before torch is imported), the closed-form head, and the
gradient steps. Decoding adapts itself to what is left of the budget; the other two are predicted here by arithmetic
(`memory.py`) on top of a measured base, and must fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from wasi_edge.chunks import EVALUATION_BATCH
from wasi_edge.errors import BudgetInfeasible
from wasi_edge.method import Method, Optimizer
from wasi_edge.planner.choices import MICRO_BATCHES, Choices, Ways, explicit_tiers
from wasi_edge.planner.memory import (
    Item,
    frozen_items,
    head_items,
    largest_linear_bytes,
    lora_items,
    total,
    training_items,
    vanilla_items,
)
from wasi_edge.planner.workload import Workload
from wasi_edge.units import format_size

# Ratios fitted to `benchmarks/plan_costs.py` (ViT-S/14, 168 px, two cores): what each level of rebuilding adds to the
# time of a photo if all blocks do it.
ATTENTION_COST, BRANCHES_COST, BLOCK_COST = 0.12, 0.07, 0.065
# What rounding for the backward pass takes.
COMPACT_COST = 0.016
# Per-call overhead of a micro-batch, in units of the time of one photo: 1.35, 1.16, 1.04, 1.03 measured for 1, 2, 4 and
# 16 photos against 8, where this gives 1.35, 1.15, 1.05, 0.98.
MICRO_BATCH_OVERHEAD = 0.42
# An update that rebuilds the Gram matrices of the factors instead of carrying them.
REBUILD_COST = 1.23
# One that also rounds factors to 16 bits, and widening them for a pass, in photo times at the probe's size: 0.06 to
# 0.19 measured.
ROUNDING_COST = 1.46
WIDENING_COST = 0.12
# Autograd's tape in memory that is mapped anew each time: 150 ms a photo without, 265 with.
FAULT_COST = 1.75
# Free memory that is not handed back after each update does not fault in the next step.
UNTRIMMED_COST = 0.95
_PROBED_PHOTOS, _PROBED_TOKENS = 4, 145
# More than the smallest plan that a refusal asks for: the next run will not measure the same base to the page.
NAMED_MARGIN_BYTES = 4 * 2**20
# what a plan begins with: the base, or all there is where nothing later is as large
STEADY_ITEM = "interpreter and libraries (measured)"
START_ITEM = "measuring and importing the libraries, or converting the model"
# share of the time, or of the memory, below which another budget is not worth mentioning
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


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much there is to do.

    blocks          blocks to train, counted from the end
    blocks_named    somebody asked for just so many; else fewer will do where memory has no room for more
    cached_views    augmented views of each photo that there is disk for (`Choices`)
    optimizer       by which weights move, where the method leaves a choice
    """

    num_train: int
    num_val: int
    epochs: int
    batch: int
    gradient_rank: int
    blocks: int
    blocks_named: bool
    cached_views: int = 0
    optimizer: Optimizer = Optimizer.POLAR

    @property
    def steps(self) -> int:
        """Optimiser steps of all epochs."""
        return self.epochs * math.ceil(self.num_train / self.batch)


@dataclass(frozen=True, kw_only=True)
class Plan(Choices):
    """A run that fits.

    `peak_bytes` is the predicted peak of the whole process; `items` say where it goes, the base first. `others` are
    the plans that the next smaller and the next larger budget with another outcome would give.
    """

    method: str
    image_size: int
    accumulation: int
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
        choices, error = self.choices(), self.gradient_error()
        return {
            "method": self.method,
            "image_size": self.image_size,
            "accumulation": self.accumulation,
            **choices,
            "gradient_error": None if error is None else round(error, 4),
            "epochs": self.epochs,
            "memory": [{"item": item.item, "bytes": item.bytes} for item in self.items],
            "other_budgets": [
                {
                    "budget_bytes": other.smallest_budget,
                    "seconds": round(other.seconds, 1),
                    **{key: value for key, value in other.choices().items() if value != choices[key]},
                }
                for other in self.others
            ],
        }


# the plans of a tier with so many photos at once
Tier = Callable[[Sequence[int]], list[Plan]]


def choose_plan(load: Workload, work: Work, base: Base, budget_bytes: int, speed: Speed) -> Plan:
    """The fastest plan of the first tier that has one within the budget.

    Raises BudgetInfeasible, naming the smallest budget that would do, when there is none.
    """
    leanest: Plan | None = None
    tiers = plan_tiers(load, work, base, speed)
    for tier in tiers:
        # one photo at a time is the least that any plan of the tier takes
        lean = tier(MICRO_BATCHES[-1:])
        if any(plan.peak_bytes <= budget_bytes for plan in lean):
            plans = tier(MICRO_BATCHES)
            chosen = _fastest(plan for plan in plans if plan.peak_bytes <= budget_bytes)
            next_tier = next(tiers, None)
            others = _neighbours(plans, next_tier(MICRO_BATCHES) if next_tier else [], leanest, chosen)
            return dataclasses.replace(chosen, others=tuple(others))
        leanest = min([*lean, *([leanest] if leanest else [])], key=lambda plan: plan.peak_bytes)
    assert leanest is not None
    smallest = math.ceil((leanest.peak_bytes + NAMED_MARGIN_BYTES) / 2**20) * 2**20
    raise BudgetInfeasible(
        f"a budget of {format_size(budget_bytes)} is too small: this run needs at least {format_size(smallest)}; "
        f"try --budget {smallest // 2**20}MB, a smaller --image-size or a smaller model",
        smallest,
    )


def _fastest(plans: Iterable[Plan]) -> Plan:
    return min(plans, key=lambda plan: (plan.seconds, plan.peak_bytes))


def _neighbours(plans: list[Plan], next_tier: list[Plan], leanest: Plan | None, chosen: Plan) -> Iterator[Plan]:
    """What a noticeably smaller budget would have to do with, and the first larger one that saves a noticeable time or
    gives a better tier, of which `leanest` is the smallest plan."""
    below = (1 - NOTICEABLE) * chosen.smallest_budget
    smaller = [plan for plan in plans if plan.smallest_budget <= below]
    smaller = smaller or [plan for plan in next_tier if plan.smallest_budget <= below]
    if smaller:
        yield _fastest(smaller)
    larger = [plan for plan in plans if plan.seconds < (1 - NOTICEABLE) * chosen.seconds]
    if leanest is not None:
        larger.append(leanest)
    if larger:
        yield min(larger, key=lambda plan: (plan.peak_bytes, plan.seconds))


def plan_tiers(load: Workload, work: Work, base: Base, speed: Speed) -> Iterator[Tier]:
    """Every way to run this, with its predicted peak and time, worked out for the micro-batches that are asked for."""
    if not load.method.is_explicit:
        yield partial(_plans_of_one_tier, load, work, base, speed)
        return
    views = min(work.cached_views, work.epochs)
    for ways in explicit_tiers(
        work.batch,
        work.gradient_rank,
        load.geometry.depth,
        work.blocks,
        work.blocks_named,
        views,
        load.has_factors,
    ):
        yield partial(_explicit_plans, load, work, base, speed, ways)


def _explicit_plans(
    load: Workload, work: Work, base: Base, speed: Speed, ways: Ways, sizes: Sequence[int]
) -> list[Plan]:
    plans = []
    heads: dict[tuple[int, int, bool, int], list[Item]] = {}
    for choices in ways(sizes):
        key = choices.micro_batch, choices.weight_bits, choices.carried_grams, choices.cached_views
        if key not in heads:
            heads[key] = head_items(load, choices, work.num_train + work.num_val)
        phases = [training_items(load, choices), heads[key]]
        if choices.cached_views:
            phases.append(frozen_items(load, choices))
        plans.append(_plan(load, work, base, speed, choices, phases))
    return plans


def _plans_of_one_tier(load: Workload, work: Work, base: Base, speed: Speed, sizes: Sequence[int]) -> list[Plan]:
    """Of `vanilla`, `lora` and `head`."""
    depth, num_photos = load.geometry.depth, work.num_train + work.num_val
    plans = []
    for size in sizes:
        if load.method is Method.HEAD and size <= EVALUATION_BATCH:
            for bits in (32, 16) if load.has_factors else (32,):
                choices = Choices(
                    micro_batch=size, trained_blocks=0, gradient_rank=0, carried_grams=False, weight_bits=bits
                )
                plans.append(_plan(load, work, base, speed, choices, [head_items(load, choices, num_photos)]))
        elif load.method is not Method.HEAD and size <= work.batch:
            for reused in (True, False):
                choices = Choices(micro_batch=size, trained_blocks=depth, gradient_rank=0, reused_heap=reused)
                training = (lora_items if load.method is Method.LORA else vanilla_items)(load, choices)
                phases = [training, head_items(load, choices, num_photos)]
                plans.append(_plan(load, work, base, speed, choices, phases))
    return plans


def _plan(load: Workload, work: Work, base: Base, speed: Speed, choices: Choices, phases: list[list[Item]]) -> Plan:
    items = max(phases, key=total)
    if load.method.has_dense_weights:
        # multiplying factors out holds one dense weight twice
        items = [*items, Item("one dense weight while loading", largest_linear_bytes(load))]
    items = [Item(STEADY_ITEM, base.steady), *items]
    if total(items) < base.start:
        items = [Item(START_ITEM, base.start)]
    is_head = load.method is Method.HEAD
    return Plan(
        **choices.choices(),
        method=load.method,
        image_size=load.image_size,
        accumulation=1 if is_head else math.ceil(work.batch / choices.micro_batch),
        epochs=0 if is_head else work.epochs,
        peak_bytes=total(items),
        seconds=_seconds(load, work, speed, choices),
        items=tuple(items),
    )


def _seconds(load: Workload, work: Work, speed: Speed, choices: Choices) -> float:
    """How long the whole run takes."""
    depth = load.geometry.depth
    widening = WIDENING_COST * _PROBED_TOKENS / load.tokens if choices.weight_bits == 16 else 0.0
    # of a photo, relative to the probe's
    evaluated = min(choices.micro_batch, EVALUATION_BATCH)
    passing = speed.infer_seconds * _overhead(evaluated, widening)
    trained = choices.trained_blocks / depth if load.method is not Method.HEAD else 0.0
    # the frozen blocks run once for the centre view of each photo, and for its augmented views once or every epoch
    photos = work.num_train + work.num_val
    seconds = photos * (speed.decode_seconds + passing)
    if load.method is Method.HEAD:
        return seconds
    frozen_passes = choices.cached_views or work.epochs
    seconds += work.num_train * frozen_passes * passing * (1 - trained)
    again = trained if choices.cached_views else 1.0
    seconds += (work.epochs * work.num_val + work.num_train) * passing * again
    slowdown = _overhead(choices.micro_batch, widening) * (1.0 if choices.reused_heap else FAULT_COST)
    slowdown *= 1.0 if choices.trimmed else UNTRIMMED_COST
    slowdown *= 1 + _rebuilding(choices) - (0 if choices.compact else COMPACT_COST)
    seconds += work.epochs * work.num_train * speed.train_seconds * trained * slowdown
    update = REBUILD_COST if not choices.carried_grams else 1.0
    if choices.weight_bits == 16:
        update = ROUNDING_COST
    return seconds + work.steps * speed.update_seconds * trained * update


def _rebuilding(choices: Choices) -> float:
    """What rebuilding in the backward pass adds to the time of a photo."""
    cost = ATTENTION_COST * choices.rebuilt_attention
    cost += BRANCHES_COST * choices.rebuilt_branches + BLOCK_COST * choices.recomputed_blocks
    return cost / max(1, choices.trained_blocks)


def _overhead(micro_batch: int, per_pass: float) -> float:
    """Time of a photo in micro-batches of this size, relative to the probe's, `per_pass` photo times added to each."""
    return (1 + (MICRO_BATCH_OVERHEAD + per_pass) / micro_batch) / (1 + MICRO_BATCH_OVERHEAD / _PROBED_PHOTOS)
