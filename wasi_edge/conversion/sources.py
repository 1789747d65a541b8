"""Where dense weights come from: a Hugging Face folder, or a model of our own. Tensor by tensor.

`open_source` looks only at configurations and headers and imports no torch, so that a run can be
planned from what it returns; `DenseSource.read` then fetches one tensor at a time under our name for
it, joined, reshaped and widened to float32. Nothing else stays resident. A factored linear of our own
is multiplied out when read (`--method vanilla`), for which torch is imported then.

Pickled checkpoints (`pytorch_model.bin`) are refused: loading a pickle can run any code in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from wasi_edge.artefact import (
    TENSORS_NAME,
    Artefact,
    ModelConfig,
    is_artefact,
    is_hugging_face_folder,
    open_artefact,
    read_json_object,
)
from wasi_edge.errors import ArtefactError, ConversionError
from wasi_edge.models import keys_dinov2, keys_vit
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.keys_vit import Source
from wasi_edge.preprocess import Preprocessing
from wasi_edge.tensorfile import TensorFile

INDEX_NAME = "model.safetensors.index.json"
_KEY_MAPS = {module.MODEL_TYPE: module for module in (keys_dinov2, keys_vit)}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class DenseSource:
    """An open dense checkpoint under our names. Close it, or use it as a context manager.

    tensor_shapes   name -> shape of every tensor that can be read, all linears dense
    id2label        class index -> label; None without a classifier
    config          of the artefact it comes from (its ranks and epsilon); None for a foreign checkpoint
    """

    name: str
    geometry: ViTGeometry
    preprocessing: Preprocessing
    id2label: dict[int, str] | None
    tensor_shapes: dict[str, tuple[int, ...]]
    provenance: dict[str, Any]
    config: ModelConfig | None
    _fetch: Callable[[str], Array]
    _close: Callable[[], None]

    def __enter__(self) -> DenseSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._close()

    @property
    def tensor_names(self) -> list[str]:
        """Names that `read` takes, in the artefact's order."""
        return list(self.tensor_shapes)

    @property
    def num_classes(self) -> int | None:
        """Classes of the checkpoint's head, None without one."""
        return None if self.id2label is None else len(self.id2label)

    def read(self, name: str) -> Array:
        """One tensor in a fresh float32 array of `tensor_shapes[name]`.

        Raises ConversionError for an unknown name or values that are not finite.
        """
        if name not in self.tensor_shapes:
            raise ConversionError(f"{self.name}: no tensor named {name!r}")
        array = self._fetch(name)
        # The sum of float32 values in float64 is finite exactly if they all are; no boolean array needed.
        if not np.isfinite(array.sum(dtype=np.float64)):
            raise ConversionError(f"{self.name}: {name} holds values that are not finite; download it again")
        return array


def open_source(path: str | Path) -> DenseSource:
    """Open a Hugging Face folder (DINOv2 or ViT) or a model of our own as a dense checkpoint.

    Raises ConversionError for what cannot be converted, ArtefactError for damaged files.
    """
    folder = Path(path)
    if is_artefact(folder):
        return _from_artefact(open_artefact(folder))
    if is_hugging_face_folder(folder):
        return _from_hugging_face(folder)
    if folder.is_file():
        raise ConversionError(f"{folder} is a file; give the folder that holds it and its config.json")
    raise ConversionError(
        f"{folder} holds no model: expected config.json and {TENSORS_NAME}, "
        "as in a Hugging Face folder or a model made by wasi-edge"
    )


def _from_artefact(artefact: Artefact) -> DenseSource:
    config, tensors = artefact.config, artefact.tensors

    def fetch(name: str) -> Array:
        linear = name.removesuffix(".weight")
        if config.linears.get(linear) is None:
            return tensors.read(name, np.float32)
        import torch  # numpy's own BLAS would bring a second set of threads and buffers

        left = torch.from_numpy(tensors.read(f"{linear}.left", np.float32))
        return (left @ torch.from_numpy(tensors.read(f"{linear}.right", np.float32))).numpy()

    return DenseSource(
        name=config.name,
        geometry=config.geometry,
        preprocessing=config.preprocessing,
        id2label=None if config.id2label is None else dict(config.id2label),
        tensor_shapes=config.geometry.tensor_shapes({}, config.num_classes),
        provenance=dict(config.provenance),
        config=config,
        _fetch=fetch,
        _close=artefact.close,
    )


def _from_hugging_face(folder: Path) -> DenseSource:
    config = read_json_object(folder / "config.json")
    key_map = _key_map(config)
    with ExitStack() as stack:
        files = {key: file for file in _open_tensors(folder, stack) for key in file}
        geometry: ViTGeometry = key_map.geometry_from_config(config, files)
        plan: dict[str, Source] = key_map.plan_tensors(geometry, files)
        shapes = _check_shapes(geometry, plan, files)
        num_classes = shapes["head.bias"][0] if "head.bias" in shapes else None
        source = DenseSource(
            name=folder.resolve().name,
            geometry=geometry,
            preprocessing=_preprocessing(folder, config, geometry),
            id2label=None if num_classes is None else _labels(config, num_classes),
            tensor_shapes=shapes,
            provenance={
                "format": "hugging-face",
                "source": folder.resolve().name,
                "model_type": config["model_type"],
                "architectures": config.get("architectures"),
                "dtype": sorted({file.stored_dtype(key) for key, file in files.items()}),
            },
            config=None,
            _fetch=lambda name: _assemble(plan[name], shapes[name], files),
            _close=stack.pop_all().close,
        )
    return source


