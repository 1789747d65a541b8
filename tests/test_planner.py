"""What the planner chooses, against what an owner expects of a budget; `test_planned_memory.py` has its arithmetic."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import pytest
from test_planned_memory import MB, VIT_B, workload

from wasi_edge.errors import BudgetInfeasible
from wasi_edge.method import Method
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.planner.choices import MICRO_BATCHES, usual_blocks
from wasi_edge.planner.memory import total
from wasi_edge.planner.plan import NAMED_MARGIN_BYTES, Base, Plan, Speed, Work, choose_plan, plan_tiers
from wasi_edge.planner.workload import Workload

VIT_S = ViTGeometry(14, width=384, depth=12, heads=6, mlp_width=1536, position_grid=37, layer_scale=True)
SPEED = Speed(train_seconds=0.15, infer_seconds=0.05, update_seconds=0.2, decode_seconds=0.01)
WORK = Work(num_train=400, num_val=100, epochs=8, batch=16, gradient_rank=32, blocks=12, blocks_named=True)
BASE = Base(start=230 * MB, steady=230 * MB)

LOADS = {
    "vit-s": workload(VIT_S, 130, 168),
    "vit-b": workload(VIT_B, 300, 224),
    "vit-b in part dense": workload(VIT_B, {**dict.fromkeys(VIT_B.linear_shapes(), 300), "blocks.3.fc1": None}, 224),
    "vit-s stored dense": workload(VIT_S, None, 168),
    "vit-s vanilla": workload(VIT_S, None, 168, Method.VANILLA),
    "vit-s lora": dataclasses.replace(workload(VIT_S, None, 168, Method.LORA), lora_rank=16),
    "vit-s wsi": workload(VIT_S, 130, 168, Method.WSI),
    "vit-s asi": workload(VIT_S, None, 168, Method.ASI),
    "vit-s head": workload(VIT_S, 130, 168, Method.HEAD),
    "vit-b head in part dense": workload(
        VIT_B, {**dict.fromkeys(VIT_B.linear_shapes(), 300), "blocks.3.fc1": None}, 224, Method.HEAD
    ),
}
ANY_LOAD = pytest.mark.parametrize("name", LOADS)


def all_plans(load: Workload, work: Work = WORK) -> list[list[Plan]]:
    """Every plan, tier by tier."""
    return [tier(MICRO_BATCHES) for tier in plan_tiers(load, work, BASE, SPEED)]


def smallest_feasible(load: Workload, work: Work = WORK) -> int:
    with pytest.raises(BudgetInfeasible) as caught:
        choose_plan(load, work, BASE, 1, SPEED)
    smallest = caught.value.smallest_feasible_budget_bytes
    assert smallest is not None
    return smallest


@functools.cache
def plans_by_budget(name: str) -> list[tuple[int, Plan]]:
    """Plans for fifty budgets from the smallest up to where nothing changes any more."""
    load = LOADS[name]
    smallest = smallest_feasible(load)
    most = max(plan.peak_bytes for plan in all_plans(load)[0])
    budgets = range(smallest, most + MB, max(1, (most - smallest) // 50))
    return [(budget, choose_plan(load, WORK, BASE, budget, SPEED)) for budget in (*budgets, most)]


@ANY_LOAD
def test_no_plan_exceeds_its_budget_and_a_larger_budget_is_never_slower(name):
    """Among plans that learn the same: a gradient of smaller rank may be faster."""
    plans = plans_by_budget(name)
    assert all(plan.peak_bytes <= budget for budget, plan in plans)
    for _, alike in itertools.groupby(plans, lambda entry: (entry[1].gradient_rank, entry[1].trained_blocks)):
        seconds = [plan.seconds for _, plan in alike]
        assert seconds == sorted(seconds, reverse=True)


def again(plan: Plan) -> int:
    return plan.rebuilt_attention + plan.rebuilt_branches + plan.recomputed_blocks


@pytest.mark.parametrize("name", [name for name in LOADS if LOADS[name].method != "head"])
def test_a_smaller_budget_recomputes_more_takes_fewer_photos_or_rebuilds_grams(name):
    plans = [plan for _, plan in plans_by_budget(name)]
    changes = 0
    for tight, wide in itertools.pairwise(plans):
        if tight != wide:
            changes += 1
            assert (
                tight.micro_batch < wide.micro_batch
                or again(tight) > again(wide)
                or tight.compact > wide.compact
                or tight.gradient_rank < wide.gradient_rank
                or tight.carried_grams < wide.carried_grams
                or tight.weight_bits < wide.weight_bits
                or tight.reused_heap < wide.reused_heap
            )
            assert tight.peak_bytes < wide.peak_bytes
    assert changes > 0
    assert plans[0].micro_batch == 1
    if LOADS[name].method.is_explicit:
        assert again(plans[0]) > 0 and again(plans[-1]) == 0


@pytest.mark.parametrize("batch", [1, 5, 16, 64])
@ANY_LOAD
def test_the_budget_named_by_a_refusal_works_and_noticeably_less_does_not(name, batch):
    work = dataclasses.replace(WORK, batch=batch)
    smallest = smallest_feasible(LOADS[name], work)
    assert smallest % MB == 0
    assert choose_plan(LOADS[name], work, BASE, smallest, SPEED).peak_bytes <= smallest
    # another base, of a few megabytes more, must not turn the answer into a lie
    heavier = Base(BASE.start + NAMED_MARGIN_BYTES - MB, BASE.steady + NAMED_MARGIN_BYTES - MB)
    assert choose_plan(LOADS[name], work, heavier, smallest, SPEED).peak_bytes <= smallest
    with pytest.raises(BudgetInfeasible, match=f"--budget {smallest // MB}MB") as caught:
        choose_plan(LOADS[name], work, BASE, smallest - NAMED_MARGIN_BYTES - MB, SPEED)
    assert caught.value.smallest_feasible_budget_bytes == smallest


@pytest.mark.parametrize("batch", [*range(1, 20), 31, 64])
def test_the_effective_batch_is_kept_whatever_the_micro_batch(batch):
    work = dataclasses.replace(WORK, batch=batch)
    for plan in itertools.chain.from_iterable(all_plans(LOADS["vit-s"], work)):
        assert plan.micro_batch <= batch
        assert (plan.accumulation - 1) * plan.micro_batch < batch <= plan.accumulation * plan.micro_batch


def test_the_fastest_plan_of_an_unlimited_budget_recomputes_nothing_in_the_largest_micro_batch():
    plan = choose_plan(LOADS["vit-s"], WORK, BASE, 64 * 1024 * MB, SPEED)
    assert (plan.micro_batch, again(plan), plan.accumulation) == (MICRO_BATCHES[0], 0, 1)
    assert (plan.trained_blocks, plan.gradient_rank, plan.weight_bits) == (12, 32, 32)


def test_a_head_takes_no_steps_and_less_of_everything_than_training():
    head = choose_plan(LOADS["vit-s head"], WORK, BASE, 4096 * MB, SPEED)
    assert (head.method, head.epochs, head.accumulation, again(head)) == ("head", 0, 1, 0)
    assert head.seconds < choose_plan(LOADS["vit-s"], WORK, BASE, 4096 * MB, SPEED).seconds / 4
    # the closed-form fit is a phase of both, and may be the larger one of a run with micro-batches of one photo
    assert smallest_feasible(LOADS["vit-s head"]) <= smallest_feasible(LOADS["vit-s"])


def test_vanilla_never_recomputes_and_needs_far_more_than_factors():
    vanilla = choose_plan(LOADS["vit-s vanilla"], WORK, BASE, 4096 * MB, SPEED)
    assert again(vanilla) == 0 and vanilla.method is Method.VANILLA
    wasi = choose_plan(LOADS["vit-s"], WORK, BASE, 4096 * MB, SPEED)
    assert vanilla.micro_batch == wasi.micro_batch
    assert vanilla.peak_bytes - BASE.steady > 2 * (wasi.peak_bytes - BASE.steady)


@ANY_LOAD
def test_the_items_of_a_plan_add_up_to_its_peak_and_none_is_negative(name):
    for plan in itertools.chain.from_iterable(all_plans(LOADS[name])):
        stated = plan.to_dict()["memory"]
        assert isinstance(stated, list)
        assert sum(entry["bytes"] for entry in stated) == plan.peak_bytes == total(list(plan.items))
        assert all(type(entry["bytes"]) is int and entry["bytes"] >= 0 for entry in stated)


def test_time_counts_every_photo_and_every_step_once():
    slow = choose_plan(LOADS["vit-s"], WORK, BASE, 4096 * MB, SPEED)
    zero = Speed(0.0, 0.0, 0.0, 0.0)
    assert choose_plan(LOADS["vit-s"], WORK, BASE, 4096 * MB, zero).seconds == 0.0
    updates = dataclasses.replace(zero, update_seconds=1.0)
    assert choose_plan(LOADS["vit-s"], WORK, BASE, 4096 * MB, updates).seconds == 8 * math.ceil(400 / 16)
    decoding = dataclasses.replace(zero, decode_seconds=1.0)
    assert choose_plan(LOADS["vit-s"], WORK, BASE, 4096 * MB, decoding).seconds == 500
    twice = choose_plan(LOADS["vit-s"], dataclasses.replace(WORK, epochs=16), BASE, 4096 * MB, SPEED)
    assert slow.seconds < twice.seconds < 2 * slow.seconds


def test_a_plan_says_what_the_next_smaller_and_larger_budgets_would_change():
    for budget, plan in plans_by_budget("vit-s"):
        for other in plan.others:
            assert other != plan
            # that budget gives that plan, and one megabyte less another
            assert choose_plan(LOADS["vit-s"], WORK, BASE, other.smallest_budget, SPEED).seconds <= other.seconds
        smaller = [other for other in plan.others if other.smallest_budget < plan.smallest_budget]
        larger = [other for other in plan.others if other.smallest_budget > budget]
        assert len(smaller) <= 1 and len(larger) <= 1 and len(smaller) + len(larger) == len(plan.others)
        assert all(other.seconds >= plan.seconds or other.gradient_rank < plan.gradient_rank for other in smaller)
        assert all(other.seconds < 0.98 * plan.seconds for other in larger)
    tight, wide = plans_by_budget("vit-s")[0][1], plans_by_budget("vit-s")[-1][1]
    assert tight.others and any(other.seconds < tight.seconds for other in tight.others)
    assert all(other.seconds >= wide.seconds for other in wide.others)
    stated = wide.to_dict()["other_budgets"]
    assert isinstance(stated, list) and len(stated) == len(wide.others)
    assert all(len(entry) > 2 and entry["budget_bytes"] % MB == 0 for entry in stated)


# ------------------------------------------------------------------------------------------------------- the tiers

FEWER = dataclasses.replace(WORK, blocks_named=False, cached_views=3)


def test_blocks_stop_learning_only_where_nothing_else_fits():
    load = LOADS["vit-s"]
    everything = smallest_feasible(load)
    least = smallest_feasible(load, FEWER)
    assert least < everything - 10 * MB
    seen = []
    for budget in range(everything + 8 * MB, least, -2 * MB):
        plan = choose_plan(load, FEWER, BASE, budget, SPEED)
        seen.append((plan.trained_blocks, plan.gradient_rank))
        assert plan.peak_bytes <= budget
    assert seen[0] == (12, 32) and seen == sorted(seen, reverse=True)
    assert (12, 16) in seen and len({blocks for blocks, _ in seen}) > 4
    plan = choose_plan(load, FEWER, BASE, least, SPEED)
    assert plan.trained_blocks < 6 and plan.cached_views == 3
    larger = [other for other in plan.others if other.smallest_budget > plan.smallest_budget]
    assert larger and larger[0].trained_blocks >= plan.trained_blocks


def test_frozen_blocks_are_cached_only_where_someone_asked_for_so_few():
    half = dataclasses.replace(FEWER, blocks=usual_blocks(Method.WASI, 12, 0.5), cached_views=3)
    usual = choose_plan(LOADS["vit-s"], half, BASE, 4096 * MB, SPEED)
    asked = choose_plan(LOADS["vit-s"], dataclasses.replace(half, blocks_named=True), BASE, 4096 * MB, SPEED)
    assert [(plan.trained_blocks, plan.cached_views) for plan in (usual, asked)] == [(6, 0), (6, 3)]
    assert [usual_blocks(Method.WASI, depth, 0.5) for depth in (1, 2, 3, 12)] == [1, 1, 2, 6]


def test_fewer_blocks_cost_less_memory_and_less_time():
    load = LOADS["vit-s"]
    plans = [
        choose_plan(load, dataclasses.replace(FEWER, blocks=blocks, blocks_named=True), BASE, 4096 * MB, SPEED)
        for blocks in (12, 8, 4, 1)
    ]
    assert [plan.trained_blocks for plan in plans] == [12, 8, 4, 1]
    assert [plan.peak_bytes for plan in plans] == sorted((plan.peak_bytes for plan in plans), reverse=True)
    assert [plan.seconds for plan in plans] == sorted((plan.seconds for plan in plans), reverse=True)
    assert plans[0].cached_views == 0 and all(plan.cached_views == 3 for plan in plans[1:])


def test_a_smaller_gradient_rank_needs_less_memory():
    small, usual = (
        choose_plan(LOADS["vit-s"], dataclasses.replace(WORK, gradient_rank=rank), BASE, 4096 * MB, SPEED)
        for rank in (5, 32)
    )
    assert (small.gradient_rank, usual.gradient_rank) == (5, 32)
    assert small.peak_bytes < usual.peak_bytes


def test_without_disk_nothing_is_cached_and_the_frozen_blocks_are_run_every_epoch():
    load = LOADS["vit-s"]
    some = dataclasses.replace(FEWER, blocks=6, blocks_named=True)
    cached = choose_plan(load, some, BASE, 4096 * MB, SPEED)
    plain = choose_plan(load, dataclasses.replace(some, cached_views=0), BASE, 4096 * MB, SPEED)
    assert (cached.cached_views, plain.cached_views) == (3, 0)
    assert cached.seconds < plain.seconds and cached.peak_bytes < plain.peak_bytes
