"""The closed-form head before the first step: what it says of the photos, and whether anything is left to train for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wasi_edge.training.head import FeatureStatistics, Head, accuracy_of_half, balance, fit

# Of the frozen head, on at least so many photos it does not know, from which training could gain less than a point.
ENOUGH_ACCURACY, ENOUGH_PHOTOS = 0.99, 20
# photos of each class, below which half of them says nothing
_FEWEST_OF_CLASS = 4

# of half of the photos and of all: how many they are, and the head's accuracy on photos it does not know, each class
# counted the same
Curve = list[dict[str, float]]


def fit_with_curve(
    features: Tensor, labels: Tensor, num_classes: int, load_earlier: Callable[[], FeatureStatistics | None] | None
) -> tuple[Head, Curve]:
    """The head of features (n, F) with labels (n,), and its learning curve: empty where a class has very few photos, or
    where photos of an earlier run count too (as for `head.fit`), whose statistics are loaded for the fit alone: they
    are as large as the fit itself, which lets go of them on the way."""
    whole = fit(features, labels, num_classes, None if load_earlier is None else load_earlier())
    counts = torch.bincount(labels, minlength=num_classes)
    if load_earlier is not None or int(counts[counts > 0].min()) < _FEWEST_OF_CLASS:
        return whole.head, []
    half, accuracy = accuracy_of_half(features, labels, num_classes)
    curve: Curve = [
        {"photos": half, "accuracy": accuracy},
        {"photos": len(labels), "accuracy": whole.left_out_accuracy},
    ]
    return whole.head, curve


def suffices(logits: Tensor, labels: Tensor, curve: Curve) -> bool:
    """Whether the frozen head is right on next to all photos that it does not know: those of its curve, and held-out
    ones with logits (m, C) and labels (m,)."""
    if not curve or len(labels) < ENOUGH_PHOTOS:
        return False
    weight = balance(labels, logits.shape[1])
    held_out = float((weight * (logits.argmax(1) == labels)).sum() / weight.sum())
    return min(held_out, curve[-1]["accuracy"]) >= ENOUGH_ACCURACY
