"""The explicit network against the same network under torch autograd, in float64."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from gradients import assert_autograd_agrees, autograd_gradients, engine_gradients
from models import TINY, random_tensors, random_vit
from reference import relative_difference

from wasi_edge.keep import ALL_KEEPS, EXACT, RECOMPUTE
from wasi_edge.layers import attention
from wasi_edge.layers.saving import Pass
from wasi_edge.models.network import build_network


@pytest.fixture(autouse=True)
def textbook_attention(monkeypatch):
    """The fused kernel's exponential is good to 1e-8 only; `test_layers.py` compares the two."""
    monkeypatch.setattr(attention, "attention_forward", functools.partial(attention.attention_forward, fused=False))


@pytest.mark.parametrize("keep", [keep for keep in ALL_KEEPS if not keep.compact])
@pytest.mark.parametrize("features", ["class", "mean", "class+mean"])
@pytest.mark.parametrize("layer_scale", [True, False])
def test_every_gradient_equals_autograd_when_the_basis_is_complete(keep, features, layer_scale):
    geometry = dataclasses.replace(TINY, features=features, layer_scale=layer_scale)
    ranks, tensors = random_tensors(geometry)
    model = build_network(geometry, ranks, lambda name: tensors[name].clone(), 16, head=True)
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    dfeatures = torch.randn(3, geometry.feature_width, dtype=torch.float64)
    assert_autograd_agrees(geometry, tensors, model, 16, pixels, dfeatures, keep)


@pytest.mark.parametrize("keep", [keep for keep in ALL_KEEPS if not keep.compact])
@pytest.mark.parametrize(
    "change",
    [
        {"registers": 3},
        {"registers": 1, "features": "class+distillation"},
        {"registers": 2, "features": "mean", "class_token": False},
        {"features": "mean", "pool_first": True},
    ],
)
def test_gradients_with_registers_and_other_ways_to_pool(keep, change):
    geometry = dataclasses.replace(TINY, **change)
    ranks, tensors = random_tensors(geometry)
    model = build_network(geometry, ranks, lambda name: tensors[name].clone(), 24, head=True)
    pixels = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    dfeatures = torch.randn(2, geometry.feature_width, dtype=torch.float64)
    assert_autograd_agrees(geometry, tensors, model, 24, pixels, dfeatures, keep)


def test_dense_linears_give_the_same_gradients():
    ranks, tensors = random_tensors(TINY, rank=None)
    model = build_network(TINY, ranks, lambda name: tensors[name].clone(), 16, head=True)
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    dfeatures = torch.randn(2, TINY.feature_width, dtype=torch.float64)
    _, actual = engine_gradients(model, pixels, dfeatures, EXACT)
    _, expected = autograd_gradients(TINY, tensors, 16, pixels, dfeatures)
    for name, gradient in expected.items():
        assert relative_difference(actual[name], gradient) < 1e-10, name


def test_class_tokenless_network_and_another_image_size():
    geometry = dataclasses.replace(TINY, class_token=False, features="mean")
    ranks, tensors = random_tensors(geometry)
    model = build_network(geometry, ranks, lambda name: tensors[name].clone(), 24, head=True)
    pixels = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    dfeatures = torch.randn(2, geometry.feature_width, dtype=torch.float64)
    features, actual = engine_gradients(model, pixels, dfeatures, EXACT)
    expected_features, expected = autograd_gradients(geometry, tensors, 24, pixels, dfeatures)
    assert relative_difference(features, expected_features) < 1e-12
    assert relative_difference(actual["patch_embed.weight"], expected["patch_embed.weight"]) < 1e-10
    assert relative_difference(actual["position"], expected["position"]) < 1e-10


@pytest.mark.parametrize("keep", [keep for keep in ALL_KEEPS if keep.compact])
def test_compact_saving_stays_close_to_the_exact_gradients(keep):
    model32 = random_vit(dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(4, 3, 16, 16, generator=generator)
    dfeatures = torch.randn(4, TINY.feature_width, generator=generator)
    _, exact = engine_gradients(random_vit(dtype=torch.float32), pixels, dfeatures, EXACT)
    _, compact = engine_gradients(model32, pixels, dfeatures, keep)
    worst = max(relative_difference(compact[name], exact[name]) for name in exact)
    assert 0 < worst < 0.01  # not exact, and rounding of 16 and 8 bits at most


def test_inference_equals_the_training_forward():
    model = random_vit()
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    training, _ = engine_gradients(model, pixels, torch.zeros(2, TINY.feature_width, dtype=torch.float64), EXACT)
    inference, saved = model.features(pixels, Pass())
    assert saved is None
    assert relative_difference(inference, training) < 1e-14


@pytest.mark.parametrize("keep", ALL_KEEPS)
def test_a_second_micro_batch_of_another_size_reuses_the_buffers(keep):
    model = random_vit(dtype=torch.float32)
    for name, linear in model.linears().items():
        linear.start_training(4, model.tokens_of(name), torch.Generator().manual_seed(0))
    run, held = Pass(refresh_basis=True), []
    for batch in (4, 4, 3, 4):
        pixels = torch.randn(batch, 3, 16, 16)
        features, saved = model.features(pixels, run, [keep] * 2)
        model.backward(saved, torch.randn_like(features), run, lambda layer, parts: None)
        held.append(run.workspace.held_bytes())
    assert len(set(held)) == 1


def test_training_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    model = random_vit()
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    engine_gradients(model, pixels, torch.ones(1, TINY.feature_width, dtype=torch.float64), RECOMPUTE, 4)
    assert torch.equal(before, torch.random.get_rng_state())
