"""One optimiser step, whatever the method: the interface the loop drives, and what runs it on the explicit engine.

A trainer owns parameters, gradients and optimiser state; it knows nothing about epochs, photos on disk or files. Those
under torch autograd are in `vanilla_trainer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wasi_edge.chunks import TURNS
from wasi_edge.errors import WasiEdgeError
from wasi_edge.keep import Keep
from wasi_edge.layers.linear import SubspaceLinear
from wasi_edge.layers.saving import Pass
from wasi_edge.memory.malloc import release_free_memory
from wasi_edge.method import Optimizer
from wasi_edge.models.network import VisionTransformer, artefact_name
from wasi_edge.training.adam import Adam
from wasi_edge.training.factor_update import FactorUpdate
from wasi_edge.training.head import Head
from wasi_edge.training.loss import Loss, cross_entropy


@dataclass(frozen=True)
class Recipe:
    """What a step does, chosen once per run.

    learning_rate       of the linears in blocks (wasi) or of all weights (vanilla), before the schedule
    head_rate           of the classifier (wasi)
    dense_rate          of norms, biases, embeddings and LayerScale (wasi)
    stem_rate           what comes before the first block learns at this share of its rate, what comes after the last at
                        all of it, blocks between them at shares in a geometric row
    optimizer           by which those linears move (wasi, wsi, asi)
    """

    learning_rate: float
    dense_rate: float
    head_rate: float
    weight_decay: float
    clip_norm: float
    label_smoothing: float
    stem_rate: float = 1.0
    optimizer: Optimizer = Optimizer.POLAR

    def share(self, name: str, depth: int) -> float:
        """Of its learning rate, for the parameter `name` of a network of `depth` blocks: layer-wise decay (ELECTRA,
        arXiv 2003.10555; BEiT, arXiv 2106.08254), whose factor from block to block is stem_rate ** (1 / depth)."""
        part, *rest = name.split(".")
        if part in ("norm", "head"):
            return 1.0
        block = int(rest[0]) if part == "blocks" else -1
        return self.stem_rate ** ((depth - 1 - block) / depth)


class Trainer(Protocol):
    """What the loop needs of a method."""

    def features(self, inputs: Tensor) -> Tensor:
        """Pixels (B, C, S, S), or the tokens (B, N, D) that frozen blocks made of them -> (B, F), nothing kept."""

    def logits(self, inputs: Tensor) -> Tensor:
        """The same -> (B, classes), nothing kept."""

    def set_head(self, head: Head) -> None:
        """Start from this classifier."""

    def micro_batch(self, inputs: Tensor, labels: Tensor, weight: Tensor, first: bool, batch: int) -> Loss:
        """Add the gradients of a part of an effective batch of `batch` photos; `first` starts a new step."""

    def apply(self, step: int, schedule: float) -> float:
        """Clip, update, forget the gradients; returns the norm before clipping. `step` counts from 1."""

    def abandon(self) -> None:
        """Forget a step that was begun: back to the state after the last `apply`."""

    def release_buffers(self) -> None:
        """Give back the buffers of forward and backward passes; smaller ones are made when they are needed."""

    def end_training(self) -> None:
        """Give back everything that `features` and `logits` do not need; no steps can follow."""

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name; the tensors themselves, not copies."""

    def load_state(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Take back what `state` gave."""

    def parameters(self) -> Mapping[str, Tensor]:
        """Parameters by artefact name; those that do not learn may be missing, and are where they are only held in a
        rounded form."""


class FrozenTrainer:
    """The explicit network, its classifier alone ever replaced (`head`)."""

    def __init__(self, model: VisionTransformer) -> None:
        self.model = model
        self._run = Pass()
        self._parameters = model.parameters()

    def features(self, inputs: Tensor) -> Tensor:
        return self.model.features(inputs, self._run)[0]

    def logits(self, inputs: Tensor) -> Tensor:
        return self.model.logits(inputs, self._run)

    def set_head(self, head: Head) -> None:
        assert self.model.head is not None
        self.model.head.params["weight"].copy_(head.weight)
        self.model.head.params["bias"].copy_(head.bias)

    def parameters(self) -> Mapping[str, Tensor]:
        return {name: value for name, value in self._parameters.items() if value.dtype is not torch.float16}

    def micro_batch(self, inputs: Tensor, labels: Tensor, weight: Tensor, first: bool, batch: int) -> Loss:
        raise NotImplementedError("the head alone is fitted in closed form; there are no gradient steps")

    def apply(self, step: int, schedule: float) -> float:
        raise NotImplementedError("the head alone is fitted in closed form; there are no gradient steps")

    def abandon(self) -> None:
        """Nothing was begun."""

    def release_buffers(self) -> None:
        self._run.workspace.clear()

    def end_training(self) -> None:
        self.release_buffers()

    def state(self) -> dict[str, Tensor]:
        return {f"parameter.{name}": value for name, value in self._parameters.items()}

    def load_state(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        for full, value in tensors:
            self._parameters[full.removeprefix("parameter.")].copy_(value)


class SubspaceTrainer(FrozenTrainer):
    """Small gradients P U^T and the rule that updates weights with them (`wasi`, `wsi`, `asi`: as the model was built).
    `keeps`: one for each block that learns. `trim`: as the planner's choice `trimmed`."""

    def __init__(
        self,
        model: VisionTransformer,
        recipe: Recipe,
        keeps: Sequence[Keep],
        gradient_rank: int,
        seed: int,
        active: Tensor | None = None,
        carry_grams: bool = True,
        trim: bool = True,
    ) -> None:
        super().__init__(model)
        self._trim, self._run.ample = trim, not trim
        self.recipe, self.keeps, self.active = recipe, list(keeps), active
        self._learning = model.learning_parameters(len(keeps))
        # of this step; the buffers live on, because what is made anew in every step ends up between what is not
        self._gradients: dict[str, Tensor] = {}
        self._gradient_buffers: dict[str, Tensor] = {}
        self._before_step: dict[str, tuple[Tensor, Tensor, bool]] = {}
        self._adam = Adam()
        generator = torch.Generator().manual_seed(seed)
        self._linears: dict[str, SubspaceLinear] = {}
        for name, linear in model.linears(len(keeps)).items():
            if not isinstance(linear, SubspaceLinear):
                raise WasiEdgeError(
                    f"{name} keeps a dense gradient: build the network of the linears of its method (`LinearKinds.of`)"
                )
            linear.start_training(gradient_rank, model.tokens_of(name), generator)
            self._linears[name] = linear
        self._factors = FactorUpdate(self._linears, recipe.weight_decay, carry_grams, seed, TURNS, recipe.optimizer)

    def micro_batch(self, inputs: Tensor, labels: Tensor, weight: Tensor, first: bool, batch: int) -> Loss:
        if first:
            self._remember()
        assert self.model.head is not None
        self._run.refresh_basis = first
        features, saved = self.model.features(inputs, self._run, self.keeps)
        assert saved is not None
        head = self.model.head
        logits, _ = head.forward(features, 1, self._run, None)
        loss = cross_entropy(logits, labels, weight, batch, self.recipe.label_smoothing, self.active)
        dfeatures, grads = head.backward(features, loss.dlogits, 1, self._run)
        self._accumulate("head", grads)
        self.model.backward(saved, dfeatures, self._run, self._accumulate)
        return loss

    def apply(self, step: int, schedule: float) -> float:
        norm = float(torch.stack([g.norm() for g in self._gradients.values()]).norm())
        refuse_divergence(norm, step, self.recipe)
        if self._trim:
            # nothing kept is read any more: the update works in the memory of some of it
            self._run.workspace.lend(self._factors.scratch_bytes)
        recipe = self.recipe
        clip = min(1.0, recipe.clip_norm / max(norm, 1e-12))
        for name, gradient in self._gradients.items():
            gradient.mul_(clip)
            linear, _, key = name.rpartition(".")
            share = recipe.share(name, self.model.geometry.depth) * schedule
            if key == "projected":
                self._factors.update(linear, gradient, recipe.learning_rate * share, step)
            else:
                is_head = linear == "head"
                rate = (recipe.head_rate if is_head else recipe.dense_rate) * share
                stored = artefact_name(linear, key) if linear else key
                self._adam.update(stored, self._parameters[stored], gradient, rate, step)
        self._gradients.clear()
        self._before_step.clear()
        if self._trim:
            release_free_memory()
        return norm

    def abandon(self) -> None:
        self._gradients.clear()
        for name, (basis, token_weight, cold) in self._before_step.items():
            self._linears[name].restore(basis, token_weight, cold)
        self._before_step.clear()

    def end_training(self) -> None:
        super().end_training()
        self.abandon()
        self._gradient_buffers.clear()
        self._adam = Adam()
        self._factors.clear()

    def parameters(self) -> Mapping[str, Tensor]:
        return {**super().parameters(), **self._learning}

    def state(self) -> dict[str, Tensor]:
        named = {f"parameter.{name}": value for name, value in self._learning.items()}
        for name, linear in self._linears.items():
            basis, token_weight, cold = linear.training_state()
            named[f"basis.{name}"] = basis
            named[f"token_weight.{name}"] = token_weight
            named[f"cold.{name}"] = torch.tensor(cold)
        named |= {f"adam.{name}": value for name, value in self._adam.state().items()}
        return named | {f"factors.{name}": value for name, value in self._factors.state().items()}

    def load_state(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"basis": {}, "token_weight": {}, "cold": {}}
        for full, value in tensors:
            kind, _, name = full.partition(".")
            if kind == "parameter":
                self._parameters[name].copy_(value)
            elif kind == "adam":
                self._adam.load(name, value)
            elif kind == "factors":
                self._factors.load(name, value)
            else:
                parts[kind][name] = value
        for name, linear in self._linears.items():
            linear.restore(parts["basis"][name], parts["token_weight"][name], bool(parts["cold"][name]))

    @property
    def upkeep_seconds(self) -> float:
        """What refreshing the bases and the updates of the linears have taken so far."""
        return self._run.refresh_seconds + self._factors.seconds

    @property
    def gather_seconds(self) -> float:
        """What bringing tokens to the order of other windows has taken so far."""
        return self._run.gather_seconds

    def orthonormalise(self) -> None:
        """Make all pairs of factors orthonormal again."""
        self._factors.orthonormalise()

    def held_bytes(self) -> int:
        """Bytes of the buffers of forward and backward passes."""
        return self._run.workspace.held_bytes()

    def _remember(self) -> None:
        for name, linear in self._linears.items():
            basis, token_weight, cold = linear.training_state()
            self._before_step[name] = (basis, token_weight.clone(), cold)

    def _accumulate(self, layer: str, grads: dict[str, Tensor]) -> None:
        for key, value in grads.items():
            name = f"{layer}.{key}" if layer else key
            if name in self._gradients:
                self._gradients[name].add_(value)
                continue
            if name not in self._gradient_buffers:
                self._gradient_buffers[name] = torch.empty_like(value)
            self._gradients[name] = self._gradient_buffers[name].copy_(value)


def refuse_divergence(norm: float, step: int, recipe: Recipe) -> None:
    """Raise WasiEdgeError where the norm of the gradients is not finite."""
    if not norm < float("inf"):
        raise WasiEdgeError(
            f"training diverged at step {step}: the gradient is not finite; try a smaller --lr "
            f"(this run: {recipe.learning_rate:g})"
        )
