"""Every photo decoded and shrunk once, into one file that training reads.

    pixels.bin    uint8 (h, w, 3) pictures one after the other, in photo order
    index.json    schema, preprocessing, and of each photo path, label, size, mtime, offset, h, w and hash, or
                  the reason why it cannot be used

The index is written last, by rename after fsync: a folder without one is an unfinished cache, and rebuilt. A
complete one is reused when schema, preprocessing and each photo's path, label, size and mtime agree.

Decoding is the memory spike of a run. It happens in threads (a process would cost an interpreter each); a
photo is admitted only when its predicted bytes and those of all photos in flight fit `decode_budget_bytes`.
Reading uses `pread` into an array: mapped pages would count as resident memory, the page cache does not.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from wasi_edge.data.folder import Photo, SkippedFile
from wasi_edge.data.headers import read_header
from wasi_edge.data.split import difference_hash
from wasi_edge.errors import UnreadablePhoto, WasiEdgeError
from wasi_edge.preprocess import MAX_PIXELS, open_photo, shrink
from wasi_edge.preprocessing import Preprocessing
from wasi_edge.units import format_size

SCHEMA = 1
SPARE_DISK_BYTES = 64 * 2**20
# Finished pictures that may wait for a slow one before them, per thread; each is a few hundred kB.
_WAITING_PER_THREAD = 4


class PhotoCache:
    """A complete cache, open for reading. Index i counts the usable photos in photo order."""

    def __init__(self, directory: Path, index: dict[str, Any]) -> None:
        self.directory = directory
        self.preprocessing = Preprocessing.from_dict(index["preprocessing"])
        root = Path(index["root"])
        self._entries = [entry for entry in index["photos"] if "reason" not in entry]
        self.labels: list[str] = [entry["label"] for entry in self._entries]
        self.parts: list[str | None] = [entry["part"] for entry in self._entries]
        self.paths: list[Path] = [root / entry["path"] for entry in self._entries]
        self.hashes: list[int] = [int(entry["dhash"], 16) for entry in self._entries]
        self.skipped: list[SkippedFile] = [
            SkippedFile(entry["path"].encode("utf-8", "surrogateescape").decode("utf-8", "replace"), entry["reason"])
            for entry in index["photos"]
            if "reason" in entry
        ]
        self._fd = os.open(directory / "pixels.bin", os.O_RDONLY)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, i: int) -> np.ndarray:
        """Photo i as `shrink` made it: uint8 (h, w, 3), a fresh array. Thread-safe."""
        entry = self._entries[i]
        out = np.empty((entry["h"], entry["w"], 3), dtype=np.uint8)
        rest, offset = out.reshape(-1).data, entry["offset"]
        while rest:
            count = os.preadv(self._fd, [rest], offset)
            if count == 0:
                raise WasiEdgeError(f"{self.directory}: pixels.bin ends too early: delete the folder and start again")
            rest, offset = rest[count:], offset + count
        return out

    def close(self) -> None:
        """Close the file; `read` is no longer possible."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> PhotoCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Shrunk:
    pixels: np.ndarray
    dhash: int


