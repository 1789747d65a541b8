"""The linears of `wsi` and `asi` against autograd and against dense twins; those of `wasi` are in test_linears.py, both
dense and factored ones in one network in test_stored_dense.py."""

from __future__ import annotations

import pytest
import torch
from reference import (  # noqa: F401
    dense_momentum_step,
    dense_polar_factor,
    generator,
    one_thread,
    plain_qr,
    random,
    relative_difference,
    subspace_difference,
)
from torch import Tensor

from wasi_edge.chunks import sampled_tokens
from wasi_edge.layers.linear import (
    AsiLinear,
    DenseLinear,
    DenseWsiLinear,
    LinearKinds,
    SubspaceLinear,
    WasiLinear,
    WsiLinear,
)
from wasi_edge.layers.saving import Pass
from wasi_edge.method import Method
from wasi_edge.training.factor_update import MOMENTUM, POLAR_FLOOR, FactorUpdate

OUT, IN, RANK, TOKENS, BATCH = 18, 14, 6, 5, 4
KINDS = pytest.mark.parametrize("kind", [WsiLinear, AsiLinear, DenseWsiLinear])


def make(kind: type[SubspaceLinear], gradient_rank: int, scale: bool = True, rank: int = RANK) -> SubspaceLinear:
    bias, factor = random(OUT, seed=1), 1 + 0.1 * random(OUT, seed=2) if scale else None
    layer: SubspaceLinear
    if issubclass(kind, AsiLinear):
        layer = kind(random(OUT, IN, seed=3), bias, factor)
    else:
        assert issubclass(kind, WasiLinear)
        layer = kind(random(OUT, rank, seed=3), random(rank, IN, seed=4), bias, factor)
    layer.start_training(gradient_rank, TOKENS, generator(5))
    return layer


def dense_weight(layer: SubspaceLinear) -> Tensor:
    params = layer.params
    return (params["weight"] if "weight" in params else params["left"] @ params["right"]).clone()


def both_passes(layer: SubspaceLinear, seed: int, refresh: bool = True) -> tuple[Tensor, Tensor, Tensor, dict]:
    x, dy = random(BATCH * TOKENS, IN, seed=seed), random(BATCH * TOKENS, OUT, seed=seed + 1)
    run = Pass(refresh_basis=refresh)
    _, saved = layer.forward(x, TOKENS, run, "linear")
    assert saved is not None
    dx, grads = layer.backward(saved, dy, TOKENS, run)
    return x, dy, dx, grads


@KINDS
@pytest.mark.parametrize("scale", [True, False])
def test_with_a_complete_basis_everything_equals_autograd(kind, scale):
    layer = make(kind, IN, scale)
    names = ["bias", "scale"] if scale else ["bias"]
    x, dy, dx, grads = both_passes(layer, 10)
    weight = dense_weight(layer).requires_grad_()
    others = [layer.params[name].clone().requires_grad_() for name in names]
    inputs = x.clone().requires_grad_()
    y = inputs @ weight.T + others[0]
    if scale:
        y = y * others[1]
    y.backward(dy)
    assert inputs.grad is not None and weight.grad is not None and layer.basis is not None
    assert relative_difference(dx, inputs.grad) < 1e-12
    assert relative_difference(grads["projected"] @ layer.basis.T, weight.grad) < 1e-12
    for name, value in zip(names, others, strict=True):
        assert value.grad is not None and relative_difference(grads[name], value.grad) < 1e-12, name


@pytest.mark.parametrize("kind", [WsiLinear, DenseWsiLinear])
def test_where_the_input_is_kept_the_basis_follows_the_gradient_itself(kind):
    layer = make(kind, 3, scale=False)
    assert layer.basis is not None
    basis = layer.basis.clone()
    for step in range(4):
        x, dy, _, grads = both_passes(layer, 20 + 2 * step)
        gradient = dy.T @ x
        for _ in range(4 if step == 0 else 1):
            basis = plain_qr(gradient.T @ (gradient @ basis))
        assert layer.basis is not None and subspace_difference(layer.basis, basis) < 1e-10
        assert relative_difference(grads["projected"], gradient @ layer.basis) < 1e-12


