"""AdamW (Loshchilov and Hutter 2019) over named tensors, in place, with its state where checkpoints can reach it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Adam:
    """Moments of every tensor ever updated, by name. Decay is decoupled and given per call."""

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}

    def update(
        self, name: str, value: Tensor, gradient: Tensor, learning_rate: float, step: int, decay: float = 0.0
    ) -> None:
        """One step of `value`, in place; `gradient` is overwritten. `step` counts from 1."""
        if name not in self.first:
            self.first[name] = torch.zeros_like(value)
            self.second[name] = torch.zeros_like(value)
        first, second = self.first[name], self.second[name]
        first.lerp_(gradient, 1 - self.beta1)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        denominator = torch.sqrt(second, out=gradient).div_(math.sqrt(1 - self.beta2**step)).add_(self.eps)
        if decay:
            value.mul_(1 - learning_rate * decay)
        value.addcdiv_(first, denominator, value=-learning_rate / (1 - self.beta1**step))

    def state(self) -> dict[str, Tensor]:
        """Moments as `first.<name>` and `second.<name>`."""
        named = {f"first.{name}": value for name, value in self.first.items()}
        return named | {f"second.{name}": value for name, value in self.second.items()}

    def load(self, key: str, value: Tensor) -> None:
        """Take back one entry of `state`."""
        kind, _, name = key.partition(".")
        {"first": self.first, "second": self.second}[kind][name] = value
