"""Files of foreign checkpoints, opened as tensors by key: safetensors, whole or in shards, and pickles.

Safetensors are read without torch. A pickle can run any code when it is loaded; torch's restricted loader has had
ways around its restriction up to 2.9 (CVE-2025-32434, CVE-2026-24747), so it is taken from 2.10 on, and never falls
back to loading freely. Pickles of torch 1.6 and later are mapped, and their pages leave as tensors are read.
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from wasi_edge.artefact import TENSORS_NAME, read_json_object
from wasi_edge.errors import ArtefactError, ConversionError
from wasi_edge.memory.pages import drop_pages
from wasi_edge.tensorfile import TensorFile

INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".tar")
_OLDEST_TORCH = (2, 10)
# what training scripts wrap a state dict in
_WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state", "module")
Array = np.ndarray[Any, Any]


class Tensors(Protocol):
    """An open file of tensors: iterate over its keys."""

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""

    def stored_dtype(self, name: str) -> str:
        """The dtype on disk, in safetensors' words."""

    def read(self, name: str, dtype: DTypeLike | None = None) -> Array:
        """One tensor in a fresh array."""


class PickledTensors:
    """A state dict in a pickle of torch. Raises ConversionError for anything else, and for an old torch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        loaded, self._is_mapped = _load(path)
        self._tensors: dict[str, Any] = {}
        for key, value in _state_dict(loaded, path).items():
            name = key.removeprefix("module.")
            if name in self._tensors:
                raise ConversionError(f"{path} holds the same tensor twice: {key} and {name}")
            self._tensors[name] = _plain(value, key, path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._tensors[name].shape)

    def stored_dtype(self, name: str) -> str:
        """The dtype on disk, in safetensors' words."""
        dtype = str(self._tensors[name].dtype).removeprefix("torch.")
        return {"bfloat16": "BF16"}.get(dtype, dtype.replace("float", "F").replace("uint", "U").replace("int", "I"))

    def read(self, name: str, dtype: DTypeLike | None = None) -> Array:
        """One tensor in a fresh float32 array, of floating-point numbers only."""
        tensor = self._tensors[name]
        if not tensor.is_floating_point():
            raise ConversionError(f"{self._path}: {name} holds {tensor.dtype} numbers; expected floating-point ones")
        result = tensor.float().numpy().astype(np.float32, order="C", copy=True)
        # what is mapped and was written by nobody is what the file holds; of a file read as a whole nothing may go
        if self._is_mapped and tensor.is_contiguous():
            drop_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
        return result


def open_folder(folder: Path, stack: ExitStack) -> dict[str, Tensors]:
    """Key -> the file of `folder` that holds it, safetensors if there are any; closed by `stack`.

    Raises ConversionError where nothing usable is there.
    """
    if (folder / TENSORS_NAME).exists():
        return open_file(folder / TENSORS_NAME, stack)
    if (folder / INDEX_NAME).exists():
        return _open_shards(folder, stack)
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if len(pickles) == 1:
        return open_file(pickles[0], stack)
    if pickles:
        raise ConversionError(f"{folder} holds several pickles and no {TENSORS_NAME}; name one of them")
    raise ConversionError(f"{folder} holds no {TENSORS_NAME}; was it downloaded completely?")


def open_file(path: Path, stack: ExitStack) -> dict[str, Tensors]:
    """Key -> the one file, by its ending. Raises ConversionError or ArtefactError for what cannot be read."""
    tensors: Tensors
    if path.suffix == ".safetensors":
        tensors = stack.enter_context(TensorFile(path))
    elif path.suffix in PICKLE_SUFFIXES:
        tensors = PickledTensors(path)
    else:
        endings = ", ".join((".safetensors", *PICKLE_SUFFIXES))
        raise ConversionError(f"{path} is no checkpoint by its name; expected one that ends in {endings}")
    return dict.fromkeys(tensors, tensors)


def shapes_of(files: Mapping[str, Tensors]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of floating-point numbers; others (buffers of indices) are no weights."""
    found = {}
    for key, file in files.items():
        code = file.stored_dtype(key)
        if code in ("F16", "F32", "F64", "BF16"):
            found[key] = file.shape(key)
        elif not re.search(r"relative_position_index$|num_batches_tracked$", key):
            raise ConversionError(f"{key} holds {code} numbers; expected 16- to 64-bit floating-point ones")
    return found


def _open_shards(folder: Path, stack: ExitStack) -> dict[str, Tensors]:
    weight_map = read_json_object(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConversionError(f"{folder / INDEX_NAME}: weight_map should name a file for each tensor")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ConversionError(f"{folder / INDEX_NAME}: {outside[0]!r} is not a file name in the same folder")
    if absent := [name for name in names if not (folder / name).exists()]:
        raise ConversionError(f"{folder}: {absent[0]}, which {INDEX_NAME} names, is missing; download it again")
    files = [stack.enter_context(TensorFile(folder / name)) for name in names]
    found = [key for file in files for key in file]
    if sorted(found) != sorted(weight_map):
        raise ConversionError(
            f"{folder / INDEX_NAME} names {len(weight_map)} tensors, its files hold {len(found)} or others; "
            "was everything downloaded?"
        )
    return {key: file for file in files for key in file}


def _load(path: Path) -> tuple[Any, bool]:
    """What the pickle holds, and whether its tensors are mapped from the file."""
    import pickle

    import torch

    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _OLDEST_TORCH:
        raise ConversionError(
            f"{path.name} is a pickle, which torch {torch.__version__} cannot load safely (CVE-2026-24747 lets it run "
            "code); install torch 2.10 or newer, or get the model as .safetensors"
        )
    try:
        try:
            # numbers of the other byte order are turned in place: not what the file holds any more
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True), _is_native(path)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True), False  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} asks to run code, holds more than tensors or is damaged, and is refused; "
            "save its state dict alone, best as .safetensors"
        ) from error
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error.strerror or 'damaged'})") from error
    except Exception as error:  # damaged archives raise nearly anything
        raise ArtefactError(f"{path}: no checkpoint of torch ({_first_line(error)})") from error


def _is_native(path: Path) -> bool:
    """Whether the archive says that its numbers are in this machine's byte order (older ones say nothing)."""
    try:
        with zipfile.ZipFile(path) as archive:
            orders = [name for name in archive.namelist() if name.endswith("/byteorder")]
            return bool(orders) and archive.read(orders[0]).decode() == sys.byteorder
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _state_dict(loaded: Any, path: Path) -> dict[str, Any]:
    import torch

    for _ in range(2):
        if not isinstance(loaded, dict):
            break
        if loaded and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()):
            return loaded
        wrapped = [loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), dict)]
        if not wrapped:
            break
        loaded = wrapped[0]
    raise ConversionError(f"{path} holds no state dict (names and tensors, perhaps under {', '.join(_WRAPPERS[:3])})")


def _plain(value: Any, key: str, path: Path) -> Any:
    """A tensor with as many numbers in its storage as its shape says. Raises ConversionError for any other: sizes that
    the storage does not have would let a small file ask for terabytes, and drop pages that belong to others."""
    import torch

    is_usual = value.layout is torch.strided and value.device.type == "cpu"
    if is_usual:
        value = value.detach()
        size, storage = value.element_size(), value.untyped_storage().nbytes()
        if (value.storage_offset() + value.numel()) * size <= storage:
            return value
    raise ConversionError(f"{path}: {key} is no plain tensor with numbers of its own; save the state dict again")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
