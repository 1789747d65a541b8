"""The planner's arithmetic against the real engine, and its choice against what an owner expects of a budget."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from models import TINY, random_tensors
from reference import one_thread  # noqa: F401
from torch.profiler import ProfilerActivity, profile

from wasi_edge.conversion.factorise import factorise
from wasi_edge.errors import BudgetInfeasible
from wasi_edge.keep import Keep, Rebuild
from wasi_edge.layers.linear import LinearKinds, WasiLinear
from wasi_edge.method import Method
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.network import build_network
from wasi_edge.models.vanilla import VanillaViT
from wasi_edge.planner.choices import MICRO_BATCHES, RANK_ERRORS, Choices, usual_blocks
from wasi_edge.planner.memory import (
    Item,
    fresh_bytes,
    frozen_items,
    head_items,
    loading_items,
    total,
    training_items,
    update_scratch_bytes,
    update_state_bytes,
    weight_counts,
)
from wasi_edge.planner.plan import NAMED_MARGIN_BYTES, Base, Plan, Speed, Work, choose_plan, plan_tiers
from wasi_edge.planner.workload import Workload
from wasi_edge.training.factor_update import ORTHONORMALISE_EVERY, FactorUpdate
from wasi_edge.training.trainer import Recipe, SubspaceTrainer

MB = 2**20
SMALL = ViTGeometry(4, width=96, depth=3, heads=3, mlp_width=384, position_grid=7, layer_scale=True)
VIT_S = ViTGeometry(14, width=384, depth=12, heads=6, mlp_width=1536, position_grid=37, layer_scale=True)
VIT_B = ViTGeometry(16, width=768, depth=12, heads=12, mlp_width=3072, position_grid=14, features="class")
RECIPE = Recipe(1e-3, 1e-3, 1e-3, 0.01, 2.0, 0.1)
SPEED = Speed(train_seconds=0.15, infer_seconds=0.05, update_seconds=0.2, decode_seconds=0.01)
WORK = Work(num_train=400, num_val=100, epochs=8, batch=16, gradient_rank=32, blocks=12, blocks_named=True)
BASE = Base(start=230 * MB, steady=230 * MB)


def workload(geometry: ViTGeometry, rank: int | None, image_size: int, method: Method = Method.WASI) -> Workload:
    ranks = dict.fromkeys(geometry.linear_shapes(), rank)
    return Workload(geometry, image_size, ranks, 3, method, augment_photo_bytes=0)


def small_choices(
    micro_batch: int, again: tuple[int, int, int], bits: int, compact: bool = True, trained: int = SMALL.depth
) -> Choices:
    attention, branches, whole = again
    return Choices(
        micro_batch=micro_batch,
        trained_blocks=trained,
        gradient_rank=8,
        compact=compact,
        rebuilt_attention=attention,
        rebuilt_branches=branches,
        recomputed_blocks=whole,
        weight_bits=bits,
        carried_grams=bits == 32,
    )


def small_trainer(choices: Choices, method: Method = Method.WASI) -> SubspaceTrainer:
    rank = 30 if method.has_factors else None
    ranks, tensors = random_tensors(SMALL, rank, 3, dtype=torch.float32)
    if choices.weight_bits == 16:
        tensors = {k: v.half() if k.endswith((".left", ".right")) else v for k, v in tensors.items()}
    model = build_network(SMALL, ranks, tensors.__getitem__, 28, head=True, kinds=LinearKinds.of(method))
    return SubspaceTrainer(
        model, RECIPE, choices.keeps(), choices.gradient_rank, seed=0, carry_grams=choices.carried_grams
    )


def train(trainer: SubspaceTrainer, micro_batch: int, steps: int, image_size: int = 28) -> None:
    """Steps of two micro-batches."""
    photos, labels = torch.randn(micro_batch, 3, image_size, image_size), torch.zeros(micro_batch, dtype=torch.long)
    with torch.no_grad():
        for step in range(1, steps + 1):
            for first in (True, False):
                trainer.micro_batch(photos, labels, torch.ones(micro_batch), first, 2 * micro_batch)
            trainer.apply(step, 1.0)


def bytes_of(items: list[Item], *starts: str) -> int:
    return sum(item.bytes for item in items if item.item.startswith(starts))


# --------------------------------------------------------------------------------------- arithmetic against reality


@pytest.mark.parametrize("rank", [6, None])
@pytest.mark.parametrize("image_size", [16, 24])
@pytest.mark.parametrize(
    "change", [{}, {"layer_scale": False}, {"features": "mean", "class_token": False}, {"features": "class"}]
)
def test_counted_weights_are_those_of_the_real_network(rank, image_size, change):
    geometry = dataclasses.replace(TINY, **change)
    ranks, tensors = random_tensors(geometry, rank, 3, dtype=torch.float32)
    model = build_network(geometry, ranks, tensors.__getitem__, image_size, head=True)
    linears, others = weight_counts(workload(geometry, rank, image_size))
    parameters = model.parameters()
    assert linears + others == sum(value.numel() for value in parameters.values())
    weights = ("weight", "left", "right")
    assert linears == sum(
        layer.params[key].numel() for layer in model.linears().values() for key in weights if key in layer.params
    )
    if rank is None:
        assert linears + others == sum(p.numel() for p in VanillaViT(geometry, image_size, 3).parameters())


@pytest.mark.parametrize("gradient_rank", [5, 30])  # above and below the width of 24
def test_update_state_is_counted_to_the_byte(gradient_rank):
    ranks, tensors = random_tensors(TINY, 6, 3, dtype=torch.float32)
    ranks["blocks.0.fc1"] = 9
    tensors["blocks.0.fc1.left"], tensors["blocks.0.fc1.right"] = torch.randn(40, 9), torch.randn(9, 24)
    linears = {}
    for name, linear in build_network(TINY, ranks, tensors.__getitem__, 16, head=True).linears().items():
        assert isinstance(linear, WasiLinear)
        linear.start_training(gradient_rank, 17, torch.Generator().manual_seed(0))
        linears[name] = linear
    rule = FactorUpdate(linears, 0.0)
    for name, linear in linears.items():
        assert linear.basis is not None
        rule.update(name, torch.randn(linear.shape[0], linear.basis.shape[1]), 1e-3, 1)
    load = Workload(TINY, 16, ranks, 3, Method.WASI, 0)
    choices = Choices(micro_batch=1, trained_blocks=TINY.depth, gradient_rank=gradient_rank)
    assert update_state_bytes(load, choices) == sum(value.nbytes for value in rule.state().values())


# of three blocks, how many rebuild their attention, GELU's input too, and everything
AGAIN = ((0, 0, 0), (2, 0, 0), (3, 0, 0), (3, 2, 0), (3, 3, 0), (3, 3, 1), (3, 3, 3))


def test_what_each_block_keeps_follows_from_the_counts():
    keeps = small_choices(1, (3, 2, 1), 32).keeps()
    assert [keep.rebuild for keep in keeps] == [Rebuild.ATTENTION, Rebuild.BRANCHES, Rebuild.BLOCK]
    assert small_choices(1, (1, 0, 0), 32).keeps()[0] == Keep(Rebuild.NOTHING)
    assert len(small_choices(1, (1, 0, 0), 32, trained=2).keeps()) == 2


def test_the_error_of_a_plan_grows_with_what_it_rounds_and_leaves_out():
    base = dataclasses.replace(small_choices(1, (0, 0, 0), 32, compact=False), gradient_rank=32)
    errors = [
        dataclasses.replace(base, **change).gradient_error()
        for change in ({}, {"compact": True}, {"compact": True, "weight_bits": 16}, {"gradient_rank": 16})
    ]
    assert errors == sorted(set(errors)) and errors[0] == RANK_ERRORS[32]
    assert dataclasses.replace(base, gradient_rank=7).gradient_error() is None


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize(
    ("micro_batch", "again", "compact"),
    [*((4, again, True) for again in AGAIN), (1, AGAIN[0], True), (9, AGAIN[5], True), (4, AGAIN[0], False)],
)
def test_planned_buffers_cover_those_of_the_engine_by_at_most_a_third(micro_batch, again, compact, bits):
    choices = small_choices(micro_batch, again, bits, compact)
    trainer = small_trainer(choices)
    train(trainer, micro_batch, 1)
    items = training_items(workload(SMALL, 30, 28), choices)
    planned = bytes_of(items, "kept for", "buffers of")
    in_no_buffer = fresh_bytes(workload(SMALL, 30, 28), micro_batch)
    assert trainer.held_bytes() <= planned <= 1.35 * trainer.held_bytes() + in_no_buffer


@pytest.mark.parametrize("again", [AGAIN[0], AGAIN[3], AGAIN[6]])
@pytest.mark.parametrize("method", [Method.WSI, Method.ASI])
def test_planned_buffers_cover_those_of_other_methods_too(method, again):
    choices = small_choices(4, again, 32)
    trainer = small_trainer(choices, method)
    train(trainer, 4, 1)
    load = workload(SMALL, 30 if method.has_factors else None, 28, method)
    planned = bytes_of(training_items(load, choices), "kept for", "buffers of")
    assert trainer.held_bytes() <= planned <= 1.35 * trainer.held_bytes() + fresh_bytes(load, 4)


def peak_of_allocations(work: Callable[[], object]) -> int:
    """The most bytes alive at once of all that torch allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(change for _, change in sorted(changes, key=lambda pair: pair[0])))


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize(
    ("micro_batch", "again", "trained"),
    [(2, AGAIN[0], 3), (8, AGAIN[0], 3), (8, AGAIN[2], 3), (8, AGAIN[3], 3), (8, AGAIN[6], 3), (8, AGAIN[0], 2)],
)
def test_planned_items_cover_every_allocation_of_a_step_by_at_most_a_quarter(micro_batch, again, trained, bits):
    """Without the headroom; the weights were there before and the photos are smaller than a block's input."""
    choices = small_choices(micro_batch, again, bits, trained=trained)
    trainer = small_trainer(choices)
    peak = peak_of_allocations(lambda: train(trainer, micro_batch, 4))  # from a cold start, two turns
    items = training_items(workload(SMALL, 30, 28), choices)
    # the update works in memory lent by buffers, which the profiler sees as theirs
    lent = update_scratch_bytes(itertools.chain(*workload(SMALL, 30, 28).linears)) // 2
    planned = bytes_of(items, "gradients", "optimiser", "kept for", "buffers of", "photos") + lent
    assert peak <= planned <= 1.25 * peak


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("shape", [(1536, 384), (384, 1536), (1152, 384)])
def test_an_update_takes_less_than_the_scratch_that_is_planned_and_lent(shape, bits):
    (out, inner), rank = shape, 180
    linear = WasiLinear(torch.randn(out, rank) / 30, torch.randn(rank, inner) / 30, None)
    if bits == 16:
        linear = WasiLinear(linear.params["left"].half(), linear.params["right"].half(), None)
    linear.start_training(16, 50, torch.Generator().manual_seed(0))
    rule = FactorUpdate({"linear": linear}, 0.01, carry_grams=bits == 32)
    gradient = torch.randn(out, 16)
    rule.update("linear", gradient, 1e-3, 1)  # makes the momentum
    planned = update_scratch_bytes([(out, inner, rank)])
    assert rule.scratch_bytes == planned
    for step in (2, ORTHONORMALISE_EVERY):  # then the pair is made orthonormal
        # the rest is for the gaps that blocks of many sizes leave in the heap
        assert peak_of_allocations(lambda step=step: rule.update("linear", gradient, 1e-3, step)) <= 0.7 * planned


