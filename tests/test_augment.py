"""Augmentation without state: the same key gives the same pixels, whatever happened before."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import photos
import pytest

from wasi_edge.data.augment import augment, class_weights, epoch_order

SHRUNK = np.asarray(photos.scene(1, 96, 64))


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (64, 64), (64, 128), (8, 8), (1, 2)])
def test_a_view_has_the_asked_size_and_is_contiguous(shape: tuple[int, int]) -> None:
    for photo in range(20):
        view = augment(np.zeros((*shape, 3), dtype=np.uint8), 56, 0, 0, photo)
        assert view.shape == (56, 56, 3) and view.dtype == np.uint8 and view.flags.c_contiguous


def test_order_and_threads_change_nothing() -> None:
    keys = [(epoch, photo) for epoch in range(4) for photo in range(16)]
    forward = {key: augment(SHRUNK, 56, 7, *key) for key in keys}
    with ThreadPoolExecutor(4) as pool:
        backward = dict(zip(keys[::-1], pool.map(lambda key: augment(SHRUNK, 56, 7, *key), keys[::-1]), strict=True))
    for key in keys:
        np.testing.assert_array_equal(forward[key], backward[key])


def test_numpys_global_seed_is_neither_read_nor_moved() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    augment(SHRUNK, 56, 0, 0, 0), epoch_order(10, 0, 0)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # type: ignore[index]


def test_every_part_of_the_key_matters() -> None:
    views = [augment(SHRUNK, 56, *key).tobytes() for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len(set(views)) == 4


def test_half_of_the_views_are_mirrored() -> None:
    ramp = np.tile(np.linspace(0, 255, 96).astype(np.uint8)[None, :, None], (64, 1, 3))
    views = [augment(ramp, 32, 0, 0, photo) for photo in range(400)]
    mirrored = sum(int(view[:, 0].sum()) > int(view[:, -1].sum()) for view in views)
    assert 150 < mirrored < 250


def test_crops_cover_the_asked_areas_and_stay_inside() -> None:
    rows, columns = np.mgrid[0:200, 0:200]
    field = np.stack([columns, rows, rows], axis=2).astype(np.uint8)
    areas = []
    for photo in range(300):
        view = augment(field, 32, 0, 0, photo).astype(float)
        # The gradient over the view is the size of the crop.
        areas.append(np.ptp(view[..., 0]) * np.ptp(view[..., 1]) / 200**2)
    assert 0.28 < min(areas) < 0.45 and 0.85 < max(areas) <= 1.0
    assert 0.55 < float(np.mean(areas)) < 0.72


def test_an_order_is_a_permutation_and_epochs_differ() -> None:
    first, second = epoch_order(100, 3, 0), epoch_order(100, 3, 1)
    assert sorted(first) == list(range(100)) and list(first) != list(second)
    np.testing.assert_array_equal(first, epoch_order(100, 3, 0))
    assert len(epoch_order(0, 0, 0)) == 0


def test_weights_favour_the_rare_and_average_one_over_photos() -> None:
    labels = [0] * 60 + [1] * 30 + [2] * 10
    weights = class_weights(labels, 3)
    assert weights.dtype == np.float64 and weights[labels].mean() == pytest.approx(1.0)
    np.testing.assert_allclose(weights[1] / weights[0], 2.0)
    np.testing.assert_allclose(class_weights([0, 1, 2] * 5, 3), 1.0)


def test_weights_are_capped_and_absent_classes_do_no_harm() -> None:
    weights = class_weights([0] * 10_000 + [1], 2)
    assert weights[1] / weights[0] <= 25 and np.isfinite(class_weights([0, 0], 3)).all()
    with pytest.raises(ValueError, match="classes"):
        class_weights([5], 2)
