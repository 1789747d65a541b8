"""Position tables at another input size: bicubic without antialiasing, as Hugging Face's ViT, DINOv2 and Swin do. No
torch: training, conversion and export share it.
"""

from __future__ import annotations

import numpy as np

from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.geometry_swin import Geometry, SwinGeometry

# of the cubic kernel (Keys 1981), the value of torch and OpenCV; Pillow's is -0.5
_CUBIC = -0.75


def resampled(name: str, value: np.ndarray, geometry: Geometry, image_size: int) -> np.ndarray:
    """The stored tensor `name` as a network at `image_size` holds it: position tables resampled, others as they are."""
    if isinstance(geometry, SwinGeometry):
        return resample_bias(value, geometry.window_at(image_size)) if name.endswith("bias_table") else value
    return resample_position(value, geometry, image_size) if name == "position" else value


def resample_position(position: np.ndarray, geometry: ViTGeometry, image_size: int) -> np.ndarray:
    """(g * g [+1], D) -> (N - R, D) at `image_size`, R registers having none; returned as it is where the grid already
    fits. The class token's row is left alone."""
    side, grid = geometry.grid(image_size), geometry.position_grid
    if side == grid:
        return position
    first = int(geometry.class_token)
    patches = _bicubic(position[first:].reshape(grid, grid, -1), side)
    return np.concatenate((position[:first], patches.reshape(side * side, -1)))


def resample_bias(table: np.ndarray, window: int) -> np.ndarray:
    """((2 v - 1)^2, H) -> ((2 w - 1)^2, H); returned as it is where the windows agree."""
    side, wanted = round(len(table) ** 0.5), 2 * window - 1
    if side == wanted:
        return table
    return _bicubic(table.reshape(side, side, -1), wanted).reshape(wanted * wanted, -1)


def _bicubic(image: np.ndarray, side: int) -> np.ndarray:
    """(v, v, C) -> (side, side, C) in the same dtype."""
    weights = _weights(image.shape[0], side)
    rows = np.tensordot(weights, image.astype(np.float64), 1)
    return np.ascontiguousarray(np.tensordot(weights, rows, (1, 1)).swapaxes(0, 1).astype(image.dtype))


def _weights(old: int, new: int) -> np.ndarray:
    """Of each old value in each new one, (new, old); beyond the edge the outermost values go on."""
    weights = np.zeros((new, old))
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    left = np.floor(centre).astype(int)
    for step in (-1, 0, 1, 2):
        np.add.at(weights, (np.arange(new), np.clip(left + step, 0, old - 1)), _kernel(np.abs(centre - left - step)))
    return weights


def _kernel(distance: np.ndarray) -> np.ndarray:
    """The cubic's weight of a value so far away."""
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    far = _CUBIC * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
