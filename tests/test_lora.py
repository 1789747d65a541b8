"""Low-rank updates of queries and values against the textbook, and a trainer that trains nothing else."""

from __future__ import annotations

import torch
from models import TINY, dense_reader, random_tensors
from reference import one_thread, relative_difference  # noqa: F401
from torch import Tensor

from wasi_edge.models.lora import LoraBlock, build_lora, is_update
from wasi_edge.models.vanilla import VanillaViT, build_vanilla
from wasi_edge.training.trainer import Recipe
from wasi_edge.training.vanilla_trainer import LoraTrainer

RANK, CLASSES, SIZE = 3, 3, 16
RECIPE = Recipe(1e-2, 0.0, 1e-2, 0.0, 1.0, 0.1)


def network(seed: int = 0) -> VanillaViT:
    _, tensors = random_tensors(TINY, None, CLASSES)
    return build_lora(TINY, dense_reader(tensors), SIZE, CLASSES, RANK, seed).double()


def pixels(seed: int = 1) -> Tensor:
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(trainer: LoraTrainer, number: int) -> None:
    labels = torch.tensor([0, 1, 2, 0])
    trainer.micro_batch(pixels(number), labels, torch.ones(4, dtype=torch.float64), True, 4)
    trainer.apply(number, 1.0)


def test_it_starts_as_the_network_it_adapts():
    _, tensors = random_tensors(TINY, None, CLASSES)
    plain = build_vanilla(TINY, dense_reader(tensors), SIZE, CLASSES).double()
    with torch.no_grad():
        assert relative_difference(network().features(pixels()), plain.features(pixels())) < 1e-12


def test_forward_and_gradients_are_those_of_the_textbook():
    block = network().blocks[0]
    assert isinstance(block, LoraBlock)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for up in (block.query_up, block.value_up):
            up.copy_(torch.randn(up.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(2, 5, TINY.width, generator=generator, dtype=torch.float64)
    learning = [block.query_down, block.query_up, block.value_down, block.value_up]

    zero = torch.zeros(TINY.width, TINY.width, dtype=torch.float64)
    update = torch.cat((block.query_up @ block.query_down, zero, block.value_up @ block.value_down))
    textbook = (x @ (block.qkv.weight + update).T + block.qkv.bias).view(2, 5, 3, TINY.heads, -1).permute(2, 0, 3, 1, 4)
    actual = block.heads_of(x)
    assert relative_difference(torch.stack(actual).detach(), textbook.detach()) < 1e-12
    wanted = torch.autograd.grad(textbook.square().sum(), learning)
    found = torch.autograd.grad(sum(part.square().sum() for part in actual), learning)
    assert all(relative_difference(a, b) < 1e-12 for a, b in zip(found, wanted, strict=True))


def test_only_updates_and_the_classifier_learn():
    model = network()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = LoraTrainer(model, RECIPE)
    for number in (1, 2, 3):
        step(trainer, number)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if is_update(name) or name.startswith("head.")}
    assert {key.split(".", 1)[1] for key in trainer.state() if key.startswith("parameter.")} == changed


def test_what_is_stored_is_the_sum_and_gives_the_same_logits():
    trainer = LoraTrainer(network(), RECIPE)
    for number in (1, 2):
        step(trainer, number)
    logits = trainer.logits(pixels(9)).clone()
    stored = {name: value.clone() for name, value in trainer.parameters().items()}
    assert not any(is_update(name) for name in stored)
    plain = build_vanilla(TINY, stored.__getitem__, SIZE, CLASSES).double()
    plain.load_state_dict(stored)
    with torch.no_grad():
        assert relative_difference(plain(pixels(9)), logits) < 1e-12
    trainer.end_training()
    assert relative_difference(trainer.logits(pixels(9)), logits) < 1e-12
    # the best model is read back into what `parameters` gives
    trainer.parameters()["blocks.0.qkv.weight"].zero_()
    assert not trainer.model.blocks[0].qkv.weight.any()


def test_a_resumed_run_is_the_same_to_the_bit():
    whole, first = LoraTrainer(network(), RECIPE), LoraTrainer(network(), RECIPE)
    for number in (1, 2, 3, 4):
        step(whole, number)
    for number in (1, 2):
        step(first, number)
    saved = {name: value.clone() for name, value in first.state().items()}
    second = LoraTrainer(network(seed=7), RECIPE)
    second.load_state(iter(saved.items()))
    for number in (3, 4):
        step(second, number)
    assert all(torch.equal(value, second.state()[name]) for name, value in whole.state().items())


def test_the_start_is_drawn_from_the_seed_alone():
    before = torch.get_rng_state()
    first, again, other = (network(seed).blocks[0].query_down for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
