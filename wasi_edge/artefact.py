"""A model on disk: `model.safetensors` and `config.json`, schema 1. No torch.

The two files are all that training, prediction and export need. `config.json` says what the tensors
mean (geometry, the rank of every linear, preprocessing, labels) and where they come from; the names
and shapes it implies are compared with the file before anything is read, so that a damaged or mixed
up folder is refused in one sentence and not met in the middle of a run.

Writing puts the tensors down first and `config.json` last, each atomically. Where an older model in
the folder is replaced by one whose tensors mean something else, its `config.json` goes first: a
power cut in between leaves a folder without a model, never old labels on new weights.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wasi_edge.atomic import sweep_orphans, write_json_atomic
from wasi_edge.errors import ArtefactError
from wasi_edge.models.geometry_swin import Geometry, geometry_from_dict
from wasi_edge.preprocessing import Preprocessing
from wasi_edge.tensorfile import TensorFile, TensorWriter

SCHEMA_VERSION = 1
TENSORS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
DTYPES = ("float32", "float16")
_CONFIG_LIMIT_BYTES = 10 * 2**20
_FINGERPRINT_BYTES = 1024
_MEANING = ("architecture", "geometry", "linears", "dtype", "preprocessing", "id2label")
_FOREIGN = ("model_type", "architectures", "architecture")
_REQUIRED = ("name", "architecture", "geometry", "linears", "dtype", "preprocessing")


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model but its tensors.

    linears         name of each linear -> rank K of its factors, or None where it is dense
    epsilon         share of the squared singular values kept at conversion, None for a dense model
    dtype           'float32' or 'float16': how the tensors are stored
    id2label        class index -> label, indices 0, 1, ... without gaps; None without a classifier
    provenance      where the weights come from (free-form JSON)
    training        how they were trained (free-form JSON), None if they were not

    Raises ArtefactError where the values contradict each other.
    """

    name: str
    geometry: Geometry
    linears: Mapping[str, int | None]
    preprocessing: Preprocessing
    epsilon: float | None = None
    dtype: str = "float32"
    id2label: Mapping[int, str] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ArtefactError(f"config: dtype should be {' or '.join(DTYPES)}, found {self.dtype!r}")
        if self.epsilon is not None and not 0 < self.epsilon <= 1:
            raise ArtefactError(f"config: epsilon should be above 0 and at most 1, found {self.epsilon!r}")
        if missing := [name for name in self.geometry.linear_shapes() if name not in self.linears]:
            raise ArtefactError(f"config: no rank is given for {_few(missing)}")
        if self.id2label is not None:
            _check_labels(self.id2label)
        self.tensor_shapes()  # refuses unknown linears and impossible ranks

    @property
    def architecture(self) -> str:
        """'vit' or 'swin'."""
        return self.geometry.architecture

    @property
    def has_factors(self) -> bool:
        """Whether any linear is in factors."""
        return any(rank is not None for rank in self.linears.values())

    @property
    def num_classes(self) -> int | None:
        """Classes of the head, None without one."""
        return None if self.id2label is None else len(self.id2label)

    @property
    def labels(self) -> list[str]:
        """Labels by class index; empty without a classifier."""
        return [] if self.id2label is None else [self.id2label[index] for index in range(len(self.id2label))]

    @property
    def label2id(self) -> dict[str, int] | None:
        """Label -> class index, None without a classifier."""
        return None if self.id2label is None else {label: index for index, label in enumerate(self.labels)}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the model, in the order it is written."""
        return self.geometry.tensor_shapes(self.linears, self.num_classes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the content of `config.json`."""
        labels = None if self.id2label is None else dict(enumerate(self.labels))
        return {
            "schema_version": self.schema_version,
            "name": self.name,
            "architecture": self.architecture,
            "geometry": self.geometry.to_dict(),
            "linears": {
                name: {"kind": "dense"} if rank is None else {"kind": "factored", "rank": rank}
                for name, rank in self.linears.items()
            },
            "epsilon": self.epsilon,
            "dtype": self.dtype,
            "preprocessing": self.preprocessing.to_dict(),
            "id2label": None if labels is None else {str(index): label for index, label in labels.items()},
            "label2id": self.label2id,
            "provenance": dict(self.provenance),
            "training": None if self.training is None else dict(self.training),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; `label2id` is derived and not read.

        Raises ArtefactError for another schema, missing keys or values that contradict each other.
        """
        _check_schema(values)
        if missing := [key for key in _REQUIRED if key not in values]:
            raise ArtefactError(f"config: {', '.join(missing)} missing")
        epsilon = values.get("epsilon")
        if epsilon is not None and type(epsilon) not in (int, float):
            raise ArtefactError(f"config: epsilon should be a number or null, found {epsilon!r}")
        if not isinstance(values["name"], str):
            raise ArtefactError(f"config: name should be text, found {values['name']!r}")
        training = values.get("training")
        return cls(
            name=values["name"],
            geometry=geometry_from_dict(values["architecture"], values["geometry"]),
            linears={name: _parse_rank(name, linear) for name, linear in _object(values, "linears").items()},
            preprocessing=Preprocessing.from_dict(_object(values, "preprocessing")),
            epsilon=epsilon,
            dtype=values["dtype"],
            id2label=_parse_labels(values.get("id2label")),
            provenance=dict(_object(values, "provenance")) if values.get("provenance") else {},
            training=None if training is None else dict(_object(values, "training")),
            schema_version=values["schema_version"],
        )


@dataclass(frozen=True)
class Artefact:
    """An open model folder, checked. Close it, or use it as a context manager."""

    config: ModelConfig
    tensors: TensorFile
    folder: Path

    def __enter__(self) -> Artefact:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the tensor file."""
        self.tensors.close()


def fingerprint(artefact: Artefact) -> str:
    """A short text that changes with the weights, how they are stored and what they mean, and not with the place.

    Training moves every tensor, so the first values of each tell: reading all of them would take seconds on a Pi.
    """
    import hashlib

    config = artefact.config.to_dict()
    digest = hashlib.sha256(json.dumps({key: config[key] for key in _MEANING}, sort_keys=True).encode())
    for name in sorted(artefact.tensors):
        shape = artefact.tensors.shape(name)
        row_bytes = math.prod(shape[1:]) * artefact.tensors.dtype(name).itemsize
        rows = min(shape[0], 1 + _FINGERPRINT_BYTES // max(1, row_bytes)) if shape else 0
        digest.update(name.encode() + artefact.tensors.read_rows(name, 0, rows).tobytes()[:_FINGERPRINT_BYTES])
    return digest.hexdigest()[:32]


def is_artefact(folder: str | Path) -> bool:
    """Whether `folder` holds a model written here (not whether it is intact)."""
    return "schema_version" in _peek(Path(folder))


def is_foreign_folder(folder: str | Path) -> bool:
    """Whether `folder` holds a model of Hugging Face or timm (not whether it is one we can convert)."""
    config = _peek(Path(folder))
    return "schema_version" not in config and any(key in config for key in _FOREIGN)


def read_config(folder: str | Path) -> ModelConfig:
    """The configuration of a model folder, without opening its tensors.

    Raises ArtefactError if there is none, or it is damaged, foreign or of a newer schema.
    """
    path = Path(folder) / CONFIG_NAME
    values = read_json_object(path)
    if "schema_version" not in values and any(key in values for key in _FOREIGN):
        raise ArtefactError(
            f"{folder} is a folder of another library; make a model of it first: wasi-edge convert {folder} OUT"
        )
    try:
        return ModelConfig.from_dict(values)
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error}") from error


def open_artefact(folder: str | Path) -> Artefact:
    """Open a model folder and check that its tensors are those its configuration describes.

    Raises ArtefactError, listing what is missing, superfluous or of another shape or dtype.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = TensorFile(folder / TENSORS_NAME)
    try:
        _check_tensors(config, {name: tensors.shape(name) for name in tensors}, tensors.path)
        # Small tensors may be stored wider than the weights, never narrower.
        allowed = {"float32": {"F32"}, "float16": {"F16", "F32"}}[config.dtype]
        if wrong := [name for name in tensors if tensors.stored_dtype(name) not in allowed]:
            raise ArtefactError(f"{tensors.path}: expected {config.dtype} tensors, not so are {_few(wrong)}")
    except BaseException:
        tensors.close()
        raise
    return Artefact(config, tensors, folder)


@contextmanager
def write_artefact(folder: str | Path, config: ModelConfig) -> Iterator[TensorWriter]:
    """Write a model folder: add every tensor of `config.tensor_shapes()` to the writer, in any order.

        with write_artefact(folder, config) as writer:
            writer.add("norm.weight", array)

    The folder is made if need be; its model is replaced only when the block ends well. Raises
    ArtefactError if the tensors added are not those of the configuration.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtefactError(f"{folder}: cannot be made ({error.strerror}); choose a folder you may write to") from error
    sweep_orphans(folder)
    values = config.to_dict()
    config_path = folder / CONFIG_NAME
    try:
        with TensorWriter(folder / TENSORS_NAME, {"format": "wasi-edge"}) as writer:
            yield writer
            _check_tensors(config, writer.shapes, writer.path)
            previous = _peek(folder)
            # Compared as JSON values, for a tuple in memory is a list on disk.
            meaning = json.loads(json.dumps({key: values[key] for key in _MEANING}))
            if any(previous.get(key) != meaning[key] for key in _MEANING):
                config_path.unlink(missing_ok=True)
        write_json_atomic(config_path, values)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # not empty: something else is there
                folder.rmdir()
        raise


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 10 MiB. Raises ArtefactError saying what is wrong with it."""
    try:
        size = path.stat().st_size
        if size > _CONFIG_LIMIT_BYTES:
            raise ArtefactError(f"{path}: {size} bytes is no configuration; expected at most 10 MiB of JSON")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"{path} does not exist; expected a model folder") from error
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path}: not valid JSON ({str(error).splitlines()[0][:120]})") from error
    if not isinstance(values, dict):
        raise ArtefactError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    return values


def _peek(folder: Path) -> Mapping[str, Any]:
    try:
        return read_json_object(folder / CONFIG_NAME)
    except ArtefactError:
        return MappingProxyType({})


def _check_schema(values: Mapping[str, Any]) -> None:
    version = values.get("schema_version")
    if type(version) is not int or version < 1:
        raise ArtefactError(f"config: schema_version should be a number from 1, found {version!r}")
    if version > SCHEMA_VERSION:
        raise ArtefactError(
            f"config: written by a newer wasi-edge (schema {version}, this one reads up to "
            f"{SCHEMA_VERSION}); upgrade wasi-edge"
        )


def _check_tensors(config: ModelConfig, found: Mapping[str, tuple[int, ...]], path: Path) -> None:
    expected = config.tensor_shapes()
    if missing := [name for name in expected if name not in found]:
        raise ArtefactError(f"{path}: tensors missing: {_few(missing)}")
    if unknown := [name for name in found if name not in expected]:
        raise ArtefactError(f"{path}: tensors its configuration does not know: {_few(unknown)}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ArtefactError(
                f"{path}: {name} has shape {found[name]}, its configuration says {shape}; "
                f"do {CONFIG_NAME} and {TENSORS_NAME} come from the same run?"
            )


def _object(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values[key]
    if not isinstance(value, Mapping):
        raise ArtefactError(f"config: {key} should be a JSON object, found {value!r}")
    return value


def _parse_rank(name: str, linear: Any) -> int | None:
    if linear == {"kind": "dense"}:
        return None
    if isinstance(linear, Mapping) and linear.get("kind") == "factored" and set(linear) == {"kind", "rank"}:
        rank = linear["rank"]
        if type(rank) is int:
            return rank
    raise ArtefactError(
        f'config: {name} should be {{"kind": "dense"}} or {{"kind": "factored", "rank": K}}, found {linear!r}'
    )


def _parse_labels(values: Any) -> dict[int, str] | None:
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise ArtefactError(f"config: id2label should be a JSON object, found {values!r}")
    try:
        return {int(index): label for index, label in values.items()}
    except ValueError:
        raise ArtefactError("config: id2label should have class numbers as keys") from None


def _check_labels(id2label: Mapping[int, str]) -> None:
    if not id2label or sorted(id2label) != list(range(len(id2label))):
        raise ArtefactError("config: id2label should number the classes 0, 1, 2, ... without gaps")
    labels = list(id2label.values())
    if not all(isinstance(label, str) for label in labels) or len(set(labels)) != len(labels):
        raise ArtefactError("config: the labels in id2label should be text and differ from each other")


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
