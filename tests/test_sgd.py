"""SGD as the rule of the explicit engine: against its dense twin, what it holds, and when it is chosen."""

from __future__ import annotations

import pytest
from reference import dense_wsi_step, one_thread, random, relative_difference  # noqa: F401
from test_learning_rules import IN, OUT, Held, gradients, layer, weight_of  # noqa: F401
from torch import Tensor

from wasi_edge.layers.linear import AsiLinear
from wasi_edge.method import Method, Optimizer
from wasi_edge.training import defaults
from wasi_edge.training.factor_update import FactorUpdate
from wasi_edge.training.setup import usual_recipe

RATE = 0.05


class Dense(AsiLinear):
    """A linear with a dense weight whose basis the test gives."""

    basis: Tensor | None = None  # type: ignore[assignment]


def test_factors_follow_the_gradient_at_every_step_by_an_absolute_rate(layer: Held) -> None:  # noqa: F811
    rule = FactorUpdate({"x": layer}, weight_decay=0.0, turns=2, optimizer=Optimizer.SGD)
    weight, carried = weight_of(layer), rule.state()["carried.x"].shape
    for step, (projected, basis) in enumerate(gradients(5), 1):
        layer.basis = basis
        weight, _ = dense_wsi_step(weight, layer.params["left"], projected @ basis.T, RATE, 0.0)
        rule.update("x", projected, RATE, step)
        assert rule.has_turn("x", step)
        assert relative_difference(weight_of(layer), weight) < 1e-10
        assert {key: value.shape for key, value in rule.state().items()} == {"carried.x": carried}


def test_a_dense_weight_takes_the_whole_gradient() -> None:
    dense = Dense(random(OUT, IN, seed=3), None, None)
    rule = FactorUpdate({"x": dense}, weight_decay=0.0, turns=2, optimizer=Optimizer.SGD)
    weight = dense.params["weight"].clone()
    for step, (projected, basis) in enumerate(gradients(4), 1):
        dense.basis = basis
        weight -= RATE * projected @ basis.T
        rule.update("x", projected, RATE, step)
        assert relative_difference(dense.params["weight"], weight) < 1e-13
    assert rule.state() == {}


@pytest.mark.parametrize(
    ("method", "steps", "cut_short", "expected"),
    [
        (Method.WASI, defaults.MANY_STEPS, False, Optimizer.SGD),
        (Method.ASI, 10 * defaults.MANY_STEPS, False, Optimizer.SGD),
        (Method.WASI, defaults.MANY_STEPS - 1, False, Optimizer.POLAR),
        (Method.WASI, defaults.MANY_STEPS, True, Optimizer.POLAR),
        (Method.VANILLA, defaults.MANY_STEPS, False, Optimizer.POLAR),
    ],
)
def test_it_is_chosen_for_long_runs_that_nothing_cuts_short(
    method: Method, steps: int, cut_short: bool, expected: Optimizer
) -> None:
    assert defaults.optimizer(method, steps, cut_short) is expected


def test_its_other_rates_are_those_of_the_other_rule_at_twice_its_usual_rate() -> None:
    ours, sgd = usual_recipe("wasi", 2.4e-4), usual_recipe("wasi", optimizer=Optimizer.SGD)
    assert sgd.optimizer is Optimizer.SGD and ours.optimizer is Optimizer.POLAR
    assert (sgd.dense_rate, sgd.head_rate) == pytest.approx((ours.dense_rate, ours.head_rate))
    assert sgd.weight_decay == 0 and sgd.stem_rate == ours.stem_rate and sgd.learning_rate == 0.3
    assert usual_recipe("wasi", 0.1, Optimizer.SGD).head_rate == pytest.approx(sgd.head_rate / 3)
