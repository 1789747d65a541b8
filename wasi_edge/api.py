"""The commands for programs: a model that predicts, is evaluated and exported.

import wasi_edge

model = wasi_edge.load("wasi-run-1")
for photo in model.predict("holiday/"):
    print(photo["path"], photo.get("label"), photo.get("probability"))
print(model.evaluate("sorted/")["accuracy"])
model.export("model.onnx")
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wasi_edge.errors import UsageError
from wasi_edge.inference.classifier import Backend, Classifier, open_classifier
from wasi_edge.models.locate import resolve_classifier

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


class Model:
    """A model that is loaded once and asked often. `labels`: by class index."""

    def __init__(self, name: str | os.PathLike[str], backend: str = "auto", threads: int | None = None) -> None:
        """As `wasi_edge.load`."""
        self._path, self._threads = resolve_classifier(os.fspath(name)), threads
        try:
            chosen = Backend(backend)
        except ValueError:
            raise UsageError(f"backend should be one of {', '.join(Backend)}, found {backend!r}") from None
        self._classifier: Classifier = open_classifier(self._path, chosen, threads)

    @property
    def labels(self) -> list[str]:
        """By class index."""
        return list(self._classifier.labels)

    def predict(self, paths: Paths, top_k: int = 3, threshold: float = 0.0) -> list[dict[str, Any]]:
        """What photos show, in order: `path`, `label`, `probability` and `top` [[label, p], ...] of each, or `path` and
        `error`. A path is a photo, a folder or a pattern; a label less likely than `threshold` is 'unsure'."""
        return list(self.stream(paths, top_k, threshold))

    def stream(self, paths: Paths, top_k: int = 3, threshold: float = 0.0) -> Iterator[dict[str, Any]]:
        """The same, a few at a time: memory does not grow with their number. UsageError for a `top_k` below 1."""
        from wasi_edge.inference.predict import iter_photos, predict_paths

        if top_k < 1:
            raise UsageError(f"top_k should be at least 1, found {top_k}")

        single = isinstance(paths, str | os.PathLike)
        words = [os.fspath(paths)] if single else [os.fspath(path) for path in paths]  # type: ignore[arg-type, union-attr]
        return predict_paths(
            self._classifier, iter_photos(words), min(top_k, len(self._classifier.labels)), threshold=threshold
        )

    def evaluate(self, photos: str | os.PathLike[str]) -> dict[str, Any]:
        """Scores on a folder of sorted photos: what `evaluate --json` prints. Raises NoUsableData without any."""
        from wasi_edge.inference.evaluate import evaluate_folder

        return evaluate_folder(self._classifier, Path(photos))

    def export(
        self,
        out: str | os.PathLike[str],
        int8: bool = False,
        max_drop: float = 0.01,
        with_preprocessing: bool = False,
        photos: str | os.PathLike[str] | None = None,
    ) -> dict[str, Any]:
        """One ONNX file; returns what `export --json` prints. Raises ArtefactError, and leaves no file, where it does
        not answer as the model does."""
        from wasi_edge.export.run import export
        from wasi_edge.memory.malloc import count_threads

        moved = None if photos is None else Path(photos)
        threads = count_threads(self._threads)
        return export(self._path, Path(out), threads, int8, max_drop, with_preprocessing, moved)
