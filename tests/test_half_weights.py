"""Factors in float16: what stochastic rounding promises, and a training that follows the one in float32."""

from __future__ import annotations

import pytest
import torch
from models import TINY, random_tensors

from wasi_edge.keep import EXACT
from wasi_edge.models.network import build_network
from wasi_edge.training.factor_update import stochastic_round
from wasi_edge.training.trainer import Recipe, SubspaceTrainer

RECIPE = Recipe(2e-3, 1e-3, 1e-3, 0.01, 2.0, 0.1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rounded(values: torch.Tensor, seed: int) -> torch.Tensor:
    return stochastic_round(values.clone(), torch.empty(values.shape, dtype=torch.float16), generator(seed))


def test_rounding_takes_one_of_the_two_neighbours_and_keeps_what_fits():
    values = torch.randn(300, 40, generator=generator(0))
    nearest = values.half()
    result = rounded(values, 1)
    spacing = (values.abs() * 2**-10).clamp_min(6e-8)
    assert bool(((result.float() - values).abs() < spacing).all())
    assert not torch.equal(result, nearest)
    assert torch.equal(rounded(nearest.float(), 2), nearest)


def test_rounding_is_right_on_average_and_repeats_with_its_seed():
    # a third of the way between two neighbours
    values = torch.full((256, 400), 1 + 2**-10 / 3)
    mean = float(rounded(values, 3).double().mean())
    assert abs(mean - float(values[0, 0])) < 2**-10 * 0.01
    assert torch.equal(rounded(values, 3), rounded(values, 3))
    assert not torch.equal(rounded(values, 3), rounded(values, 4))


def test_small_steps_add_up_where_plain_rounding_would_lose_them():
    step = 2.0**-16  # a 64th of the spacing at 1
    stochastic, nearest = torch.ones(8, 64).half(), torch.ones(8, 64).half()
    for number in range(256):
        stochastic_round(stochastic.float() + step, stochastic, generator(number))
        nearest = (nearest.float() + step).half()
    assert bool((nearest == 1).all())
    assert abs(float(stochastic.float().mean()) - (1 + 256 * step)) < 30 * step


def trainer(bits: int, seed: int = 0) -> SubspaceTrainer:
    ranks, tensors = random_tensors(TINY, 6, 3, dtype=torch.float32)
    if bits == 16:
        tensors = {key: v.half() if key.endswith((".left", ".right")) else v for key, v in tensors.items()}
    model = build_network(TINY, ranks, {k: v.clone() for k, v in tensors.items()}.__getitem__, 16, head=True)
    return SubspaceTrainer(model, RECIPE, [EXACT] * TINY.depth, 5, seed, carry_grams=bits == 32)


def train(engine: SubspaceTrainer, steps: int) -> list[float]:
    pixels, labels = torch.randn(6, 3, 16, 16, generator=generator(7)), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = []
    with torch.no_grad():
        for step in range(1, steps + 1):
            losses.append(engine.micro_batch(pixels, labels, torch.ones(6), True, 6).value / 6)
            engine.apply(step, 1.0)
    return losses


def test_training_in_16_bits_follows_the_one_in_32():
    wide, half = train(trainer(32), 30), train(trainer(16), 30)
    assert wide[-1] < 0.8 * wide[0]
    assert max(abs(a - b) for a, b in zip(wide, half, strict=True)) < 0.05 * wide[0]


def test_training_in_16_bits_repeats_and_keeps_factors_in_16_bits():
    first, second = trainer(16), trainer(16)
    assert train(first, 5) == train(second, 5)
    for name, value in first.parameters().items():
        assert value.dtype is (torch.float16 if name.endswith((".left", ".right")) else torch.float32)
        assert torch.equal(value, second.parameters()[name])
    assert not any(key.startswith("factors.grams") for key in first.state())


@pytest.mark.parametrize("bits", [16, 32])
def test_a_run_goes_on_from_its_state_to_the_bit(bits):
    whole, halted = trainer(bits), trainer(bits)
    train(whole, 6)
    train(halted, 3)
    fresh = trainer(bits)
    fresh.load_state(iter({name: value.clone() for name, value in halted.state().items()}.items()))
    pixels, labels = torch.randn(6, 3, 16, 16, generator=generator(7)), torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.no_grad():
        for step in (4, 5, 6):
            fresh.micro_batch(pixels, labels, torch.ones(6), True, 6)
            fresh.apply(step, 1.0)
    assert all(torch.equal(value, fresh.parameters()[name]) for name, value in whole.parameters().items())
