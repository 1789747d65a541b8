"""Files that are there whole or not at all, even after a power cut: written beside the target, synced, renamed.

No torch.

Half a file has a hidden name with the number of the process that writes it, so that what a dead process left can be
told from what a living one is writing (`sweep_orphans`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from wasi_edge.errors import ArtefactError

_ORPHAN = re.compile(r"\..+\.(\d+)(\.[\w-]+)?\.tmp")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` when the block ends without an error; otherwise `path` stays as it was.
    Mode 0644 less the umask. Raises ArtefactError where the system refuses."""
    with drafted(path) as draft, create(draft) as out:
        yield out
        out.flush()
        os.fsync(out.fileno())


@contextlib.contextmanager
def drafted(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside `path` for a file, synced by whoever writes it, that becomes `path` when the block ends without an
    error. Raises ArtefactError where the system refuses."""
    target = Path(path)
    with scratch(target) as draft, explained(target):
        yield draft
        os.replace(draft, target)
        sync_folder(target.parent)


@contextlib.contextmanager
def scratch(path: Path, suffix: str = "") -> Iterator[Path]:
    """A name beside `path` for a file that nobody needs after the block."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{suffix}.tmp")
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a small file at once, as `replacing` does."""
    with replacing(path) as out:
        out.write(data)


def write_json_atomic(path: str | os.PathLike[str], value: object) -> None:
    """`write_bytes_atomic` of indented UTF-8 JSON. Raises ValueError on NaN or infinity: not JSON."""
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False)
    # the name of a photo may hold bytes that are no text
    write_bytes_atomic(path, text.encode("utf-8", "replace") + b"\n")


def sweep_orphans(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove the temporary files that dead processes left in `folder`; returns what was removed.

    A process id may have been given to another program since; such a file stays.
    """
    removed = []
    folder = Path(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _ORPHAN.fullmatch(path.name)
        if match and not _is_alive(int(match[1])):
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(path)
    return removed


def create(path: Path) -> BinaryIO:
    """A new empty file of mode 0644 less the umask, in place of a leftover of the same name."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb")


def sync_folder(path: Path) -> None:
    """Put the names in a folder on disk for good."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into a sentence with a remedy."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and Path(error.filename).parent != path.parent:
            raise  # about something else that was read meanwhile
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space or write to another folder" if full else "choose a folder you may write to"
        raise ArtefactError(f"{path}: cannot be written ({error.strerror}); {remedy}") from error


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:  # it may be somebody else's; or no process id at all
        return not isinstance(error, ProcessLookupError)
    return True