def test_where_pages_cannot_be_lent_the_update_is_counted_beside_the_buffers():
    choices = small_choices(1, AGAIN[6], 16)
    lending, not_lending = (
        total(training_items(dataclasses.replace(workload(SMALL, 30, 28), lends=lends), choices))
        for lends in (True, False)
    )
    assert not_lending > lending


def test_what_exists_before_the_head_is_fitted_is_counted_there():
    choices = small_choices(1, AGAIN[0], 16)
    trainer = small_trainer(choices)
    bases = sum(linear.training_state()[0].nbytes for linear in trainer.model.linears().values())
    assert bytes_of(head_items(workload(SMALL, 30, 28), choices, 10), "bases") == bases


def test_dense_layers_of_frozen_blocks_are_counted_as_they_are_held():
    stored: dict[str, int | None] = {**dict.fromkeys(SMALL.linear_shapes(), 32), "blocks.0.fc1": None}
    load = dataclasses.replace(workload(SMALL, 32, 28), stored_ranks=stored)
    choices = dataclasses.replace(small_choices(1, AGAIN[0], 16, trained=2), cached_views=2)
    ranks, tensors = random_tensors(SMALL, 32, 3, dtype=torch.float32)
    ranks = stored
    tensors["blocks.0.fc1.weight"] = torch.randn(384, 96)
    tensors = {key: value.half() if key.endswith((".left", ".right")) else value for key, value in tensors.items()}
    frozen = build_network(SMALL, ranks, tensors.__getitem__, 28, head=False, blocks=range(1))
    # with the padding of their ranks
    held = sum(v.untyped_storage().nbytes() for n, v in frozen.parameters().items() if not n.startswith("norm."))
    assert bytes_of(frozen_items(load, choices), "weights") == held
    # nothing of it is truncated: it does not learn
    assert loading_items(load, choices) == []


