"""How good a classifier is: a confusion matrix, and what is read from it. Pure numpy, no torch.

Precision of a class that was never predicted, and recall of one that has no photos, are None: they are
unknown, and 0 would pull a mean down that should not contain them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def confusion_matrix(true: ArrayLike, predicted: ArrayLike, num_classes: int) -> np.ndarray:
    """Counts (C, C) int64: rows are the true classes, columns the predicted ones.

    `true` and `predicted` are class numbers, (n,) each. Raises ValueError where they differ in length or
    leave 0..C-1.
    """
    rows, columns = np.asarray(true, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    if rows.shape != columns.shape or rows.ndim != 1:
        raise ValueError(f"expected two vectors of one length, found shapes {rows.shape} and {columns.shape}")
    both = np.concatenate((rows, columns))
    if both.size and not (both.min() >= 0 and both.max() < num_classes):
        raise ValueError(f"class numbers should lie in 0 .. {num_classes - 1}, found {both.min()} .. {both.max()}")
    counts = np.bincount(rows * num_classes + columns, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def scores(confusion: ArrayLike, labels: Sequence[str]) -> dict[str, Any]:
    """The contract's keys from a confusion matrix (C, C), as plain JSON values.

    `accuracy`, `balanced_accuracy` (mean recall of the classes that have photos), `num_images`, `per_class`
    (label -> `precision`, `recall`, `support`), `confusion` and `labels`. Accuracies are fractions, None
    without photos.
    """
    matrix = np.asarray(confusion, dtype=np.int64)
    if matrix.shape != (len(labels), len(labels)):
        raise ValueError(f"expected a matrix of {len(labels)} x {len(labels)} classes, found shape {matrix.shape}")
    right, support, said = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    recalls = [_share(right[i], support[i]) for i in range(len(labels))]
    known = [recall for recall in recalls if recall is not None]
    return {
        "accuracy": _share(right.sum(), matrix.sum()),
        "balanced_accuracy": sum(known) / len(known) if known else None,
        "num_images": int(matrix.sum()),
        "per_class": {
            label: {"precision": _share(right[i], said[i]), "recall": recalls[i], "support": int(support[i])}
            for i, label in enumerate(labels)
        },
        "confusion": matrix.tolist(),
        "labels": list(labels),
    }


def _share(part: np.integer[Any], whole: np.integer[Any]) -> float | None:
    return float(part / whole) if whole else None


def softmax(logits: np.ndarray) -> np.ndarray:
    """(B, C) -> shares that sum to 1 in every row, in the same dtype."""
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)
