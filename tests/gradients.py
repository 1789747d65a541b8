"""Gradients of the explicit network and of the same network under autograd, by artefact name."""

from __future__ import annotations

import torch
from models import dense_reader
from reference import relative_difference
from torch.nn.attention import SDPBackend, sdpa_kernel

from wasi_edge.layers.linear import SubspaceLinear
from wasi_edge.layers.saving import Pass
from wasi_edge.models.network import artefact_name, resampled
from wasi_edge.models.vanilla import build_vanilla


def engine_gradients(model, pixels, dfeatures, keep, gradient_rank=10_000):
    """Gradients by artefact name, low-rank ones multiplied out to the dense gradient of the product."""
    generator = torch.Generator().manual_seed(1)
    for name, linear in model.linears().items():
        if isinstance(linear, SubspaceLinear):
            linear.start_training(gradient_rank, model.tokens_of(name), generator)
    run = Pass(refresh_basis=True)
    features, saved = model.features(pixels, run, [keep] * len(model.blocks))
    gradients = {}

    def collect(layer, parts):
        for key, value in parts.items():
            inner, _, last = key.rpartition(".")
            name = ".".join(part for part in (layer, inner) if part)
            if last == "projected":
                gradients[f"{name}.weight"] = value @ model.linears()[name].basis.t()
            else:
                gradients[artefact_name(name, last) if name else last] = value.clone()

    features = features.clone()
    model.backward(saved, dfeatures.clone(), run, collect)
    return features, gradients


def autograd_gradients(geometry, tensors, image_size, pixels, dfeatures):
    model = build_vanilla(geometry, dense_reader(tensors), image_size, 3).to(pixels.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = dense_reader(tensors)(name)
            parameter.copy_(resampled(name, value, geometry, image_size))
    with sdpa_kernel(SDPBackend.MATH):
        features = model.features(pixels)
    features.backward(dfeatures)
    return features.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_autograd_agrees(geometry, tensors, model, image_size, pixels, dfeatures, keep):
    """Features and every gradient of `model`, its basis complete, are those of autograd."""
    features, actual = engine_gradients(model, pixels, dfeatures, keep)
    expected_features, expected = autograd_gradients(geometry, tensors, image_size, pixels, dfeatures)
    assert relative_difference(features, expected_features) < 1e-12
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert relative_difference(actual[name], gradient) < 1e-10, name