def test_later_micro_batches_leave_the_basis_alone():
    layer = make(WsiLinear, 3)
    both_passes(layer, 30)
    before = layer.basis
    both_passes(layer, 32, refresh=False)
    assert layer.basis is before


def test_whole_inputs_give_a_better_gradient_than_compressed_ones():
    whole = make(WsiLinear, 3, scale=False)
    compressed = WasiLinear(whole.params["left"], whole.params["right"], whole.params["bias"])
    compressed.start_training(3, TOKENS, generator(5))
    errors = {}
    for name, layer in (("whole", whole), ("compressed", compressed)):
        for _ in range(6):
            x, dy, _, grads = both_passes(layer, 40)
        assert layer.basis is not None
        errors[name] = relative_difference(grads["projected"] @ layer.basis.T, dy.T @ x)
    best = torch.linalg.svdvals(dy.T @ x)
    assert errors["whole"] < errors["compressed"]
    assert errors["whole"] < 1.05 * float((best[3:].square().sum() / best.square().sum()).sqrt())


def test_a_dense_weight_steps_along_the_polar_factor_and_is_not_truncated():
    layer = make(AsiLinear, 3, scale=False)
    weight = dense_weight(layer)
    rule = FactorUpdate({"one": layer}, weight_decay=0.1)
    momentum = torch.zeros(OUT, IN, dtype=torch.float64)
    for step in range(1, 5):
        _, _, _, grads = both_passes(layer, 50 + 2 * step)
        assert layer.basis is not None
        momentum, _ = dense_momentum_step(momentum, None, grads["projected"] @ layer.basis.T, MOMENTUM, 3)
        rate = 0.01 * float(torch.linalg.matrix_norm(weight))
        weight = (1 - rate * 0.1) * weight - rate * dense_polar_factor(momentum, 3, POLAR_FLOOR)
        rule.update("one", grads["projected"], 0.01, step)
        state = rule.state()
        assert relative_difference(state["momentum.one"] @ state["basis.one"].T, momentum) < 1e-12
        assert relative_difference(layer.params["weight"], weight) < 1e-12
    assert int(torch.linalg.matrix_rank(layer.params["weight"])) == IN
    assert not any(key.startswith("carried") for key in rule.state())


def test_linears_take_turns_and_their_momentum_gathers_every_gradient():
    layers = {name: make(AsiLinear, 3, scale=False) for name in ("one", "two", "three")}
    weights = {name: dense_weight(layer) for name, layer in layers.items()}
    rule = FactorUpdate(layers, weight_decay=0.1, turns=2)
    momenta = {name: torch.zeros(OUT, IN, dtype=torch.float64) for name in layers}
    bases: dict[str, torch.Tensor | None] = dict.fromkeys(layers)
    moves = []
    for step in range(1, 6):
        for number, (name, layer) in enumerate(layers.items()):
            _, _, _, grads = both_passes(layer, 50 + 20 * step + 2 * number)
            assert layer.basis is not None
            stays = None if rule.has_turn(name, step) else bases[name]
            gradient = grads["projected"] @ layer.basis.T
            momenta[name], bases[name] = dense_momentum_step(momenta[name], stays, gradient, MOMENTUM, 3)
            if rule.has_turn(name, step):
                rate = 2 * 0.01 * float(torch.linalg.matrix_norm(weights[name]))
                weights[name] = (1 - rate * 0.1) * weights[name] - rate * dense_polar_factor(
                    momenta[name], 3, POLAR_FLOOR
                )
                moves.append((step, name))
            rule.update(name, grads["projected"], 0.01, step)
            assert relative_difference(layer.params["weight"], weights[name]) < 1e-12
    groups = {True: ["one", "two"], False: ["three"]}
    assert moves == [(step, name) for step in range(1, 6) for name in groups[step % 2 == 1]]


