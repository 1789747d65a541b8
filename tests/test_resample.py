"""Position embeddings for another input size, against the cubic convolution written out."""

from __future__ import annotations

import numpy as np
import pytest

from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.resample import resample_position

GEOMETRY = ViTGeometry(patch_size=4, width=24, depth=3, heads=3, mlp_width=48, position_grid=4, layer_scale=True)


def cubic_weights(size: int, grid: int) -> np.ndarray:
    """(size, grid): Keys' cubic convolution with a = -0.75, pixel centres aligned, edges repeated."""

    def kernel(t: float) -> float:
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    weights = np.zeros((size, grid))
    for row in range(size):
        center = (row + 0.5) * grid / size - 0.5
        for tap in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
            weights[row, min(max(tap, 0), grid - 1)] += kernel(center - tap)
    return weights


@pytest.mark.parametrize("image_size", [8, 24, 28])
def test_positions_are_resampled_bicubically_and_the_class_tokens_row_is_left_alone(image_size):
    grid, side = GEOMETRY.position_grid, image_size // GEOMETRY.patch_size
    position = np.random.default_rng(0).standard_normal((grid**2 + 1, GEOMETRY.width))
    weights = cubic_weights(side, grid)
    table = position[1:].reshape(grid, grid, -1)
    expected = np.einsum("ai,bj,ijd->abd", weights, weights, table).reshape(side * side, -1)
    actual = resample_position(position, GEOMETRY, image_size)
    assert np.array_equal(actual[0], position[0])
    np.testing.assert_allclose(actual[1:], expected, rtol=0, atol=1e-10)
