"""Photos -> labels, as a stream: found, decoded a few at a time, classified in batches, forgotten.

    iter_photos     words of a command line -> paths
    decoded_views   paths -> pictures as the model sees them, in order, a few at a time
    predict_paths   paths -> one dictionary each, in order

Memory does not grow with the number of photos. Decoding and computing take turns, each with all cores: beside each
other they took a tenth longer, because the threads of a matrix product wait for the slowest of them. Only the card is
read ahead.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from wasi_edge.data.folder import PHOTO_SUFFIXES, file_identity, folder_entries, is_folder, is_foreign
from wasi_edge.errors import UnreadablePhoto
from wasi_edge.inference.classifier import Classifier
from wasi_edge.preprocess import center_view, open_photo, shrink
from wasi_edge.preprocessing import Preprocessing

DECODERS = 2
# pictures waiting for the classifier; each is 100 to 200 kB
_DECODED_TOGETHER = 8
_ANNOUNCED = 16
STDIN = "-"
UNSURE = "unsure"


def iter_photos(words: Iterable[str | Path], exclude: Path | None = None) -> Iterator[Path]:
    """Paths of the photos that `words` mean, one after the other.

    A word is a file (taken whatever its name), a folder (its photos at any depth, foreign files left out as
    in training), a pattern that the shell did not expand, or '-': one path a line on standard input. What
    does not exist is handed on as it is, for the decoder to say so. The folder `exclude` is never entered.
    """
    skip = None if exclude is None or not exclude.is_dir() else file_identity(exclude)
    for word in words:
        if str(word) == STDIN:
            for line in sys.stdin.buffer:
                if name := line.rstrip(b"\r\n"):
                    yield from _photos_of(os.fsdecode(name), skip)
        else:
            yield from _photos_of(str(word), skip)


def _photos_of(word: str, skip: tuple[int, int] | None) -> Iterator[Path]:
    path = Path(word)
    if is_folder(path):
        yield from _walk(path, skip)
        return
    matches = sorted(glob.iglob(word, recursive=True)) if glob.has_magic(word) and not path.exists() else []
    if not matches:
        yield path
    for match in map(Path, matches):
        if is_folder(match):
            yield from _walk(match, skip)
        elif _is_photo(match):
            yield match


def _walk(root: Path, skip: tuple[int, int] | None) -> Iterator[Path]:
    """Photos below `root`, folder by folder, in order of their names; a loop of links ends."""
    waiting, entered = [root], {skip}
    while waiting:
        folder = waiting.pop()
        try:
            identity = file_identity(folder)
            children = folder_entries(folder)
        except OSError:  # gone, or not ours to read
            continue
        if identity in entered:
            continue
        entered.add(identity)
        waiting += [child for child in reversed(children) if is_folder(child) and not is_foreign(child)]
        yield from _announced([child for child in children if _is_photo(child) and not is_folder(child)])


def _is_photo(path: Path) -> bool:
    return path.suffix.lower() in PHOTO_SUFFIXES and not is_foreign(path)


def read_view(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    """One photo as a model sees it, uint8 (S, S, 3). Raises UnreadablePhoto."""
    return center_view(shrink(open_photo(path, preprocessing.resize_side), preprocessing), preprocessing)


def decoded_views(
    paths: Iterable[Path], preprocessing: Preprocessing, group: int
) -> Iterator[tuple[Path, np.ndarray | UnreadablePhoto]]:
    """Every path with its picture, or with the reason why it has none; in order, `group` of them decoded at a time and
    no other while those are looked at."""

    def read(path: Path) -> np.ndarray | UnreadablePhoto:
        try:
            return read_view(path, preprocessing)
        except UnreadablePhoto as error:
            return error

    waiting = iter(paths)
    with ThreadPoolExecutor(max_workers=DECODERS, thread_name_prefix="decode") as pool:
        chosen = list(itertools.islice(waiting, group))
        while chosen:
            yield from zip(chosen, list(pool.map(read, chosen)), strict=True)
            chosen = list(itertools.islice(waiting, group))


def _announced(paths: Sequence[Path]) -> Iterator[Path]:
    """The paths, of which the system begins to read the next ones from the card while the processor computes."""
    for path in paths[:_ANNOUNCED]:
        _announce(path)
    for number, path in enumerate(paths):
        if number + _ANNOUNCED < len(paths):
            _announce(paths[number + _ANNOUNCED])
        yield path


def _announce(path: Path) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def classified(
    classifier: Classifier, paths: Iterable[Path], batch: int | None = None
) -> Iterator[tuple[Path, np.ndarray | UnreadablePhoto]]:
    """Every path with its probabilities (C,), or with the reason why it has none; in order."""
    batch = batch or classifier.batch
    group: list[tuple[Path, np.ndarray | UnreadablePhoto]] = []
    readable = 0
    for entry in decoded_views(paths, classifier.preprocessing, max(batch, _DECODED_TOGETHER)):
        group.append(entry)
        readable += not isinstance(entry[1], UnreadablePhoto)
        # unreadable ones count too: a folder of nothing else must not pile up
        if readable == batch or len(group) == 4 * batch:
            yield from _classified_group(classifier, group)
            group, readable = [], 0
    yield from _classified_group(classifier, group)


def _classified_group(
    classifier: Classifier, group: Sequence[tuple[Path, np.ndarray | UnreadablePhoto]]
) -> Iterator[tuple[Path, np.ndarray | UnreadablePhoto]]:
    views = [view for _, view in group if not isinstance(view, UnreadablePhoto)]
    rows = iter(classifier.probabilities(np.stack(views)) if views else ())
    for path, view in group:
        yield path, (view if isinstance(view, UnreadablePhoto) else next(rows))


def predict_paths(
    classifier: Classifier,
    paths: Iterable[Path],
    top_k: int = 3,
    batch: int | None = None,
    threshold: float = 0.0,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """For each photo, in order: `path`, `label`, `probability`, `top` [[label, p], ...]; or `path`, `error`.

    A label less likely than `threshold` is given as 'unsure'; `probability` and `top` still say what it would
    be.
    """
    for done, (path, row) in enumerate(classified(classifier, paths, batch), start=1):
        if isinstance(row, UnreadablePhoto):
            yield {"path": str(path), "error": str(row)}
        else:
            best = np.argsort(-row, kind="stable")[:top_k]
            top = [[classifier.labels[index], float(row[index])] for index in best]
            label, probability = top[0]
            yield {
                "path": str(path),
                "label": label if probability >= threshold else UNSURE,
                "probability": probability,
                "top": top,
            }
        if on_progress is not None:
            on_progress(done)
