"""Rules by which a linear in factors could learn from its small gradient P U^T, in place of `FactorUpdate`'s own.

Every rule gets what ours gets, P (O, r) and U (I, r) of each step, so that activations and gradients are the same and
take the same memory; what differs is the state beside the factors and what is done with it. Rates are relative to the
norm of the weight where a step has one length, absolute where it follows the gradient. Rules with a mean over steps
move each linear at its turn, as ours does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from wasi_edge.training.factor_update import FactorUpdate

BETAS, EPS = (0.9, 0.999), 1e-8
Rule = Callable[[FactorUpdate, str, Tensor, float, int], None]


def sgd(update: FactorUpdate, name: str, projected: Tensor, learning_rate: float, step: int) -> None:
    """W <- truncate(W - lr P U^T), the paper's: no state, so it moves at every step."""
    update._follow_gradient(name, projected, _basis(update, name), learning_rate, step)


def momentum(update: FactorUpdate, name: str, projected: Tensor, learning_rate: float, step: int) -> None:
    """The same with M V^T, the momentum in its own subspace."""
    has_turn = update.has_turn(name, step)
    mean, basis = update._add_to_momentum(name, projected, _basis(update, name), has_turn)
    if has_turn:
        update._move(name, mean, basis, learning_rate * update._turns, step, relative=False)


def normalised_momentum(update: FactorUpdate, name: str, projected: Tensor, learning_rate: float, step: int) -> None:
    """M at the length that its polar factor has, times the norm of the weight."""
    has_turn = update.has_turn(name, step)
    mean, basis = update._add_to_momentum(name, projected, _basis(update, name), has_turn)
    if has_turn:
        length = torch.linalg.vector_norm(mean).clamp_min(1e-30)
        update._move(name, mean * (mean.shape[1] ** 0.5 / length), basis, learning_rate * update._turns, step)


def adam_on_p(update: FactorUpdate, name: str, projected: Tensor, learning_rate: float, step: int) -> None:
    """Adam's two moments of P, turned with U: m <- m C, v <- v (C o C) with C = U_old^T U."""
    basis, state = _basis(update, name), update._momentum
    first, second = f"{name}.m", f"{name}.v"
    if first not in state:
        state[first], state[second] = torch.zeros_like(projected), torch.zeros_like(projected)
    else:
        turn = update._basis[name].t() @ basis
        state[first], state[second] = state[first] @ turn, state[second] @ turn.square()
    update._basis[name] = basis.clone()
    state[first].lerp_(projected, 1 - BETAS[0])
    state[second].lerp_(projected.square(), 1 - BETAS[1])
    if update.has_turn(name, step):
        mean, square = state[first] / (1 - BETAS[0] ** step), state[second] / (1 - BETAS[1] ** step)
        direction = mean / (square.sqrt() + EPS)
        update._move(name, direction, basis, learning_rate * update._turns, step, relative=False)


def adamw_in_factors(update: FactorUpdate, name: str, projected: Tensor, learning_rate: float, step: int) -> None:
    """AdamW on balanced L and R, with the gradients that P U^T of the weight gives: dL = P (R U)^T, dR = L^T P U^T; it
    moves at every step."""
    linear, basis, state = update._linears[name], _basis(update, name), update._momentum
    left, right = linear.params["left"], linear.params["right"]
    if f"{name}.left.m" not in state:
        balance = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-30)).sqrt()
        left.mul_(balance)
        right.div_(balance[:, None])
        for kind, factor in (("left", left), ("right", right)):
            state[f"{name}.{kind}.m"], state[f"{name}.{kind}.v"] = torch.zeros_like(factor), torch.zeros_like(factor)
        update._carried.pop(name, None)  # Gram matrices, of no use here
    gradients = {"left": projected @ (right @ basis).t(), "right": (left.t() @ projected) @ basis.t()}
    for kind, factor in (("left", left), ("right", right)):
        mean = state[f"{name}.{kind}.m"].lerp_(gradients[kind], 1 - BETAS[0])
        square = state[f"{name}.{kind}.v"].lerp_(gradients[kind].square(), 1 - BETAS[1])
        factor.mul_(1 - learning_rate * update._weight_decay)
        scale = (square / (1 - BETAS[1] ** step)).sqrt_().add_(EPS)
        factor.addcdiv_(mean, scale, value=-learning_rate / (1 - BETAS[0] ** step))


RULES: dict[str, Rule | None] = {
    "polar factor of momentum": None,
    "normalised momentum": normalised_momentum,
    "sgd": sgd,
    "momentum": momentum,
    "adam on p": adam_on_p,
    "adamw in factors": adamw_in_factors,
}


@contextmanager
def learning_by(name: str) -> Iterator[None]:
    """Within, all of `FactorUpdate` learn by that rule. Raises KeyError for a name that `RULES` lacks."""
    rule = RULES[name]
    if rule is None:
        yield
        return
    with mock.patch.object(FactorUpdate, "_update", rule):
        yield


def state_bytes(update: FactorUpdate) -> int:
    """What a rule holds beside the factors."""
    held = (*update._momentum.values(), *update._basis.values(), *update._carried.values())
    return sum(value.numel() * value.element_size() for value in held)


def _basis(update: FactorUpdate, name: str) -> Tensor:
    basis = update._linears[name].basis
    assert basis is not None
    return basis