def test_truncating_a_dense_layer_is_counted():
    stored: dict[str, int | None] = {**dict.fromkeys(VIT_B.linear_shapes(), 300), "blocks.3.fc1": None}
    load = dataclasses.replace(workload(VIT_B, 300, 224), stored_ranks=stored)
    choices = Choices(micro_batch=1, trained_blocks=12, gradient_rank=32)
    weight = torch.randn(*VIT_B.linear_shapes()["blocks.3.fc1"])
    peak = weight.nbytes + peak_of_allocations(lambda: factorise(weight, 300))
    assert peak <= bytes_of(loading_items(load, choices), "one dense weight") <= 1.5 * peak


def test_planner_imports_no_torch():
    code = (
        "import sys, wasi_edge.planner.plan, wasi_edge.planner.memory;"
        "print([name for name in ('torch', 'PIL', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------- the choice

LOADS = {
    "vit-s": workload(VIT_S, 130, 168),
    "vit-b": workload(VIT_B, 300, 224),
    "vit-b in part dense": dataclasses.replace(
        workload(VIT_B, 300, 224), ranks={**dict.fromkeys(VIT_B.linear_shapes(), 300), "blocks.3.fc1": None}
    ),
    "vit-s vanilla": workload(VIT_S, None, 168, Method.VANILLA),
    "vit-s lora": dataclasses.replace(workload(VIT_S, None, 168, Method.LORA), lora_rank=16),
    "vit-s wsi": workload(VIT_S, 130, 168, Method.WSI),
    "vit-s asi": workload(VIT_S, None, 168, Method.ASI),
    "vit-s head": workload(VIT_S, 130, 168, Method.HEAD),
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
    half = dataclasses.replace(FEWER, blocks=usual_blocks(Method.WASI, 12), cached_views=3)
    usual = choose_plan(LOADS["vit-s"], half, BASE, 4096 * MB, SPEED)
    asked = choose_plan(LOADS["vit-s"], dataclasses.replace(half, blocks_named=True), BASE, 4096 * MB, SPEED)
    assert [(plan.trained_blocks, plan.cached_views) for plan in (usual, asked)] == [(6, 0), (6, 3)]
    assert [usual_blocks(Method.WASI, depth) for depth in (1, 2, 3, 12)] == [1, 1, 2, 6]


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


def test_without_disk_nothing_is_cached_and_the_frozen_blocks_are_run_every_epoch():
    load = LOADS["vit-s"]
    some = dataclasses.replace(FEWER, blocks=6, blocks_named=True)
    cached = choose_plan(load, some, BASE, 4096 * MB, SPEED)
    plain = choose_plan(load, dataclasses.replace(some, cached_views=0), BASE, 4096 * MB, SPEED)
    assert (cached.cached_views, plain.cached_views) == (3, 0)
    assert cached.seconds < plain.seconds and cached.peak_bytes < plain.peak_bytes
