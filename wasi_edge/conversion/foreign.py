"""Foreign checkpoints under our names: which layout it is, what it says about itself, and its tensors.

a folder of Hugging Face    config.json with a model_type, safetensors whole or in shards
a folder of timm            config.json with an architecture, as on the hub
a file                      a state dict of timm or torchvision, told apart by its keys
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wasi_edge.artefact import CONFIG_NAME, read_json_object
from wasi_edge.conversion.checkpoint_files import Tensors, open_file, open_folder, shapes_of
from wasi_edge.conversion.source_preprocessing import preprocessing_of
from wasi_edge.errors import ConversionError
from wasi_edge.models import (
    keys_deit,
    keys_dinov2,
    keys_swin,
    keys_timm_swin,
    keys_timm_vit,
    keys_torchvision_swin,
    keys_torchvision_vit,
    keys_vit,
)
from wasi_edge.models.geometry_swin import Geometry
from wasi_edge.models.keys import Source
from wasi_edge.preprocessing import Preprocessing

# modules and objects that know `geometry_from_config` or `geometry_from_shapes`, and `plan_tensors`
_BY_MODEL_TYPE: dict[str, Any] = {
    **{module.MODEL_TYPE: module for module in (keys_vit, keys_deit, keys_dinov2, keys_swin)},
    keys_dinov2.MODEL_TYPE_WITH_REGISTERS: keys_dinov2,
}
# of timm, whose tensors look like a plain ViT's
_OTHER_NETWORKS = ("siglip", "so400m", "giant", "gigantic", "base_patch16_gap", "quickgelu")
_BY_KEYS: tuple[Any, ...] = (keys_timm_vit, keys_torchvision_vit, keys_timm_swin.LAYOUT, keys_torchvision_swin.LAYOUT)
Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Foreign:
    """An open checkpoint: `plan` says what makes each of our tensors, `files` where its keys are."""

    name: str
    geometry: Geometry
    preprocessing: Preprocessing
    id2label: dict[int, str] | None
    shapes: dict[str, tuple[int, ...]]
    provenance: dict[str, Any]
    plan: Mapping[str, Source]
    files: Mapping[str, Tensors]

    def fetch(self, name: str) -> Array:
        """One tensor of ours, float32; its parts are read in turn."""
        source, shape = self.plan[name], self.shapes[name]
        if source.make is not None:
            parts = [self.files[key].read(key, np.float32) for key in source.keys]
            return np.ascontiguousarray(source.make(parts), np.float32).reshape(shape)
        if len(source.keys) == 1:
            (key,) = source.keys
            return self.files[key].read(key, np.float32).reshape(shape)
        result = np.zeros(shape, np.float32)
        row = 0
        for key in source.keys:
            part = self.files[key].read(key, np.float32)
            result[row : row + len(part)] = part
            row += len(part)
        return result


def open_foreign(path: Path, stack: ExitStack) -> Foreign:
    """A folder or file of another library; its files are closed by `stack`.

    Raises ConversionError for what cannot be converted, ArtefactError for damaged files.
    """
    config: dict[str, Any] = {}
    if path.is_dir():
        config, files = read_json_object(path / CONFIG_NAME), open_folder(path, stack)
    else:
        files = open_file(path, stack)
    found = shapes_of(files)
    if "model_type" in config:
        layout, key_map = "hugging-face", _of_hugging_face(config)
        geometry = key_map.geometry_from_config(config, found)
    else:
        key_map = _by_keys(found, path)
        named = str(config.get("architecture", path.stem)).lower()
        if word := next((word for word in _OTHER_NETWORKS if word in named), None):
            raise ConversionError(f"{named} is not supported: {word} networks have other heads or activations")
        layout, geometry = key_map.NAME, key_map.geometry_from_shapes(found, _heads(config))
    plan: dict[str, Source] = key_map.plan_tensors(geometry, found)
    shapes = _checked_shapes(geometry, plan, found)
    num_classes = shapes["head.bias"][0] if "head.bias" in shapes else None
    return Foreign(
        name=path.resolve().name if path.is_dir() else path.stem,
        geometry=geometry,
        preprocessing=preprocessing_of(path, config, geometry, key_map),
        id2label=None if num_classes is None else _labels(config, num_classes),
        shapes=shapes,
        provenance={
            "format": layout,
            "source": path.resolve().name,
            **{key: config[key] for key in ("model_type", "architectures", "architecture") if key in config},
            "dtype": sorted({files[key].stored_dtype(key) for key in found}),
        },
        plan=plan,
        files=files,
    )


def _of_hugging_face(config: Mapping[str, Any]) -> Any:
    model_type = config["model_type"]
    if not isinstance(model_type, str) or model_type not in _BY_MODEL_TYPE:
        known = sorted(_BY_MODEL_TYPE)
        raise ConversionError(
            f"model type {model_type!r} is not supported; supported are {', '.join(known[:-1])} and {known[-1]}"
        )
    return _BY_MODEL_TYPE[model_type]


def _by_keys(found: Mapping[str, tuple[int, ...]], path: Path) -> Any:
    for key_map in _BY_KEYS:
        if key_map.recognises(found):
            return key_map
    if any("embeddings.patch_embeddings." in key for key in found):
        raise ConversionError(
            f"{path} is the tensor file of a Hugging Face model; give the folder that holds it and its {CONFIG_NAME}"
        )
    names = ", ".join(key_map.NAME for key_map in _BY_KEYS)
    some = ", ".join(list(found)[:3]) or "no tensors"
    raise ConversionError(f"{path} is of no layout known here ({names}); it holds {some} ...")


def _heads(config: Mapping[str, Any]) -> int | None:
    """Of a timm folder whose configuration says more than its architecture's name does."""
    more = config.get("model_args")
    heads = more.get("num_heads") if isinstance(more, dict) else None
    return heads if type(heads) is int and heads > 0 else None


def _checked_shapes(
    geometry: Geometry, plan: Mapping[str, Source], found: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shape of each of our tensors. Raises ConversionError where the checkpoint's do not make it."""
    for source in plan.values():
        for key, expected in zip(source.keys, source.stored, strict=True):
            if found[key] != expected:
                raise ConversionError(f"{key} has shape {found[key]}, expected {expected} beside the other tensors")
    num_classes = plan["head.bias"].stored[0][0] if "head.bias" in plan else None
    return geometry.tensor_shapes({}, num_classes)


def _labels(config: Mapping[str, Any], num_classes: int) -> dict[int, str]:
    """Class index -> label, made unique: ImageNet has two cranes and two maillots."""
    given = config.get("id2label")
    names = config.get("label_names")
    if given is None and isinstance(names, list):
        given = dict(enumerate(names))
    try:
        named = {int(index): str(label) for index, label in given.items()} if isinstance(given, dict) else {}
    except ValueError:
        raise ConversionError("config.json: id2label should have class numbers as keys") from None
    labels = {index: named.get(index, f"LABEL_{index}") for index in range(num_classes)}
    counts: dict[str, int] = {}
    for label in labels.values():
        counts[label] = counts.get(label, 0) + 1
    return {index: label if counts[label] == 1 else f"{label} ({index})" for index, label in labels.items()}
