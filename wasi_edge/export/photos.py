"""Which photos a run trained on and which it held out: `photos.json`, beside its model. Names only; no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wasi_edge.artefact import read_json_object
from wasi_edge.atomic import write_json_atomic
from wasi_edge.errors import ArtefactError, NoUsableData

PHOTOS_NAME = "photos.json"


class Photo(NamedTuple):
    """A photo and its class."""

    path: Path
    label: str


class RunPhotos(NamedTuple):
    """The photos of a run by part."""

    train: list[Photo]
    val: list[Photo]


def write_run_photos(folder: Path, root: Path, train: Sequence[Photo], val: Sequence[Photo]) -> None:
    """Note them in the run `folder`; paths are kept below `root`, the folder that was trained on."""
    values: dict[str, Any] = {"root": os.path.abspath(root)}
    for part, photos in (("train", train), ("val", val)):
        values[part] = [[_below(photo.path, root), photo.label] for photo in photos]
    write_json_atomic(folder / PHOTOS_NAME, values)


def noted_photos(folder: Path) -> RunPhotos:
    """Those that the run `folder` names, there or not. NoUsableData where it names none, ArtefactError where its list
    is damaged."""
    return _noted(folder, None)[1]


def read_run_photos(folder: Path, root: Path | None = None) -> RunPhotos:
    """Those that are still there, below `root` if they have moved. NoUsableData where of a part none are noted or
    found; else as `noted_photos`."""
    where, noted = _noted(folder, root)
    parts = [[photo for photo in part if photo.path.is_file()] for part in noted]
    for what, listed, found in zip(("training photos", "held-out photos"), noted, parts, strict=True):
        if not listed:
            raise NoUsableData(f"{folder} has no {what}: nothing can be measured")
        if not found:
            raise NoUsableData(f"none of the {what} of {folder} is in {where}; say where they are now: --photos DIR")
    return RunPhotos(*parts)


def _noted(folder: Path, root: Path | None) -> tuple[Path, RunPhotos]:
    """Where the photos lie, below `root` if that is given, and which they are."""
    path = folder / PHOTOS_NAME
    if not path.is_file():
        raise NoUsableData(f"{folder} does not say which photos it was made from; only a run of `finetune` does")
    values = read_json_object(path)
    try:
        where = Path(values["root"]) if root is None else root
        parts = ([Photo(where / name, str(label)) for name, label in values[part]] for part in ("train", "val"))
        return where, RunPhotos(*parts)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{path} is damaged ({error!r}): it cannot be said which photos were held out") from error


def _below(path: Path, root: Path) -> str:
    """Text that JSON can hold; a name that is not UTF-8 will not be found again."""
    return os.path.relpath(path, root).encode("utf-8", "replace").decode()
