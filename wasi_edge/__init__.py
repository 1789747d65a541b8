"""wasi-edge: fine-tune vision transformers on a Raspberry Pi, inside a memory budget."""

from __future__ import annotations

TYPE_CHECKING = False  # for type checkers alone: importing this package imports nothing
if TYPE_CHECKING:
    import os

    from wasi_edge.api import Model

__version__ = "0.1.0"


def load(model: str | os.PathLike[str], backend: str = "auto", threads: int | None = None) -> Model:
    """A run, a model folder or an exported file, ready to predict; see `wasi_edge.api`.

    `backend`: 'auto', 'onnx' or 'torch'. Raises ArtefactError where there is no such model or it is damaged, UsageError
    for a backend that is not there.
    """
    from wasi_edge.api import Model

    return Model(model, backend, threads)
