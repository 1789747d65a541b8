"""Cross-entropy with label smoothing and class weights, and its gradient, written out.

With targets t = (1 - s) onehot + s / C over the C classes that take part, photo weight w and an effective batch of n
photos: loss = sum_i w_i / n * (- t_i . log softmax(y_i)),  dy_i = w_i / n * (softmax(y_i) - t_i).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Loss(NamedTuple):
    """`value`: sum over the photos, not divided by n. `dlogits` (B, C) is divided by n. `correct`: hits."""

    value: float
    correct: int
    dlogits: Tensor


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    batch: int,
    smoothing: float,
    active: Tensor | None = None,
) -> Loss:
    """Loss of logits (B, C) with labels (B,) and photo weights (B,), as part of an effective batch of `batch`.

    `active` (C,) bool: classes that take part; the others (of which there are no photos) get no gradient.
    """
    if active is not None:
        logits = logits.masked_fill(~active, float("-inf"))
    log_probability = torch.log_softmax(logits, 1)
    classes = logits.shape[1] if active is None else int(active.sum())
    targets = torch.full_like(logits, smoothing / classes)
    if active is not None:
        targets[:, ~active] = 0
        log_probability = log_probability.masked_fill(~active, 0.0)
    targets[torch.arange(len(labels)), labels] += 1 - smoothing
    probability = log_probability.exp()
    if active is not None:
        probability = probability.masked_fill(~active, 0.0)
    value = -(weight * (targets * log_probability).sum(1)).sum()
    dlogits = (probability - targets) * (weight / batch)[:, None]
    correct = int((logits.argmax(1) == labels).sum())
    return Loss(float(value), correct, dlogits)
