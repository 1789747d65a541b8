"""The rules that `benchmarks/accuracy/rules.py` compares, each against its dense twin over several steps in float64."""

from __future__ import annotations

import pytest
import torch
from reference import (
    dense_momentum_step,
    dense_wsi_step,
    matrix_with_spectrum,
    plain_qr,
    random,
    relative_difference,
)
from torch import Tensor

from benchmarks.accuracy.rules import BETAS, EPS, RULES, learning_by, state_bytes
from wasi_edge.layers.linear import WasiLinear
from wasi_edge.training.factor_update import MOMENTUM, FactorUpdate

OUT, IN, RANK, SMALL, DECAY, RATE = 14, 12, 6, 3, 0.1, 0.01


class Held(WasiLinear):
    """A linear whose basis the test gives."""

    basis: Tensor | None = None  # type: ignore[assignment]


@pytest.fixture
def layer() -> Held:
    values = torch.logspace(0.5, -0.5, RANK, dtype=torch.float64)
    return Held(*matrix_with_spectrum(OUT, IN, values, seed=0), None)


def gradients(steps: int) -> list[tuple[Tensor, Tensor]]:
    """P (O, r), U (I, r)."""
    return [(random(OUT, SMALL, seed=9 * i + 1), plain_qr(random(IN, SMALL, seed=9 * i + 2))) for i in range(steps)]


def weight_of(layer: Held) -> Tensor:
    return layer.params["left"] @ layer.params["right"]


@pytest.mark.parametrize("name", ["sgd", "momentum", "normalised momentum"])
def test_rules_that_move_the_weight_follow_their_dense_twin(layer: Held, name: str) -> None:
    update = FactorUpdate({"x": layer}, DECAY)
    weight, momentum, norm = weight_of(layer), torch.zeros(OUT, IN, dtype=torch.float64), 0.0
    with learning_by(name):
        for step, (left, basis) in enumerate(gradients(4), 1):
            layer.basis = basis
            direction, rate = left @ basis.T, RATE
            if name != "sgd":
                momentum, _ = dense_momentum_step(momentum, None, direction, MOMENTUM, SMALL)
                direction = momentum
            if name == "normalised momentum":
                norm = norm or float(torch.linalg.matrix_norm(weight))  # measured when a pair is made orthonormal
                direction = momentum * (SMALL**0.5 / torch.linalg.matrix_norm(momentum))
                rate = RATE * norm
            weight, _ = dense_wsi_step(weight, layer.params["left"], direction, rate, DECAY)
            update.update("x", left, RATE, step)
            assert relative_difference(weight_of(layer), weight) < 1e-10


def test_adam_on_p_turns_its_moments_with_the_basis(layer: Held) -> None:
    update = FactorUpdate({"x": layer}, DECAY)
    weight = weight_of(layer)
    first, second, before = torch.zeros(OUT, SMALL), torch.zeros(OUT, SMALL), None
    with learning_by("adam on p"):
        for step, (left, basis) in enumerate(gradients(4), 1):
            layer.basis = basis
            if before is not None:
                first, second = first @ (before.T @ basis), second @ (before.T @ basis) ** 2
            before = basis
            first = BETAS[0] * first + (1 - BETAS[0]) * left
            second = BETAS[1] * second + (1 - BETAS[1]) * left**2
            direction = (first / (1 - BETAS[0] ** step)) / ((second / (1 - BETAS[1] ** step)) ** 0.5 + EPS)
            weight, _ = dense_wsi_step(weight, layer.params["left"], direction @ basis.T, RATE, DECAY)
            update.update("x", left, RATE, step)
            assert relative_difference(weight_of(layer), weight) < 1e-10


def test_adamw_in_factors_is_torchs_on_the_gradient_that_p_stands_for(layer: Held) -> None:
    update = FactorUpdate({"x": layer}, DECAY)
    left, right = layer.params["left"].clone(), layer.params["right"].clone()
    balance = (right.norm(dim=1) / left.norm(dim=0)) ** 0.5
    pair = [torch.nn.Parameter(left * balance), torch.nn.Parameter(right / balance[:, None])]
    adam = torch.optim.AdamW(pair, lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
    with learning_by("adamw in factors"):
        for step, (projected, basis) in enumerate(gradients(4), 1):
            layer.basis = basis
            dense = projected @ basis.T
            pair[0].grad, pair[1].grad = dense @ pair[1].detach().T, pair[0].detach().T @ dense
            adam.step()
            update.update("x", projected, RATE, step)
            assert relative_difference(weight_of(layer), (pair[0] @ pair[1]).detach()) < 1e-10


@pytest.mark.parametrize("name", ["momentum", "normalised momentum", "adam on p"])
def test_rules_with_a_mean_wait_for_their_turn(layer: Held, name: str) -> None:
    update = FactorUpdate({"x": layer}, DECAY, turns=2)
    moved = []
    with learning_by(name):
        for step, (left, basis) in enumerate(gradients(4), 1):
            before, layer.basis = weight_of(layer), basis
            update.update("x", left, RATE, step)
            moved.append(not torch.equal(weight_of(layer), before))
    assert moved == [update.has_turn("x", step) for step in range(1, 5)] and sum(moved) == 2


def test_rules_hold_what_they_say_and_ours_is_itself_again_afterwards(layer: Held) -> None:
    held = {}
    for name in RULES:
        copy = Held(layer.params["left"].clone(), layer.params["right"].clone(), None)
        update = FactorUpdate({"x": copy}, DECAY)
        with learning_by(name):
            copy.basis = gradients(1)[0][1]
            update.update("x", gradients(1)[0][0], RATE, 1)
        held[name] = state_bytes(update)
    grams, small = (2 * RANK + 3) * RANK * 8, (OUT + IN) * SMALL * 8
    assert held["sgd"] == grams
    assert held["polar factor of momentum"] == held["momentum"] == held["normalised momentum"] == grams + small
    assert held["adam on p"] == grams + small + OUT * SMALL * 8
    assert held["adamw in factors"] == 2 * (OUT + IN) * RANK * 8
    assert FactorUpdate._update.__module__ == "wasi_edge.training.factor_update"
