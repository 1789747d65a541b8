"""Random views of cached photos, the order of an epoch, and class weights: all of them without any state.

Every random choice is a function of (seed, epoch, photo) through a counter-based generator (Philox). A
resumed run, other threads or another batch size therefore see the same pixels, and nothing has to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

SCALE_RANGE = (0.35, 1.0)
RATIO_RANGE = (3 / 4, 4 / 3)
WEIGHT_CAP = (0.2, 5.0)
_TRIES = 10
# Separate uses of one seed must not share draws.
_VIEW, _ORDER = 1, 2


def _generator(seed: int, use: int, epoch: int, photo: int = 0) -> np.random.Generator:
    # Word 0 of the counter counts the draws; the key and the other words name the stream.
    counter = np.array([0, photo, epoch, use], dtype=np.uint64)
    key = np.array([seed % 2**64, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def augment(
    shrunk: np.ndarray,
    image_size: int,
    seed: int,
    epoch: int,
    photo: int,
    scale: tuple[float, float] = SCALE_RANGE,
    ratio: tuple[float, float] = RATIO_RANGE,
) -> np.ndarray:
    """A training view of a shrunk photo: uint8 (h, w, 3) -> (S, S, 3), C-contiguous.

    A random part of the area (`scale`) at a random width : height (`ratio`), resized to `image_size` pixels
    (bicubic, antialiased), mirrored half the time. `photo` is the photo's index in the cache.
    """
    rng = _generator(seed, _VIEW, epoch, photo)
    box = _random_box(rng, shrunk.shape[1], shrunk.shape[0], scale, ratio)
    mirrored = rng.random() < 0.5
    # `box` makes Pillow read and resize the crop alone, at fractions of a pixel.
    view = np.asarray(Image.fromarray(shrunk).resize((image_size, image_size), Image.Resampling.BICUBIC, box=box))
    return np.array(view[:, ::-1] if mirrored else view, dtype=np.uint8, order="C")


def _random_box(
    rng: np.random.Generator,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a crop, pixels."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        crop_width, crop_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if crop_width <= width and crop_height <= height:
            left, top = (width - crop_width) * rng.random(), (height - crop_height) * rng.random()
            return left, top, min(width, left + crop_width), min(height, top + crop_height)
    # A long photo has no such part: take the largest middle piece of a permitted shape.
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width, crop_height = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return left, top, min(width, left + crop_width), min(height, top + crop_height)


def epoch_order(num_photos: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits its photos: a permutation, int64 (num_photos,)."""
    return _generator(seed, _ORDER, epoch).permutation(num_photos)


def class_weights(labels: Sequence[int], num_classes: int) -> np.ndarray:
    """Loss weight of each class against imbalance: float64 (num_classes,).

    n / (C * n_c) cut to `WEIGHT_CAP`, then scaled so that the mean over the training photos is 1
    (the learning rate keeps its meaning). `labels` are class indices; a class without photos
    weighs 1 before scaling.
    """
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_classes).astype(np.float64)
    if len(counts) != num_classes:
        raise ValueError(f"labels run to {len(counts) - 1}, but there are {num_classes} classes")
    total = counts.sum()
    if total == 0:
        return np.ones(num_classes)
    weights = np.clip(total / (num_classes * np.maximum(counts, 1)), *WEIGHT_CAP)
    weights[counts == 0] = 1.0
    return weights * (total / (weights @ counts))
