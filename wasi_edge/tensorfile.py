"""Safetensors files, read by `pread` and written as a stream. No torch.

A safetensors file is an 8-byte little-endian length, a JSON header {name: {dtype, shape,
data_offsets}} and the tensors' bytes, one after another. Files made here are read by the
official library and the other way round (tested).

Why not the official library: it maps the file, and mapped pages count as resident; its `save_file`
wants every tensor at once, never calls fsync and leaves mode 0600. Here only the current tensor is in
memory, reading as writing.

Where we deviate. Headers are bounded at 10 MiB instead of 100 MB (a ViT-B/16 has 40 KiB; parsing
100 MB of JSON would by itself break a 512 MB budget), and the 8-bit float types, for which numpy has
no dtype, are refused. Like the official reader we want the tensors to cover the data without holes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from wasi_edge.atomic import create, explained, replacing, scratch
from wasi_edge.errors import ArtefactError

Array = np.ndarray[Any, Any]

HEADER_LIMIT_BYTES = 10 * 2**20
CHUNK_BYTES = 2**20
_DIMENSION_LIMIT = 32  # numpy 1.26's own

# What is on disk, as numpy sees it; bfloat16 and bool are kept as plain integers until converted.
_STORED: dict[str, np.dtype[Any]] = {
    **{f"{k.upper()}{8 * n}": np.dtype(f"<{k}{n}") for k in "iuf" for n in (1, 2, 4, 8) if f"{k}{n}" != "f1"},
    "BF16": np.dtype("<u2"),
    "BOOL": np.dtype("u1"),
}
_WIDENED: dict[str, np.dtype[Any]] = {"BF16": np.dtype(np.float32), "BOOL": np.dtype(np.bool_)}
_CODES = {dtype: code for code, dtype in _STORED.items() if code not in _WIDENED}
_CODES[np.dtype(np.bool_)] = "BOOL"


class _Entry(NamedTuple):
    code: str
    shape: tuple[int, ...]
    start: int  # bytes from the start of the data
    stop: int


class TensorFile:
    """An open safetensors file whose header has been checked against the file's size.

    Attributes: `path`, `metadata` (str -> str). A context manager. Reading is safe from several threads.

    Raises ArtefactError for anything that is not a complete, consistent safetensors file.
    """

    _fd = -1

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):  # opening a FIFO could block for ever
                raise ArtefactError(f"{self.path}: expected a safetensors file, found a folder or device")
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            size = os.fstat(self._fd).st_size
            self._data_start, header = _read_header(self._fd, self.path, size)
            self.metadata, self._entries = _check_header(header, self.path, size - self._data_start)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise ArtefactError(f"{self.path}: cannot be read ({error.strerror})") from error
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def close(self) -> None:
        """Give the file descriptor back; further reads fail."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def keys(self) -> list[str]:
        """Names in the order of their bytes in the file."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype `read(name)` returns: float32 for a bfloat16 tensor, else what is stored."""
        code = self._entry(name).code
        return _WIDENED.get(code, _STORED[code])

    def stored_dtype(self, name: str) -> str:
        """The format's own word for the dtype on disk: 'F32', 'F16', 'BF16', ..."""
        return self._entry(name).code

    def read(self, name: str, dtype: DTypeLike | None = None) -> Array:
        """One whole tensor in a fresh, writable, C-contiguous array.

        `dtype` converts on the way in, chunk by chunk, so that the peak is the result and a few MiB.
        """
        entry = self._entry(name)
        return self._read(entry, entry.start, entry.shape, dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: DTypeLike | None = None) -> Array:
        """Rows start..stop (first dimension, 0 <= start <= stop <= rows) of a tensor as a fresh array.

        Raises IndexError outside that range or for a tensor without dimensions.
        """
        entry = self._entry(name)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {name!r}, whose shape is {entry.shape}")
        row_shape = entry.shape[1:]
        row_bytes = math.prod(row_shape) * _STORED[entry.code].itemsize
        return self._read(entry, entry.start + start * row_bytes, (stop - start, *row_shape), dtype)

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise ArtefactError(f"{self.path}: no tensor named {name!r}") from None

    def _read(self, entry: _Entry, start: int, shape: tuple[int, ...], dtype: DTypeLike | None) -> Array:
        stored = _STORED[entry.code]
        out = np.empty(shape, _WIDENED.get(entry.code, stored) if dtype is None else np.dtype(dtype))
        flat = out.reshape(-1)
        offset = self._data_start + start
        if out.dtype == stored and entry.code not in _WIDENED:
            self._pread_into(flat, offset)
            return out
        step = CHUNK_BYTES // stored.itemsize
        scratch = np.empty(min(step, flat.size), stored)
        for begin in range(0, flat.size, step):
            chunk = scratch[: min(step, flat.size - begin)]
            self._pread_into(chunk, offset + begin * stored.itemsize)
            if entry.code in _WIDENED:
                chunk = chunk != 0 if entry.code == "BOOL" else (chunk.astype("<u4") << 16).view("<f4")
            flat[begin : begin + len(chunk)] = chunk
        return out

    def _pread_into(self, flat: Array, offset: int) -> None:
        view = flat.view(np.uint8).data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise ArtefactError(f"{self.path}: cannot be read ({error.strerror})") from error
            if count == 0:
                raise ArtefactError(f"{self.path}: ended while being read; was it overwritten?")
            done += count


