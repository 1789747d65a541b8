"""Photos copied or linked into a folder for each label. Nothing is ever moved, changed or overwritten."""

from __future__ import annotations

import filecmp
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_LONGEST_NAME = 100


def copy_into(root: Path, label: str, photo: Path) -> Path:
    """Copy `photo` to `root`/`label`/ and return the copy: with a number added where the name is taken.

    A file with the same content and name is that copy already, so that the same command may run twice.
    """
    folder = root / folder_name(label)
    folder.mkdir(parents=True, exist_ok=True)
    for target in _free_names(folder, photo):
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            if not target.is_symlink() and target.is_file() and filecmp.cmp(target, photo, shallow=False):
                return target
            continue
        try:
            with open(descriptor, "wb") as copy, open(photo, "rb") as original:
                shutil.copyfileobj(original, copy)
            shutil.copystat(photo, target)
        except BaseException:
            target.unlink(missing_ok=True)  # half a photo would look like one
            raise
        return target
    raise AssertionError("unreachable")


def link_into(root: Path, label: str, photo: Path) -> Path:
    """`copy_into` with a symbolic link to the photo in place of a copy; a link to it that is there already will do."""
    folder, source = root / folder_name(label), photo.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for target in _free_names(folder, photo):
        try:
            target.symlink_to(source)
        except FileExistsError:
            if not (target.is_symlink() and target.readlink() == source):
                continue
        return target
    raise AssertionError("unreachable")


def _free_names(folder: Path, photo: Path) -> Iterator[Path]:
    """The photo's own name in `folder`, then with a number."""
    yield folder / photo.name
    for number in itertools.count(2):
        yield folder / f"{photo.stem}-{number}{photo.suffix}"


def folder_name(label: str) -> str:
    """A label as the name of one folder: no path in it, nothing hidden, not too long."""
    name = "".join(char if char.isprintable() and char not in '/\\:*?"<>|' else "_" for char in label).strip()
    name = name[:_LONGEST_NAME].rstrip()
    return f"_{name[1:]}" if name.startswith(".") or not name else name
