"""How the source of a checkpoint prepares photos: from its own files, or what is known of its layout.

Hugging Face    preprocessor_config.json, else the default of the architecture
timm folder     pretrained_cfg in config.json
state dicts     nothing is said, so what the library's usual weights of the layout were trained with
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wasi_edge.artefact import read_json_object
from wasi_edge.errors import ArtefactError, ConversionError
from wasi_edge.models.geometry_swin import Geometry, SwinGeometry
from wasi_edge.preprocessing import Preprocessing

PREPROCESSOR_NAME = "preprocessor_config.json"
_HALF = (0.5, 0.5, 0.5)


def preprocessing_of(path: Path, config: Mapping[str, Any], geometry: Geometry, key_map: Any) -> Preprocessing:
    """For the model at `path`, at an input size that its patches divide. Raises ConversionError."""
    try:
        result = _stated(path, config) or _usual(path, config, geometry, key_map)
    except ArtefactError as error:
        raise ConversionError(f"{path}: {error}") from error
    if isinstance(geometry, SwinGeometry):
        return result
    # A remainder smaller than a patch is cut off, as the convolution of the patch embedding does.
    size = result.image_size // geometry.patch_size * geometry.patch_size
    return result if size == result.image_size else result.with_image_size(max(size, geometry.patch_size))


def _stated(path: Path, config: Mapping[str, Any]) -> Preprocessing | None:
    if path.is_dir() and (path / PREPROCESSOR_NAME).exists():
        return Preprocessing.from_hugging_face(read_json_object(path / PREPROCESSOR_NAME))
    trained = config.get("pretrained_cfg")
    return Preprocessing.from_timm(trained) if isinstance(trained, dict) else None


def _usual(path: Path, config: Mapping[str, Any], geometry: Geometry, key_map: Any) -> Preprocessing:
    if isinstance(geometry, SwinGeometry):
        # 7 tokens of 32 pixels; torchvision's V1 weights shrink to 232
        size = config.get("image_size", 32 * geometry.window)
        if "model_type" in config:
            return Preprocessing(image_size=size, crop_fraction=1.0, squash=True)
        if key_map.NAME.startswith("timm"):
            return Preprocessing.from_timm({"input_size": [3, size, size], "crop_pct": 0.9})
        return Preprocessing(image_size=size, crop_fraction=size / round(size * 232 / 224), even_offset=True)
    size = geometry.position_grid * geometry.patch_size
    if "model_type" in config:
        return Preprocessing() if geometry.layer_scale else Preprocessing.plain_vit(size)
    if key_map.NAME.startswith("torchvision"):
        return Preprocessing(image_size=size, interpolation="bilinear", even_offset=True)
    usual = Preprocessing.from_timm({"input_size": [3, size, size], "crop_pct": 1.0 if geometry.layer_scale else 0.9})
    if geometry.layer_scale or geometry.features == "class+distillation" or "deit" in path.name.lower():
        return usual  # of DINOv2 and DeiT
    return replace(usual, mean=_HALF, std=_HALF)
