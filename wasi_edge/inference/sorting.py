"""Photos copied into a folder for each label. Nothing is ever moved, changed or overwritten."""

from __future__ import annotations

import filecmp
import itertools
import os
import shutil
from pathlib import Path

_LONGEST_NAME = 100


def copy_into(root: Path, label: str, photo: Path) -> Path:
    """Copy `photo` to `root`/`label`/ and return the copy: with a number added where the name is taken.

    A file with the same content and name is that copy already, so that the same command may run twice.
    """
    folder = root / folder_name(label)
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        target = folder / (photo.name if number == 1 else f"{photo.stem}-{number}{photo.suffix}")
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            if target.is_file() and filecmp.cmp(target, photo, shallow=False):
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


def folder_name(label: str) -> str:
    """A label as the name of one folder: no path in it, nothing hidden, not too long."""
    name = "".join(char if char.isprintable() and char not in '/\\:*?"<>|' else "_" for char in label).strip()
    name = name[:_LONGEST_NAME].rstrip()
    return f"_{name[1:]}" if name.startswith(".") or not name else name
