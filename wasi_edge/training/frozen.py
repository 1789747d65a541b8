"""Frozen blocks run once: what they make of every photo, on disk.

Where only the last blocks learn, the blocks before them give the same tokens for the same pixels in every epoch. They
are run once for the centre view of each photo and for a few augmented views, and each epoch takes one of those in turn.
The weights of the frozen blocks are then not needed any more until the result is written.

    train.bin, held_out.bin   view by view, photo by photo: N scales (float32), N x D tokens (float16) relative to them
    index.json                what the files hold; written last, so that files without it are made again

Tokens are divided by their own largest entry: some channels of pretrained networks leave float16's range.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wasi_edge.atomic import write_json_atomic
from wasi_edge.errors import WasiEdgeError
from wasi_edge.layers.saving import Pass
from wasi_edge.models.network import VisionTransformer
from wasi_edge.planner.memory import token_bytes
from wasi_edge.training.photos import PhotoSet
from wasi_edge.training.resume import read_json

_INDEX = "index.json"


class TokenFile:
    """Tokens (N, D) of photos in several views, read and written by position."""

    def __init__(self, path: Path, photos: int, tokens: int, width: int) -> None:
        self._path, self._photos, self._tokens, self._width = path, photos, tokens, width
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    @property
    def _record_bytes(self) -> int:
        return token_bytes(self._tokens, self._width)

    def write(self, view: int, first: int, values: Tensor) -> None:
        """Values (B, N, D) float32 of the photos from `first` on. Raises WasiEdgeError where the disk is full."""
        for index, tokens in enumerate(values):
            scale = tokens.abs().amax(1, keepdim=True).clamp_min(1e-12)
            data = memoryview(scale.numpy().tobytes() + (tokens / scale).half().numpy().tobytes())
            offset = (view * self._photos + first + index) * self._record_bytes
            try:
                while data:
                    count = os.pwrite(self._fd, data, offset)
                    data, offset = data[count:], offset + count
            except OSError as error:
                raise WasiEdgeError(
                    f"{self._path}: what the frozen blocks make of the photos could not be stored: {error.strerror}; "
                    f"free some space and go on with --resume"
                ) from None

    def read(self, view: int, positions: Iterable[int]) -> Tensor:
        """(B, N, D) float32. Raises WasiEdgeError where the file ends too early."""
        return torch.stack([self._read_one(view * self._photos + int(position)) for position in positions])

    def _read_one(self, record: int) -> Tensor:
        data = os.pread(self._fd, self._record_bytes, record * self._record_bytes)
        if len(data) != self._record_bytes:
            raise WasiEdgeError("the cached tokens end too early: remove the checkpoint folder and start again")
        count = self._tokens
        scale = np.frombuffer(data, np.float32, count).reshape(count, 1)
        halves = np.frombuffer(data, np.float16, offset=4 * count).reshape(count, self._width)
        return torch.from_numpy(halves.astype(np.float32) * scale)

    def flush(self) -> None:
        """To the disk itself."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


@dataclass(frozen=True)
class FrozenPhotoSet(PhotoSet):
    """A side of the split as the blocks that learn see it: tokens (B, N, D) instead of pixels."""

    tokens: TokenFile
    cached_views: int

    @classmethod
    def of(cls, photos: PhotoSet, tokens: TokenFile, cached_views: int) -> FrozenPhotoSet:
        """The same photos."""
        return cls(
            photos.cache,
            photos.indices,
            photos.labels,
            photos.weight,
            photos.preprocessing,
            photos.batch,
            tokens,
            cached_views,
        )

    def inputs(self, positions: Iterable[int]) -> Tensor:
        return self.tokens.read(0, positions)

    def augmented(self, positions: Iterable[int], seed: int, epoch: int) -> Tensor:
        return self.tokens.read(1 + (epoch - 1) % self.cached_views, positions)


def cache_tokens(
    folder: Path,
    build_frozen: Callable[[], VisionTransformer],
    shape: tuple[int, int],
    train: PhotoSet,
    held_out: PhotoSet,
    views: int,
    seed: int,
    identity: str,
    advance: Callable[[int], None],
    is_enough: Callable[[], bool] = lambda: False,
) -> tuple[FrozenPhotoSet, FrozenPhotoSet]:
    """Both sides with their tokens of `shape` (N, D); those that an earlier attempt completed are taken as they are.

    `identity` names everything that decides the tokens: photos, their order, the weights. `advance(done)` is called
    with the photos and views finished; it may raise to stop. Once there is one augmented view `is_enough` may end it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train_file = TokenFile(folder / "train.bin", len(train), *shape)
    held_out_file = TokenFile(folder / "held_out.bin", len(held_out), *shape)
    passes = [(train, train_file, 0), (held_out, held_out_file, 0)]
    passes += [(train, train_file, view) for view in range(1, views + 1)]
    try:
        made = read_json(folder / _INDEX)
        if made is None or made.get("identity") != identity:
            (folder / _INDEX).unlink(missing_ok=True)
            made = {"identity": identity, "views": _fill(build_frozen(), passes, seed, advance, is_enough)}
            write_json_atomic(folder / _INDEX, made)
    except BaseException:
        train_file.close()
        held_out_file.close()
        raise
    views = made["views"]
    return FrozenPhotoSet.of(train, train_file, views), FrozenPhotoSet.of(held_out, held_out_file, views)


def _fill(
    frozen: VisionTransformer,
    passes: list[tuple[PhotoSet, TokenFile, int]],
    seed: int,
    advance: Callable[[int], None],
    is_enough: Callable[[], bool],
) -> int:
    """Run every side and view through the frozen blocks; returns how many augmented views there are."""
    run, done, views = Pass(), 0, 0
    for side, file, view in passes:
        for first in range(0, len(side), side.batch):
            if views and is_enough():
                return views
            chosen = range(first, min(first + side.batch, len(side)))
            inputs = side.inputs(chosen) if view == 0 else side.augmented(chosen, seed, view)
            file.write(view, first, frozen.last_tokens(inputs, run))
            done += len(chosen)
            advance(done)
        file.flush()
        views = view
    return views


def identity_of(photos: Sequence[PhotoSet], weights: Path, *choices: object) -> str:
    """A digest of the photos in their order, of the files of `weights` and of what else decides the tokens."""
    digest = hashlib.sha256(repr(choices).encode())
    for side in photos:
        for index in side.indices:
            number = int(index)
            entry = (os.fspath(side.cache.paths[number]), side.cache.labels[number], side.cache.hashes[number])
            digest.update(repr(entry).encode("utf-8", "surrogateescape"))
        digest.update(b"|")
    for path in sorted(weights.glob("*.safetensors")):
        status = path.stat()
        digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def count_passes(num_train: int, num_val: int, views: int) -> int:
    """How often a photo goes through the frozen blocks in all."""
    return num_train * (1 + views) + num_val
