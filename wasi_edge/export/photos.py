"""Which photos a run trained on and which it held out: `photos.json`, beside its model. Names only; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wasi_edge.artefact import read_json_object
from wasi_edge.atomic import write_json_atomic
from wasi_edge.errors import NoUsableData

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
    values: dict[str, Any] = {"root": str(root.absolute())}
    for part, photos in (("train", train), ("val", val)):
        values[part] = [[_below(photo.path, root), photo.label] for photo in photos]
    write_json_atomic(folder / PHOTOS_NAME, values)


def read_run_photos(folder: Path, root: Path | None = None) -> RunPhotos:
    """Those that are still there, below `root` if they have moved. NoUsableData where none are noted or found."""
    path = folder / PHOTOS_NAME
    if not path.is_file():
        raise NoUsableData(f"{folder} does not say which photos it was made from; only a run of `finetune` does")
    values = read_json_object(path)
    where = Path(values["root"]) if root is None else root
    parts = []
    for part in ("train", "val"):
        found = [Photo(where / name, label) for name, label in values[part]]
        parts.append([photo for photo in found if photo.path.is_file()])
        if not parts[-1]:
            what = "held-out photos" if part == "val" else "training photos"
            if not values[part]:
                raise NoUsableData(f"{folder} held out no photos: nothing can be measured on them")
            raise NoUsableData(f"none of the {what} of {folder} is in {where}; say where they are now: --photos DIR")
    return RunPhotos(*parts)


def _below(path: Path, root: Path) -> str:
    """Text that JSON can hold; a name that is not UTF-8 will not be found again."""
    return str(path.absolute().relative_to(root.absolute())).encode("utf-8", "replace").decode()