class _ByteGate:
    """Admits decoders while the sum of their predicted bytes stays within the budget."""

    def __init__(self, budget_bytes: int) -> None:
        self._free = budget_bytes
        self._changed = threading.Condition()

    def enter(self, count: int) -> None:
        """Wait until `count` bytes are free, and take them. `count` is at most the whole budget."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count

    def leave(self, count: int) -> None:
        """Give `count` bytes back."""
        with self._changed:
            self._free += count
            self._changed.notify_all()


def open_cache(directory: str | os.PathLike[str]) -> PhotoCache:
    """Open a complete cache. Raises `WasiEdgeError` where there is none, or one of another schema."""
    directory = Path(directory)
    index = _read_index(directory)
    if index is None:
        raise WasiEdgeError(f"{directory} holds no complete photo cache: build it again from the photos")
    return PhotoCache(directory, index)


def build_cache(
    photos: Sequence[Photo],
    directory: str | os.PathLike[str],
    preprocessing: Preprocessing,
    decode_budget_bytes: int,
    threads: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> PhotoCache:
    """Decode and shrink `photos` into `directory`, or reuse what is there; then open it.

    `on_progress(done, total)` is called in the calling thread. Photos that cannot be decoded, or that alone
    need more than `decode_budget_bytes`, are in `skipped` with their reason. `threads` does not change the
    result, not even the files' bytes.
    Raises `WasiEdgeError` where the disk is full or cannot be written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            index = _read_index(directory)
            wanted = _fingerprint(photos, preprocessing)
            if index is None or not _matches(index, wanted, decode_budget_bytes):
                index = _build(photos, directory, preprocessing, decode_budget_bytes, threads, on_progress, wanted)
            elif on_progress is not None:
                on_progress(len(photos), len(photos))
            return PhotoCache(directory, index)
    except OSError as error:
        raise WasiEdgeError(
            f"the photo cache in {directory} cannot be written ({error.strerror or error}): "
            "free some space or choose a folder on another disk"
        ) from error


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Let one process at a time build; the next one then finds the cache complete."""
    with open(directory / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fingerprint(photos: Sequence[Photo], preprocessing: Preprocessing) -> dict[str, Any]:
    """What a cache of these photos must agree with, as it stands in the index."""
    root = os.path.commonpath([photo.path.absolute().parent for photo in photos]) if photos else "."
    entries = []
    for photo in photos:
        try:
            status = os.stat(photo.path)
            size, mtime_ns = status.st_size, status.st_mtime_ns
        except OSError:  # gone since the scan: decoding will list it
            size, mtime_ns = -1, -1
        path = os.path.relpath(photo.path.absolute(), root)
        entries.append({"path": path, "label": photo.label, "part": photo.part, "size": size, "mtime_ns": mtime_ns})
    return {"schema": SCHEMA, "preprocessing": preprocessing.to_dict(), "root": str(root), "photos": entries}


def _matches(index: dict[str, Any], wanted: dict[str, Any], decode_budget_bytes: int) -> bool:
    if any(index[key] != wanted[key] for key in ("schema", "preprocessing", "root")):
        return False
    # A photo once too big for the budget is worth a rebuild when it fits.
    if any(entry.get("needs_bytes", decode_budget_bytes + 1) <= decode_budget_bytes for entry in index["photos"]):
        return False
    if len(index["photos"]) != len(wanted["photos"]):
        return False
    return all(
        all(have.get(key) == value for key, value in want.items())
        for have, want in zip(index["photos"], wanted["photos"], strict=True)
    )


def _read_index(directory: Path) -> dict[str, Any] | None:
    """The index of a complete cache of this schema, else None."""
    try:
        index = json.loads((directory / "index.json").read_text("utf-8"))
        complete = index["schema"] == SCHEMA and isinstance(index["photos"], list)
        complete = complete and os.path.getsize(directory / "pixels.bin") == index["pixels_bytes"]
        return index if complete else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(
    photos: Sequence[Photo],
    directory: Path,
    preprocessing: Preprocessing,
    decode_budget_bytes: int,
    threads: int,
    on_progress: Callable[[int, int], None] | None,
    index: dict[str, Any],
) -> dict[str, Any]:
    """Fill `index` and write both files; the index appears only after the pixels are on the disk."""
    _check_disk(photos, directory, preprocessing)
    # Pixels and index must never disagree: the old index goes first.
    (directory / "index.json").unlink(missing_ok=True)
    partial = directory / "pixels.bin.partial"
    try:
        results = _decoded_in_order(photos, preprocessing, decode_budget_bytes, threads)
        with open(partial, "wb") as file, closing(results):
            for done, (entry, result) in enumerate(zip(index["photos"], results, strict=True), start=1):
                _record(entry, result, file)
                if on_progress is not None:
                    on_progress(done, len(photos))
            index["pixels_bytes"] = file.tell()
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, directory / "pixels.bin")
    finally:
        partial.unlink(missing_ok=True)
    _write_durably(directory / "index.json", json.dumps(index).encode())
    return index


def _check_disk(photos: Sequence[Photo], directory: Path, preprocessing: Preprocessing) -> None:
    side = preprocessing.resize_side
    needed = 0
    for photo in photos:
        short, long = sorted((photo.header.width, photo.header.height))
        needed += 3 * side * min(2 * side, round(long * side / short) + 1)
    free = shutil.disk_usage(directory).free
    if needed + SPARE_DISK_BYTES > free:
        raise WasiEdgeError(
            f"the photo cache needs {format_size(needed + SPARE_DISK_BYTES)} on the disk of {directory}, "
            f"{format_size(free)} are free: free some space, set XDG_CACHE_HOME to another disk, "
            "or take a smaller --image-size"
        )


def _decoded_in_order(
    photos: Sequence[Photo], preprocessing: Preprocessing, budget_bytes: int, threads: int
) -> Generator[_Shrunk | dict[str, Any], None, None]:
    """Each photo's shrunk picture, or what its entry shall say instead; in photo order.

    This thread alone passes the gate, in photo order, and workers never wait for it: no big photo starves
    behind small ones, and there is nothing to deadlock on.
    """
    gate = _ByteGate(budget_bytes)

    def decode(photo: Photo, count: int) -> _Shrunk | dict[str, Any]:
        try:
            # The scan has set the cap on pixels, and the gate the one on memory.
            cap = max(MAX_PIXELS, photo.header.width * photo.header.height)
            pixels = shrink(open_photo(photo.path, preprocessing.resize_side, cap), preprocessing)
            return _Shrunk(pixels, difference_hash(pixels))
        except UnreadablePhoto as error:
            return {"reason": str(error)}
        finally:
            gate.leave(count)

    waiting: deque[Future[_Shrunk | dict[str, Any]]] = deque()
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode")
    try:
        for photo in photos:
            refusal, count = _admission(photo, preprocessing.resize_side, budget_bytes)
            if refusal is not None:
                refused: Future[_Shrunk | dict[str, Any]] = Future()
                refused.set_result(refusal)
                waiting.append(refused)
            else:
                gate.enter(count)
                waiting.append(pool.submit(decode, photo, count))
            while waiting and (waiting[0].done() or len(waiting) >= threads * _WAITING_PER_THREAD):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # After an interruption: nothing new starts, and no thread outlives the file it would write for.
        pool.shutdown(wait=True, cancel_futures=True)


def _admission(photo: Photo, side: int, budget_bytes: int) -> tuple[dict[str, Any] | None, int]:
    """(what the entry of a refused photo says, or None; the photo's predicted bytes)."""
    header = photo.header
    try:
        if side > header.min_side:  # predicted for a smaller picture than the one we make
            header = read_header(photo.path, side)
    except UnreadablePhoto as error:
        return {"reason": str(error)}, 0
    if header.decode_bytes <= budget_bytes:
        return None, header.decode_bytes
    reason = (
        f"decoding needs {format_size(header.decode_bytes)}, {format_size(budget_bytes)} are allowed: "
        "take a larger --budget or save the photo smaller"
    )
    return {"reason": reason, "needs_bytes": header.decode_bytes}, 0


def _record(entry: dict[str, Any], result: _Shrunk | dict[str, Any], file: BinaryIO) -> None:
    if isinstance(result, _Shrunk):
        height, width, _ = result.pixels.shape
        entry.update(offset=file.tell(), h=height, w=width, dhash=f"{result.dhash:016x}")
        file.write(np.ascontiguousarray(result.pixels).data)
    else:
        entry.update(result)


def _write_durably(path: Path, content: bytes) -> None:
    """Replace `path` so that it holds the old or the new content, whenever the power fails."""
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
