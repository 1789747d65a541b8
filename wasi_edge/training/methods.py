"""From a method and a way to read tensors to a trainer: the one place that knows what each method is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from wasi_edge.layers.linear import LinearKinds
from wasi_edge.method import Method
from wasi_edge.models.geometry_swin import Geometry
from wasi_edge.models.lora import build_lora
from wasi_edge.models.network import build_network
from wasi_edge.models.vanilla import build_vanilla
from wasi_edge.planner.choices import Choices
from wasi_edge.training import defaults
from wasi_edge.training.trainer import FrozenTrainer, Recipe, SubspaceTrainer, Trainer
from wasi_edge.training.vanilla_trainer import LoraTrainer, VanillaTrainer


def make_trainer(
    method: Method,
    geometry: Geometry,
    ranks: Mapping[str, int | None],
    read: Callable[[str], Tensor],
    image_size: int,
    num_classes: int,
    recipe: Recipe,
    choices: Choices,
    seed: int,
    active: Tensor | None = None,
    checkpointed: bool = False,
) -> Trainer:
    """The trainer of `method` on the network that `read` gives by artefact names: dense weights, or factors of `ranks`
    in the type they are to be held in. Without the frozen blocks where the choices cache their output; `checkpointed`
    is for vanilla alone."""
    if method is Method.VANILLA:
        vanilla = build_vanilla(geometry, read, image_size, num_classes, checkpointed=checkpointed)
        return VanillaTrainer(vanilla, recipe, active)
    if method is Method.LORA:
        lora = build_lora(geometry, read, image_size, num_classes, defaults.LORA_RANK, seed)
        return LoraTrainer(lora, recipe, active)
    first = geometry.depth - choices.trained_blocks if choices.cached_views else 0
    blocks, kinds = range(first, geometry.depth), LinearKinds.of(method)
    network = build_network(geometry, ranks, read, image_size, head=True, blocks=blocks, kinds=kinds)
    if method is Method.HEAD:
        return FrozenTrainer(network)
    keeps, rank = choices.keeps(), choices.gradient_rank
    return SubspaceTrainer(network, recipe, keeps, rank, seed, active, choices.carried_grams, choices.trimmed)
