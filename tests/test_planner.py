"""The planner's arithmetic against the real engine, and its choice against what an owner expects of a budget."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import subprocess
import sys

import pytest
import torch
from models import TINY, random_tensors
from reference import one_thread  # noqa: F401
from torch.profiler import ProfilerActivity, profile

from wasi_edge.errors import BudgetInfeasible
from wasi_edge.layers.linear import WasiLinear
from wasi_edge.layers.saving import Keep
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.vanilla import VanillaViT
from wasi_edge.models.vit import build_vit
from wasi_edge.planner.memory import Choices, Item, Workload, total, training_items, update_state_bytes, weight_counts
from wasi_edge.planner.plan import MICRO_BATCHES, Base, Plan, Speed, Work, candidates, choose_plan
from wasi_edge.training.factor_update import FactorUpdate
from wasi_edge.training.trainer import Recipe, WasiTrainer

MB = 2**20
SMALL = ViTGeometry(4, width=96, depth=3, heads=3, mlp_width=384, position_grid=7, layer_scale=True)
VIT_S = ViTGeometry(14, width=384, depth=12, heads=6, mlp_width=1536, position_grid=37, layer_scale=True)
VIT_B = ViTGeometry(16, width=768, depth=12, heads=12, mlp_width=3072, position_grid=14, features="class")
RECIPE = Recipe(1e-3, 1e-3, 1e-3, 0.01, 2.0, 0.1)
SPEED = Speed(train_seconds=0.15, infer_seconds=0.05, update_seconds=0.2, decode_seconds=0.01)
WORK = Work(num_train=400, num_val=100, epochs=8, batch=16)
BASE = Base(start=230 * MB, steady=230 * MB)


def workload(
    geometry: ViTGeometry, rank: int | None, image_size: int, method: str = "wasi", gradient_rank: int = 32
) -> Workload:
    ranks = dict.fromkeys(geometry.linear_shapes(), rank)
    return Workload(geometry, image_size, ranks, 3, method, gradient_rank, augment_photo_bytes=0)


def small_trainer(choices: Choices, rank: int = 30, gradient_rank: int = 8) -> WasiTrainer:
    ranks, tensors = random_tensors(SMALL, rank, 3, dtype=torch.float32)
    if choices.weight_bits == 16:
        tensors = {k: v.half() if k.endswith((".left", ".right")) else v for k, v in tensors.items()}
    model = build_vit(SMALL, ranks, tensors.__getitem__, 28, head=True)
    recomputed = choices.recomputed_blocks
    keeps = [Keep.COMPACT] * (SMALL.depth - recomputed) + [Keep.RECOMPUTE] * recomputed
    return WasiTrainer(model, RECIPE, keeps, gradient_rank, seed=0, carry_grams=choices.carried_grams)


def train(trainer: WasiTrainer, micro_batch: int, steps: int) -> None:
    """Steps of two micro-batches."""
    photos, labels = torch.randn(micro_batch, 3, 28, 28), torch.zeros(micro_batch, dtype=torch.long)
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
    model = build_vit(geometry, ranks, tensors.__getitem__, image_size, head=True)
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
    for name, linear in build_vit(TINY, ranks, tensors.__getitem__, 16, head=True).linears().items():
        assert isinstance(linear, WasiLinear)
        linear.start_training(gradient_rank, 17, torch.Generator().manual_seed(0))
        linears[name] = linear
    rule = FactorUpdate(linears, 0.0)
    for name, linear in linears.items():
        assert linear.basis is not None
        rule.update(name, torch.randn(linear.shape[0], linear.basis.shape[1]), 1e-3, 1)
    load = Workload(TINY, 16, ranks, 3, "wasi", gradient_rank, 0)
    assert update_state_bytes(load) == sum(value.nbytes for value in rule.state().values())


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize(("micro_batch", "recomputed"), [(1, 0), (4, 0), (4, 1), (4, 3), (9, 2)])
def test_planned_buffers_cover_those_of_the_engine_by_at_most_a_third(micro_batch, recomputed, bits):
    choices = Choices(micro_batch=micro_batch, recomputed_blocks=recomputed, weight_bits=bits, carried_grams=bits == 32)
    trainer = small_trainer(choices)
    train(trainer, micro_batch, 1)
    items = training_items(workload(SMALL, 30, 28, gradient_rank=8), choices)
    planned = bytes_of(items, "kept for", "buffers of")
    assert trainer.held_bytes() <= planned <= 1.35 * trainer.held_bytes()


def peak_of_allocations(trainer: WasiTrainer, micro_batch: int) -> int:
    """The most bytes alive at once of all that torch allocates in two steps from a cold start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(trainer, micro_batch, 2)
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(change for _, change in sorted(changes, key=lambda pair: pair[0])))


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize(("micro_batch", "recomputed"), [(2, 0), (8, 0), (8, 2), (8, 3)])
def test_planned_items_cover_every_allocation_of_a_step_by_at_most_a_quarter(micro_batch, recomputed, bits):
    """Without the headroom; the weights were there before and the photos are smaller than a block's input."""
    choices = Choices(micro_batch=micro_batch, recomputed_blocks=recomputed, weight_bits=bits, carried_grams=bits == 32)
    trainer = small_trainer(choices)
    peak = peak_of_allocations(trainer, micro_batch)
    items = training_items(workload(SMALL, 30, 28, gradient_rank=8), choices)
    planned = bytes_of(items, "gradients", "optimiser", "kept for", "buffers of", "photos")
    assert peak <= planned <= 1.25 * peak


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
    "vit-s vanilla": workload(VIT_S, None, 168, "vanilla"),
    "vit-s head": workload(VIT_S, 130, 168, "head"),
}
ANY_LOAD = pytest.mark.parametrize("name", LOADS)


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
    most = max(plan.peak_bytes for plan in candidates(load, WORK, BASE, SPEED))
    budgets = range(smallest, most + MB, max(1, (most - smallest) // 50))
    return [(budget, choose_plan(load, WORK, BASE, budget, SPEED)) for budget in (*budgets, most)]


@ANY_LOAD
def test_no_plan_exceeds_its_budget_and_a_larger_budget_is_never_slower(name):
    plans = plans_by_budget(name)
    assert all(plan.peak_bytes <= budget for budget, plan in plans)
    seconds = [plan.seconds for _, plan in plans]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("name", [name for name in LOADS if LOADS[name].method != "head"])
def test_a_smaller_budget_recomputes_more_takes_fewer_photos_or_rebuilds_grams(name):
    plans = [plan for _, plan in plans_by_budget(name)]
    changes = 0
    for tight, wide in itertools.pairwise(plans):
        if tight != wide:
            changes += 1
            assert (
                tight.micro_batch < wide.micro_batch
                or tight.recomputed_blocks > wide.recomputed_blocks
                or tight.carried_grams < wide.carried_grams
                or tight.weight_bits < wide.weight_bits
                or tight.reused_heap < wide.reused_heap
            )
            assert tight.peak_bytes < wide.peak_bytes
    assert changes > 0
    assert plans[0].micro_batch == 1
    if LOADS[name].method == "wasi":
        assert plans[0].recomputed_blocks > 0 and plans[-1].recomputed_blocks == 0


@pytest.mark.parametrize("batch", [1, 5, 16, 64])
@ANY_LOAD
def test_the_budget_named_by_a_refusal_works_and_one_megabyte_less_does_not(name, batch):
    work = dataclasses.replace(WORK, batch=batch)
    smallest = smallest_feasible(LOADS[name], work)
    assert smallest % MB == 0
    assert choose_plan(LOADS[name], work, BASE, smallest, SPEED).peak_bytes <= smallest
    with pytest.raises(BudgetInfeasible, match=f"--budget {smallest // MB}MB") as caught:
        choose_plan(LOADS[name], work, BASE, smallest - MB, SPEED)
    assert caught.value.smallest_feasible_budget_bytes == smallest


@pytest.mark.parametrize("batch", [*range(1, 20), 31, 64])
def test_the_effective_batch_is_kept_whatever_the_micro_batch(batch):
    work = dataclasses.replace(WORK, batch=batch)
    for plan in candidates(LOADS["vit-s"], work, BASE, SPEED):
        assert plan.micro_batch <= batch
        assert (plan.accumulation - 1) * plan.micro_batch < batch <= plan.accumulation * plan.micro_batch


def test_the_fastest_plan_of_an_unlimited_budget_recomputes_nothing_in_the_largest_micro_batch():
    plan = choose_plan(LOADS["vit-s"], WORK, BASE, 64 * 1024 * MB, SPEED)
    assert (plan.micro_batch, plan.recomputed_blocks, plan.accumulation) == (MICRO_BATCHES[0], 0, 1)


def test_a_head_takes_no_steps_and_less_of_everything_than_training():
    head = choose_plan(LOADS["vit-s head"], WORK, BASE, 4096 * MB, SPEED)
    assert (head.method, head.epochs, head.accumulation, head.recomputed_blocks) == ("head", 0, 1, 0)
    assert head.seconds < choose_plan(LOADS["vit-s"], WORK, BASE, 4096 * MB, SPEED).seconds / 4
    # the closed-form fit is a phase of both, and may be the larger one of a run with micro-batches of one photo
    assert smallest_feasible(LOADS["vit-s head"]) <= smallest_feasible(LOADS["vit-s"])


def test_vanilla_never_recomputes_and_needs_far_more_than_factors():
    vanilla = choose_plan(LOADS["vit-s vanilla"], WORK, BASE, 4096 * MB, SPEED)
    assert vanilla.recomputed_blocks == 0 and vanilla.method == "vanilla"
    wasi = choose_plan(LOADS["vit-s"], WORK, BASE, 4096 * MB, SPEED)
    assert vanilla.micro_batch == wasi.micro_batch
    assert vanilla.peak_bytes - BASE.steady > 2 * (wasi.peak_bytes - BASE.steady)


@ANY_LOAD
def test_the_items_of_a_plan_add_up_to_its_peak_and_none_is_negative(name):
    for plan in candidates(LOADS[name], WORK, BASE, SPEED):
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
        assert all(other.seconds >= plan.seconds for other in smaller)
        assert all(other.seconds < 0.98 * plan.seconds for other in larger)
    tight, wide = plans_by_budget("vit-s")[0][1], plans_by_budget("vit-s")[-1][1]
    assert tight.others and all(other.seconds < tight.seconds for other in tight.others)
    assert all(other.seconds >= wide.seconds for other in wide.others)
    stated = wide.to_dict()["other_budgets"]
    assert isinstance(stated, list) and len(stated) == len(wide.others)
    assert all(len(entry) > 2 and entry["budget_bytes"] % MB == 0 for entry in stated)
