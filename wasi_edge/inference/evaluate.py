"""A model on a folder of photos whose classes are known. No torch.

The folder is read as training reads it. Where it has a train and a val part, only val counts: the model has
seen the rest. A photo of a class that the model does not know cannot be right or wrong; it is listed, not
counted.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wasi_edge.data.folder import Photo, SkippedFile, scan_folder
from wasi_edge.errors import NoUsableData, UnreadablePhoto
from wasi_edge.inference.classifier import Classifier
from wasi_edge.inference.predict import classified
from wasi_edge.metrics import confusion_matrix, scores

_WRONG_KEPT, _RIGHT_KEPT, _RIGHT_SHOWN, _MOST_LISTED = 12, 2, 12, 10
OnProgress = Callable[[int, int], None]


class Answer(NamedTuple):
    """What the model said of a photo, and how sure it was."""

    path: Path
    true: str
    predicted: str
    probability: float


class Gallery:
    """The surest mistakes, and a few right answers of every class: as many as a page shows, however many pass by."""

    def __init__(self) -> None:
        self.wrong: list[Answer] = []  # surest first
        self._right: dict[str, list[Answer]] = {}

    def note(self, answer: Answer) -> None:
        """One photo passes by."""
        if answer.true != answer.predicted:
            bisect.insort(self.wrong, answer, key=lambda other: -other.probability)
            del self.wrong[_WRONG_KEPT:]
        elif len(kept := self._right.setdefault(answer.true, [])) < _RIGHT_KEPT:
            kept.append(answer)

    @property
    def answers(self) -> list[Answer]:
        """Those to show: the mistakes, and right ones of every class in turn."""
        turns = itertools.zip_longest(*self._right.values())
        right = [answer for turn in turns for answer in turn if answer is not None]
        return [*self.wrong, *right[:_RIGHT_SHOWN]]


def evaluate_folder(
    classifier: Classifier,
    photos_root: str | Path,
    on_progress: OnProgress | None = None,
    on_message: Callable[[str], None] | None = None,
    gallery: Gallery | None = None,
    trained_on: Collection[Path] = (),
) -> dict[str, Any]:
    """Scores as in `metrics.scores`; `most_confused` (true, predicted, count), `most_wrong` (path, true, predicted,
    probability) with the surest mistake first, and `skipped_files` (path, reason). `gallery` notes photos to show.
    `num_trained_on` counts those of `trained_on` (absolute paths), which flatter the figures.

    `on_progress(done, all)` counts photos. Raises NoUsableData where no photo belongs to a class the model
    knows.
    """
    say, gallery = on_message or (lambda text: None), gallery or Gallery()
    folder = scan_folder(
        photos_root, min_classes=1, min_photos_per_class=0, min_side=classifier.preprocessing.resize_side
    )
    skipped = list(folder.skipped)
    photos = list(folder.photos)
    if any(photo.part == "val" for photo in photos):
        trained = sum(photo.part != "val" for photo in photos)
        photos = [photo for photo in photos if photo.part == "val"]
        say(f"evaluating the {len(photos)} validation photos of {photos_root}; the {trained} for training are left out")
    photos, unknown = _of_known_classes(photos, classifier.labels, Path(photos_root))
    skipped += unknown
    if unknown:
        say(f"{len(unknown)} photos are left out: the model does not know their class")
    seen = sum(Path(os.path.abspath(photo.path)) in trained_on for photo in photos)
    if seen:
        say(f"{seen} of the {len(photos)} photos were trained on: the figures are better than new photos would give")
    number = {label: index for index, label in enumerate(classifier.labels)}
    confusion = np.zeros((len(number), len(number)), dtype=np.int64)
    results = classified(classifier, [photo.path for photo in photos])
    for done, (photo, (_, row)) in enumerate(zip(photos, results, strict=True), start=1):
        if isinstance(row, UnreadablePhoto):
            skipped.append(_skip(photo.path, Path(photos_root), str(row)))
        else:
            predicted = int(row.argmax())
            confusion += confusion_matrix([number[photo.label]], [predicted], len(number))
            gallery.note(Answer(photo.path, photo.label, classifier.labels[predicted], float(row[predicted])))
        if on_progress is not None:
            on_progress(done, len(photos))
    if not confusion.any():
        raise NoUsableData(f"{photos_root}: none of its {len(photos)} photos can be read; nothing was evaluated")
    skipped.sort(key=lambda entry: (entry.path, entry.reason))
    listed = [{"path": entry.path, "reason": entry.reason} for entry in skipped]
    return {
        **scores(confusion, classifier.labels),
        "num_trained_on": seen,
        "most_confused": _most_confused(confusion, classifier.labels),
        "most_wrong": [{**answer._asdict(), "path": str(answer.path)} for answer in gallery.wrong[:_MOST_LISTED]],
        "skipped_files": listed,
    }


def _most_confused(confusion: np.ndarray, labels: list[str]) -> list[dict[str, Any]]:
    off = confusion.copy()
    np.fill_diagonal(off, 0)
    places = np.argsort(-off, axis=None, kind="stable")[:_MOST_LISTED]
    pairs = [divmod(int(place), len(labels)) for place in places]
    return [{"true": labels[i], "predicted": labels[j], "count": int(off[i, j])} for i, j in pairs if off[i, j]]


def _of_known_classes(photos: list[Photo], labels: list[str], root: Path) -> tuple[list[Photo], list[SkippedFile]]:
    """(photos the model has a label for, the others with their reason). NoUsableData without any known."""
    known = [photo for photo in photos if photo.label in labels]
    if not known:
        found = sorted({photo.label for photo in photos})
        raise NoUsableData(
            f"{root}: the model knows none of its classes; it knows {_few(labels)}, the folder has {_few(found)}"
        )
    unknown = [photo for photo in photos if photo.label not in labels]
    reason = "the model does not know the class '{}'"
    return known, [_skip(photo.path, root, reason.format(photo.label)) for photo in unknown]


def _skip(path: Path, root: Path, reason: str) -> SkippedFile:
    relative = os.path.relpath(path, root)
    return SkippedFile(os.fsencode(relative).decode("utf-8", "replace"), reason)


def _few(names: list[str]) -> str:
    listed = ", ".join(f"'{name}'" for name in names[:5])
    return listed + (f" and {len(names) - 5} more" if len(names) > 5 else "")