def test_each_method_is_built_of_its_own_linears():
    assert LinearKinds.of(Method.WASI) == LinearKinds.of(Method.ASI) == (AsiLinear, WasiLinear)
    assert LinearKinds.of(Method.WSI) == (DenseWsiLinear, WsiLinear)
    assert LinearKinds.of(Method.HEAD) == LinearKinds.of(Method.VANILLA) == (DenseLinear, WasiLinear)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    for kind in (WsiLinear, AsiLinear, DenseWsiLinear):
        both_passes(make(kind, 3), 60)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [WasiLinear, AsiLinear, DenseWsiLinear])
def test_an_input_at_hand_gives_what_wsi_gives_and_keeps_nothing(kind):
    layer = make(kind, 3)
    assert layer.basis is not None
    basis, run = layer.basis.clone(), Pass()
    for step in range(4):
        x, dy = random(2 * TOKENS, IN, seed=60 + step), random(2 * TOKENS, OUT, seed=70 + step)
        scaled, gradient = dy * layer.params["scale"], dy.T @ x
        for _ in range(4 if step == 0 else 1):
            basis = plain_qr(gradient.T @ (gradient @ basis))
        run.refresh_basis = True
        dx, grads = layer.backward_from_input(x, dy, run)
        assert relative_difference(dx, scaled @ dense_weight(layer)) < 1e-12
        assert subspace_difference(layer.basis, basis) < 1e-10
        assert relative_difference(grads["projected"], scaled.T @ x @ layer.basis) < 1e-12
        run.refresh_basis = False
        kept = layer.basis
        _, grads = layer.backward_from_input(2 * x, dy, run)
        assert layer.basis is kept
        assert relative_difference(grads["projected"], 2 * scaled.T @ x @ kept) < 1e-12


def test_of_many_tokens_the_basis_follows_the_eighth_with_the_largest_gradients():
    layer, tokens = make(WasiLinear, 3, scale=False), 2400
    x, dy = random(tokens, IN, seed=80), random(tokens, OUT, seed=81)
    strong = torch.randperm(tokens, generator=generator(82))[: sampled_tokens(tokens)]
    assert len(strong) == 300
    dy[strong] += 20 * dy[strong] / dy[strong].norm(dim=1, keepdim=True)
    gradient, basis = dy[strong].T @ x[strong], layer.basis
    for _ in range(4):
        basis = plain_qr(gradient.T @ (gradient @ basis))
    _, grads = layer.backward_from_input(x, dy, Pass(refresh_basis=True))
    assert subspace_difference(layer.basis, basis) < 1e-9
    assert relative_difference(grads["projected"], dy.T @ x @ layer.basis) < 1e-12  # P is of all tokens


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_gradient_that_says_nothing_leaves_the_basis_alone(value):
    layer = make(WasiLinear, 3)
    before, _, was_cold = layer.training_state()
    layer.backward_from_input(
        random(10, IN, seed=83), torch.full((10, OUT), value, dtype=torch.float64), Pass(refresh_basis=True)
    )
    after, _, is_cold = layer.training_state()
    assert after is before and is_cold == was_cold


@pytest.mark.parametrize("rank", [1, 7, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_padded_rank_shows_in_no_parameter_and_changes_no_product(rank, dtype):
    left, right = random(18, rank, seed=84).to(dtype), random(rank, 14, seed=85).to(dtype)
    layer, x = WasiLinear(left, right, None), random(5, 14, seed=86)
    assert layer.params["left"].shape == (18, rank) and layer.params["right"].shape == (rank, 14)
    y, _ = layer.forward(x, 5, Pass(), None)
    assert relative_difference(y, x @ right.double().T @ left.double().T) < 1e-12
    # the parameters are what products are made of
    layer.params["left"].mul_(2.0)
    assert relative_difference(layer.forward(x, 5, Pass(), None)[0], 2 * y) < 1e-12
