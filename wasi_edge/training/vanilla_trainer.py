"""Optimiser steps under torch autograd: the dense network with torch's AdamW, all of it or low-rank updates alone.

What everybody else runs, and so the yardstick. The interface is that of `trainer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from wasi_edge.models.lora import LowRankUpdates, is_update
from wasi_edge.models.vanilla import VanillaViT
from wasi_edge.models.vanilla_swin import VanillaSwin
from wasi_edge.training.head import Head
from wasi_edge.training.loss import Loss, cross_entropy
from wasi_edge.training.trainer import Recipe, refuse_divergence


class VanillaTrainer:
    """The dense network under autograd, with torch's AdamW."""

    def __init__(self, model: VanillaViT | VanillaSwin, recipe: Recipe, active: Tensor | None = None) -> None:
        self.model, self.recipe, self.active = model, recipe, active
        self._learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in self._learning.items():
            decay = recipe.weight_decay if is_decayed(name, parameter) else 0.0
            groups.setdefault((decay, recipe.share(name, len(model.blocks))), []).append(parameter)
        self._optimizer = torch.optim.AdamW(
            [{"params": held, "weight_decay": decay, "share": share} for (decay, share), held in groups.items()],
            lr=recipe.learning_rate,
        )

    def features(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.features(pixels)

    def logits(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(pixels)

    def set_head(self, head: Head) -> None:
        with torch.no_grad():
            self.model.head.weight.copy_(head.weight)
            self.model.head.bias.copy_(head.bias)

    def micro_batch(self, pixels: Tensor, labels: Tensor, weight: Tensor, first: bool, batch: int) -> Loss:
        with torch.enable_grad():
            logits = self.model(pixels)
        with torch.no_grad():
            loss = cross_entropy(logits, labels, weight, batch, self.recipe.label_smoothing, self.active)
        logits.backward(loss.dlogits)
        return loss

    def apply(self, step: int, schedule: float) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm))
        refuse_divergence(norm, step, self.recipe)
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * group["share"] * schedule
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def abandon(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def release_buffers(self) -> None:
        """Autograd holds none between steps."""

    def end_training(self) -> None:
        self.abandon()
        self._optimizer.state.clear()

    def state(self) -> dict[str, Tensor]:
        named = {f"parameter.{name}": value.detach() for name, value in self._learning.items()}
        for name, parameter in self._learning.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                named[f"adam.{key}.{name}"] = value
        return named

    def load_state(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        for full, value in tensors:
            kind, _, rest = full.partition(".")
            if kind == "parameter":
                self._learning[rest].data.copy_(value)
            else:
                key, _, name = rest.partition(".")
                self._optimizer.state[self._learning[name]][key] = value

    def parameters(self) -> Mapping[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay is for a parameter: weights of linears, and no tables of positions or tokens."""
    return parameter.ndim == 2 and not name.endswith(("position", "registers", "bias_table"))


class LoraTrainer(VanillaTrainer):
    """The same, for a network whose weights stay: low-rank updates of queries and values learn, and the classifier."""

    def __init__(self, model: VanillaViT | VanillaSwin, recipe: Recipe, active: Tensor | None = None) -> None:
        super().__init__(model, recipe, active)
        self._is_over = False

    def parameters(self) -> Mapping[str, Tensor]:
        """The dense weights with their updates in them, each made when it is asked for; the dense weights themselves
        once training has ended."""
        return super().parameters() if self._is_over else _Merged(self.model)

    def end_training(self) -> None:
        super().end_training()
        self._is_over = True
        with torch.no_grad():
            for block in self.model.blocks:
                assert isinstance(block, LowRankUpdates)
                block.merge_updates()


class _Merged(Mapping[str, Tensor]):
    def __init__(self, model: VanillaViT | VanillaSwin) -> None:
        self._plain = {name: p.detach() for name, p in model.named_parameters() if not is_update(name)}
        self._updated = {f"blocks.{index}.qkv.weight": block for index, block in enumerate(model.blocks)}

    def __getitem__(self, name: str) -> Tensor:
        block = self._updated.get(name)
        return block.merged_weight() if isinstance(block, LowRankUpdates) else self._plain[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)
