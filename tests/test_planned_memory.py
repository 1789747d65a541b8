"""The planner's arithmetic against the real engine: weights, state, buffers and what exists for a moment."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable, Mapping

import pytest
import torch
from models import MIXED, TINY, random_tensors
from reference import one_thread  # noqa: F401
from torch.profiler import ProfilerActivity, profile

from wasi_edge.keep import Keep, Rebuild
from wasi_edge.layers.linear import AsiLinear, LinearKinds, SubspaceLinear, WasiLinear
from wasi_edge.method import Method, Optimizer
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.network import build_network
from wasi_edge.models.vanilla import VanillaViT
from wasi_edge.planner.choices import RANK_ERRORS, Choices
from wasi_edge.planner.memory import (
    Item,
    fresh_bytes,
    frozen_items,
    head_items,
    total,
    training_items,
    update_scratch_bytes,
    update_state_bytes,
    weight_counts,
)
from wasi_edge.planner.workload import Workload
from wasi_edge.training.factor_update import ORTHONORMALISE_EVERY, FactorUpdate
from wasi_edge.training.trainer import Recipe, SubspaceTrainer

MB = 2**20
SMALL = ViTGeometry(4, width=96, depth=3, heads=3, mlp_width=384, position_grid=7, layer_scale=True)
VIT_B = ViTGeometry(16, width=768, depth=12, heads=12, mlp_width=3072, position_grid=14, features="class")
RECIPE = Recipe(1e-3, 1e-3, 1e-3, 0.01, 2.0, 0.1)
# of SMALL, some stored dense
IN_PART: dict[str, int | None] = {
    **dict.fromkeys(SMALL.linear_shapes(), 30),
    **dict.fromkeys(("blocks.0.fc1", "blocks.1.proj", "blocks.1.fc2", "blocks.2.qkv")),
}


Ranks = int | Mapping[str, int | None] | None


def workload(geometry: ViTGeometry, rank: Ranks, image_size: int, method: Method = Method.WASI) -> Workload:
    ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(geometry.linear_shapes(), rank)
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


def small_trainer(choices: Choices, method: Method = Method.WASI, rank: Ranks = 30) -> SubspaceTrainer:
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


@pytest.mark.parametrize("rank", [6, None, MIXED])
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


@pytest.mark.parametrize("optimizer", Optimizer)
@pytest.mark.parametrize("gradient_rank", [5, 30])  # above and below the width of 24
def test_update_state_is_counted_to_the_byte(gradient_rank, optimizer):
    ranks, tensors = random_tensors(TINY, 6, 3, dtype=torch.float32)
    ranks["blocks.0.fc1"] = 9
    tensors["blocks.0.fc1.left"], tensors["blocks.0.fc1.right"] = torch.randn(40, 9), torch.randn(9, 24)
    ranks["blocks.1.fc1"], tensors["blocks.1.fc1.weight"] = None, torch.randn(40, 24)
    linears: dict[str, SubspaceLinear] = {}
    kinds = LinearKinds.of(Method.WASI)
    for name, linear in build_network(TINY, ranks, tensors.__getitem__, 16, head=True, kinds=kinds).linears().items():
        assert isinstance(linear, SubspaceLinear)
        linear.start_training(gradient_rank, 17, torch.Generator().manual_seed(0))
        linears[name] = linear
    rule = FactorUpdate(linears, 0.0, optimizer=optimizer)
    for name, linear in linears.items():
        assert linear.basis is not None
        rule.update(name, torch.randn(linear.shape[0], linear.basis.shape[1]), 1e-3, 1)
    load = Workload(TINY, 16, ranks, 3, Method.WASI, 0, optimizer=optimizer)
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
@pytest.mark.parametrize(
    ("method", "rank", "bits"),
    [
        (Method.WSI, 30, 32),
        (Method.ASI, None, 32),
        (Method.WASI, None, 32),
        (Method.WSI, None, 32),
        (Method.WASI, IN_PART, 32),
        (Method.WASI, IN_PART, 16),
        (Method.WSI, IN_PART, 16),
    ],
)
def test_planned_buffers_cover_those_of_other_methods_and_of_dense_weights(method, rank, bits, again):
    choices = small_choices(4, again, bits)
    trainer = small_trainer(choices, method, rank)
    train(trainer, 4, 1)
    load = workload(SMALL, rank, 28, method)
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
    ("micro_batch", "again", "trained", "rank"),
    [
        (2, AGAIN[0], 3, 30),
        (8, AGAIN[0], 3, 30),
        (8, AGAIN[2], 3, 30),
        (8, AGAIN[3], 3, 30),
        (8, AGAIN[6], 3, 30),
        (8, AGAIN[0], 2, 30),
        (8, AGAIN[0], 3, IN_PART),
        (8, AGAIN[6], 2, IN_PART),
        (8, AGAIN[6], 3, None),
    ],
)
def test_planned_items_cover_every_allocation_of_a_step_by_at_most_a_quarter(micro_batch, again, trained, rank, bits):
    """Without the headroom; the weights were there before and the photos are smaller than a block's input."""
    choices = small_choices(micro_batch, again, bits, trained=trained)
    trainer, load = small_trainer(choices, rank=rank), workload(SMALL, rank, 28)
    peak = peak_of_allocations(lambda: train(trainer, micro_batch, 4))  # from a cold start, two turns
    items = training_items(load, choices)
    # the update works in memory lent by buffers, which the profiler sees as theirs
    lent = update_scratch_bytes(itertools.chain(*load.linears), choices.gradient_rank) // 2
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
    planned = update_scratch_bytes([(out, inner, rank)], 16)
    assert rule.scratch_bytes == planned
    for step in (2, ORTHONORMALISE_EVERY):  # then the pair is made orthonormal
        # the rest is for the gaps that blocks of many sizes leave in the heap
        assert peak_of_allocations(lambda step=step: rule.update("linear", gradient, 1e-3, step)) <= 0.7 * planned