class TensorWriter:
    """Writes a safetensors file tensor by tensor; the target appears complete or not at all.

        with TensorWriter(path, {"format": "pt"}) as writer:
            writer.add("weight", array)

    Bytes go to a hidden `.data.tmp` file beside the target. At the end of a successful `with` block
    header and data are copied to a hidden `.tmp` file (so twice the model's size must be free on
    disk), synced, renamed over the target with mode 0644 less the umask, and the folder synced. An
    exception in the block leaves an existing target as it was and no other file.

    Attributes: `shapes`, name -> shape of what has been added so far.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._scratch = contextlib.ExitStack()
        self._data_path = self._scratch.enter_context(scratch(self.path, ".data"))
        self._data: BinaryIO | None = None
        self._length = 0

    def __enter__(self) -> TensorWriter:
        with explained(self.path):
            self._data = create(self._data_path)
        return self

    def add(self, name: str, array: Array) -> None:
        """Append one tensor.

        Raises ValueError for a repeated or reserved name or a dtype the format lacks, ArtefactError
        when the disk is full.
        """
        if self._data is None:
            raise ValueError("add() outside the writer's with block")
        if name in self._header or name == "__metadata__":
            raise ValueError(f"tensor name {name!r} is used already or reserved")
        dtype = array.dtype.newbyteorder("<")
        if dtype not in _CODES:
            raise ValueError(f"tensor {name!r}: dtype {array.dtype} has no place in a safetensors file")
        flat = np.asarray(array, dtype=dtype, order="C").reshape(-1)
        with explained(self.path):
            self._data.write(flat.view(np.uint8).data)
        offsets = [self._length, self._length + flat.nbytes]
        self._header[name] = {"dtype": _CODES[dtype], "shape": list(array.shape), "data_offsets": offsets}
        self._length += flat.nbytes
        self.shapes[name] = tuple(array.shape)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        data, self._data = self._data, None
        try:
            with explained(self.path):
                if data is not None:
                    data.close()
                if kind is None:
                    self._commit()
        finally:
            self._scratch.close()

    def _commit(self) -> None:
        header = json.dumps(self._header, ensure_ascii=False, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # the data starts 8-byte aligned, as the format advises
        if len(header) > HEADER_LIMIT_BYTES:
            raise ValueError(f"header of {len(header)} bytes, the limit is {HEADER_LIMIT_BYTES}")
        with replacing(self.path) as out, open(self._data_path, "rb") as data:
            out.write(len(header).to_bytes(8, "little") + header)
            while chunk := data.read(CHUNK_BYTES):
                out.write(chunk)


def _read_header(fd: int, path: Path, size: int) -> tuple[int, dict[str, Any]]:
    """Returns where the data starts (bytes) and the decoded header."""
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > size - 8:
        raise ArtefactError(
            f"{path}: not a safetensors file or cut short "
            f"(its header should take {length} bytes, the file has {size}); copy or download it again"
        )
    if length > HEADER_LIMIT_BYTES:
        raise ArtefactError(f"{path}: header of {length} bytes, at most {HEADER_LIMIT_BYTES} are accepted")
    raw = os.pread(fd, length, 8)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats, parse_int=_bounded)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ArtefactError(f"{path}: its header is not valid JSON ({reason})") from None
    if not isinstance(header, dict):
        raise ArtefactError(f"{path}: its header should be a JSON object, found a {type(header).__name__}")
    return 8 + length, header


def _bounded(digits: str) -> int:
    if len(digits) > 18:  # below 2**60: safe to print and to hand to numpy
        raise ValueError("a number is too large")
    return int(digits)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _check_header(header: dict[str, Any], path: Path, size: int) -> tuple[dict[str, str], dict[str, _Entry]]:
    """Metadata and entries sorted by offset, every promise held against the `size` bytes of data."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ArtefactError(f"{path}: __metadata__ should map text to text")
    entries = {name: _check_entry(f"{path}: tensor {name!r}", entry) for name, entry in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    position = 0
    for name, entry in ordered.items():
        if entry.start != position:
            problem = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise ArtefactError(f"{path}: tensor {name!r} {problem} ({entry.start}, not {position})")
        position = entry.stop
    if position != size:
        raise ArtefactError(f"{path}: cut short or damaged: {size} bytes of data, expected {position}")
    return metadata, ordered


def _check_entry(where: str, entry: Any) -> _Entry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ArtefactError(f"{where} should have exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _STORED:
        raise ArtefactError(f"{where} has dtype {code!r:.40}, known are {', '.join(_STORED)}")
    if not _are_sizes(shape) or len(shape) > _DIMENSION_LIMIT:
        raise ArtefactError(f"{where} has an impossible shape {shape!r:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_are_sizes([end]) for end in offsets):
        raise ArtefactError(f"{where} has impossible data_offsets {offsets!r:.80}")
    needed = math.prod(shape) * _STORED[code].itemsize
    if needed != offsets[1] - offsets[0]:
        raise ArtefactError(f"{where} ({code} {shape}) needs {needed} bytes, its offsets are {offsets}")
    return _Entry(code, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    # type() and not isinstance: True is an int. The product, zeros aside, is bounded for numpy.
    ok = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    return ok and math.prod(item for item in value if item) < 2**60
