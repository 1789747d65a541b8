"""Confusion matrix and scores against sums done by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from wasi_edge.metrics import confusion_matrix, scores


def test_rows_are_true_and_columns_predicted():
    matrix = confusion_matrix([0, 0, 0, 1, 2], [0, 1, 1, 1, 0], 3)
    assert matrix.tolist() == [[1, 2, 0], [0, 1, 0], [1, 0, 0]]
    assert matrix.dtype == np.int64


def test_confusions_of_parts_add_up():
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 7, 200), rng.integers(0, 7, 200)
    parts = [confusion_matrix(true[part], predicted[part], 7) for part in (slice(0, 90), slice(90, 200))]
    assert (sum(parts) == confusion_matrix(true, predicted, 7)).all()


@pytest.mark.parametrize(("true", "predicted"), [([0, 1], [0]), ([0, 3], [0, 0]), ([0, 0], [-1, 0]), ([[0]], [[0]])])
def test_impossible_class_numbers_are_refused(true, predicted):
    with pytest.raises(ValueError):
        confusion_matrix(true, predicted, 3)


def test_scores_of_a_small_example():
    found = scores([[3, 1, 0], [2, 2, 0], [0, 0, 0]], ["a", "b", "c"])
    assert found["accuracy"] == 5 / 8
    assert found["balanced_accuracy"] == (3 / 4 + 2 / 4) / 2
    assert found["num_images"] == 8
    assert found["per_class"] == {
        "a": {"precision": 3 / 5, "recall": 3 / 4, "support": 4},
        "b": {"precision": 2 / 3, "recall": 2 / 4, "support": 4},
        "c": {"precision": None, "recall": None, "support": 0},
    }
    assert found["labels"] == ["a", "b", "c"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_no_photos_are_no_accuracy():
    found = scores(confusion_matrix([], [], 2), ["a", "b"])
    assert found["accuracy"] is None and found["balanced_accuracy"] is None and found["num_images"] == 0


def test_the_matrix_must_fit_the_labels():
    with pytest.raises(ValueError, match="2 x 2"):
        scores(np.zeros((3, 3)), ["a", "b"])
