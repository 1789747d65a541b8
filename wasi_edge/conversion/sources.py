"""Where dense weights come from: a foreign checkpoint (`foreign.py`), or a model of our own. Tensor by tensor.

`open_source` looks only at configurations and headers and imports no torch (but for pickles), so that a run can be
planned from what it returns; `DenseSource.read` then fetches one tensor at a time under our name for
it, joined, reshaped and widened to float32. Nothing else stays resident. A factored linear of our own
is multiplied out when read (`--method vanilla`), for which torch is imported then.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wasi_edge.artefact import (
    CONFIG_NAME,
    TENSORS_NAME,
    Artefact,
    ModelConfig,
    is_artefact,
    is_foreign_folder,
    open_artefact,
)
from wasi_edge.errors import ConversionError
from wasi_edge.models.geometry_swin import Geometry
from wasi_edge.preprocessing import Preprocessing

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class DenseSource:
    """An open dense checkpoint under our names. Close it, or use it as a context manager.

    tensor_shapes   name -> shape of every tensor that can be read, all linears dense
    id2label        class index -> label; None without a classifier
    config          of the artefact it comes from (its ranks and epsilon); None for a foreign checkpoint
    """

    name: str
    geometry: Geometry
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
    """Open a checkpoint of another library (`foreign.py`) or a model of our own as a dense checkpoint.

    Raises ConversionError for what cannot be converted, ArtefactError for damaged files.
    """
    path = Path(path)
    if is_artefact(path):
        return _from_artefact(open_artefact(path))
    if is_foreign_folder(path) or path.is_file():
        return _from_foreign(path)
    raise ConversionError(
        f"{path} holds no model: expected {CONFIG_NAME} and {TENSORS_NAME}, "
        "as in a folder of Hugging Face or timm, or a model made by wasi-edge"
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


def _from_foreign(path: Path) -> DenseSource:
    from wasi_edge.conversion.foreign import open_foreign

    with ExitStack() as stack:
        foreign = open_foreign(path, stack)
        return DenseSource(
            name=foreign.name,
            geometry=foreign.geometry,
            preprocessing=foreign.preprocessing,
            id2label=foreign.id2label,
            tensor_shapes=foreign.shapes,
            provenance=foreign.provenance,
            config=None,
            _fetch=foreign.fetch,
            _close=stack.pop_all().close,
        )