@pytest.mark.parametrize("gradient_rank", [8, 32, 64])
@pytest.mark.parametrize("shape", [(1536, 384), (384, 1536), (192, 192)])
def test_so_does_the_update_of_a_dense_weight(shape, gradient_rank):
    linear = AsiLinear(torch.randn(*shape) / 30, None)
    linear.start_training(gradient_rank, 50, torch.Generator().manual_seed(0))
    rule, gradient = FactorUpdate({"linear": linear}, 0.01), torch.randn(shape[0], gradient_rank)
    rule.update("linear", gradient, 1e-3, 1)
    planned = update_scratch_bytes([(*shape, 0)], gradient_rank)
    assert rule.scratch_bytes == planned
    assert peak_of_allocations(lambda: rule.update("linear", gradient, 1e-3, 2)) <= 0.7 * planned


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
    choices = dataclasses.replace(small_choices(1, AGAIN[0], 16, trained=2), cached_views=2)
    ranks, tensors = random_tensors(SMALL, IN_PART, 3, dtype=torch.float32)
    tensors = {key: value.half() if key.endswith((".left", ".right")) else value for key, value in tensors.items()}
    frozen = build_network(SMALL, ranks, tensors.__getitem__, 28, head=False, blocks=range(1))
    # with the padding of their ranks
    held = sum(v.untyped_storage().nbytes() for n, v in frozen.parameters().items() if not n.startswith("norm."))
    assert bytes_of(frozen_items(workload(SMALL, IN_PART, 28), choices), "weights") == held


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("rank", [30, IN_PART, None], ids=["factors", "in part", "dense"])
def test_weights_that_learn_are_counted_as_they_are_held(rank, bits):
    choices = small_choices(1, AGAIN[0], bits)
    items = training_items(workload(SMALL, rank, 28), choices)
    parameters = small_trainer(choices, rank=rank).model.parameters()
    held = {name: value.untyped_storage().nbytes() for name, value in parameters.items()}
    weights = (".left", ".right", "qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
    assert items[0].bytes == sum(size for name, size in held.items() if name.endswith(weights))
    assert ("factors" in items[0].item, "dense" in items[0].item) == (rank is not None, rank != 30)
    assert bytes_of(items, "weights") == sum(held.values())


def test_planner_imports_no_torch():
    code = (
        "import sys, wasi_edge.planner.plan, wasi_edge.planner.memory;"
        "print([name for name in ('torch', 'PIL', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