def _key_map(config: Mapping[str, Any]) -> ModuleType:
    model_type = config.get("model_type")
    if model_type == "dinov2_with_registers":
        raise ConversionError("DINOv2 with register tokens is not supported; use the variant without registers")
    if not isinstance(model_type, str) or model_type not in _KEY_MAPS:
        raise ConversionError(
            f"model type {model_type!r} is not supported; supported are {' and '.join(sorted(_KEY_MAPS))}"
        )
    return _KEY_MAPS[model_type]


def _open_tensors(folder: Path, stack: ExitStack) -> list[TensorFile]:
    """The folder's safetensors files, one or several shards, closed by `stack`."""
    if (folder / TENSORS_NAME).exists():
        return [stack.enter_context(TensorFile(folder / TENSORS_NAME))]
    if not (folder / INDEX_NAME).exists():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ConversionError(
                f"{folder} holds only {pickles[0]}, a pickle, which can run any code when it is loaded; "
                f"get the model's {TENSORS_NAME}, or save it with transformers' save_pretrained first"
            )
        raise ConversionError(f"{folder} holds no {TENSORS_NAME}; was it downloaded completely?")
    weight_map = read_json_object(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConversionError(f"{folder / INDEX_NAME}: weight_map should name a file for each tensor")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ConversionError(f"{folder / INDEX_NAME}: {outside[0]!r} is not a file name in the same folder")
    files = [stack.enter_context(TensorFile(folder / name)) for name in names]
    found = [key for file in files for key in file]
    if sorted(found) != sorted(weight_map):
        raise ConversionError(
            f"{folder / INDEX_NAME} names {len(weight_map)} tensors, its files hold {len(found)} or others; "
            "was everything downloaded?"
        )
    return files


def _check_shapes(
    geometry: ViTGeometry, plan: Mapping[str, Source], files: Mapping[str, TensorFile]
) -> dict[str, tuple[int, ...]]:
    """Shape of each of our tensors. Raises ConversionError where the file's do not make it."""
    num_classes = None
    if "head.bias" in plan:
        (bias,) = plan["head.bias"].keys
        num_classes = files[bias].shape(bias)[0] if files[bias].shape(bias) else 0
    shapes = geometry.tensor_shapes({}, num_classes)
    for name, shape in shapes.items():
        found = [files[key].shape(key) for key in plan[name].keys]
        parts = len(found)
        wanted: list[tuple[int, ...]]
        if name == "patch_embed.weight":
            patch = geometry.patch_size
            wanted = [(geometry.width, geometry.channels, patch, patch)]
        elif name in ("class_token", "position"):
            wanted = [(1, *((1, geometry.width) if name == "class_token" else shape))]
        else:
            wanted = [(shape[0] // parts, *shape[1:])] * parts if parts else []
        if found != wanted:
            key, actual, expected = next(
                (key, actual, expected)
                for key, actual, expected in zip(plan[name].keys, found, wanted, strict=True)
                if actual != expected
            )
            raise ConversionError(f"{key} has shape {actual}, config.json asks for {expected}")
    return shapes


def _assemble(source: Source, shape: tuple[int, ...], files: Mapping[str, TensorFile]) -> Array:
    """One tensor of ours: its parts, each read in turn into a slice of the result."""
    if len(source.keys) == 1:
        (key,) = source.keys
        return files[key].read(key, np.float32).reshape(shape)
    result = np.zeros(shape, np.float32)
    row = 0
    for key in source.keys:
        part = files[key].read(key, np.float32)
        result[row : row + len(part)] = part
        row += len(part)
    return result


def _preprocessing(folder: Path, config: Mapping[str, Any], geometry: ViTGeometry) -> Preprocessing:
    """The folder's preprocessing, or its architecture's default, at an input size the patches divide."""
    path = folder / "preprocessor_config.json"
    try:
        if path.exists():
            result = Preprocessing.from_hugging_face(read_json_object(path))
        elif config["model_type"] == "dinov2":
            result = Preprocessing()
        else:
            result = Preprocessing.plain_vit(geometry.position_grid * geometry.patch_size)
    except ArtefactError as error:
        raise ConversionError(f"{folder}: {error}") from error
    # A remainder smaller than a patch is cut off, as the convolution of transformers does.
    size = result.image_size // geometry.patch_size * geometry.patch_size
    return result if size == result.image_size else result.with_image_size(max(size, geometry.patch_size))


def _labels(config: Mapping[str, Any], num_classes: int) -> dict[int, str]:
    """Class index -> label, made unique: ImageNet has two cranes and two maillots."""
    given = config.get("id2label")
    try:
        named = {int(index): str(label) for index, label in given.items()} if isinstance(given, dict) else {}
    except ValueError:
        raise ConversionError("config.json: id2label should have class numbers as keys") from None
    labels = {index: named.get(index, f"LABEL_{index}") for index in range(num_classes)}
    counts: dict[str, int] = {}
    for label in labels.values():
        counts[label] = counts.get(label, 0) + 1
    return {index: label if counts[label] == 1 else f"{label} ({index})" for index, label in labels.items()}
