"""Photos for a calibration, decoded when they are asked for. No torch.

Which ones: evenly spread over all that were found, so that every class of a sorted folder is among them. One
that cannot be used, or whose decoding would break the budget, is replaced by another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from wasi_edge.data.headers import read_header
from wasi_edge.errors import NoUsableData, UnreadablePhoto
from wasi_edge.preprocess import center_view, open_photo, shrink
from wasi_edge.preprocessing import Preprocessing
from wasi_edge.units import format_size


class CalibrationPhotos:
    """`count` of the photos at `paths`.

    skipped     path -> reason of those met so far that could not be used
    """

    def __init__(
        self, paths: Sequence[Path], count: int, preprocessing: Preprocessing, decode_budget_bytes: int
    ) -> None:
        self._preprocessing, self._decode_budget_bytes = preprocessing, decode_budget_bytes
        chosen = spread(len(paths), count)
        self._chosen = [paths[index] for index in chosen]
        taken = set(chosen)
        self._spare = [path for index, path in enumerate(paths) if index not in taken]
        self._last: np.ndarray | None = None
        self.skipped: dict[Path, str] = {}

    def read(self, index: int) -> np.ndarray:
        """Photo `index`, uint8 (S, S, 3). Raises NoUsableData if no photo at all can be read."""
        for path in self._candidates(index):
            try:
                self._last = self._view(path)
                return self._last
            except UnreadablePhoto as error:
                self.skipped[path] = str(error)
        if self._last is None:
            path, reason = next(iter(self.skipped.items()))
            raise NoUsableData(f"no photo to calibrate on can be read; {path}: {reason}")
        return self._last  # the one before counts twice: a calibration of n photos needs n

    def _candidates(self, index: int) -> Iterator[Path]:
        yield self._chosen[index]
        while self._spare:
            yield self._spare.pop()
        if self._last is None:  # nothing to fall back on: borrow from the photos still to come
            yield from self._chosen[index + 1 :]

    def _view(self, path: Path) -> np.ndarray:
        side = self._preprocessing.resize_side
        needed = read_header(path, side).decode_bytes
        if needed > self._decode_budget_bytes:
            raise UnreadablePhoto(
                f"decoding needs {format_size(needed)}, the budget leaves {format_size(self._decode_budget_bytes)}"
            )
        return center_view(shrink(open_photo(path, side), self._preprocessing), self._preprocessing)


def spread(count: int, wanted: int) -> Sequence[int]:
    """At most `wanted` of `count` indices, evenly spread."""
    if count <= wanted:
        return range(count)
    return [index * count // wanted for index in range(wanted)]
