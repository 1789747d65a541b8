"""Photos for a calibration, decoded when they are asked for. No torch.

Which ones: evenly spread over all that were found, so that every class of a sorted folder is among them. One
that cannot be used, or whose decoding would break the budget, is replaced by another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wasi_edge.data.headers import read_header
from wasi_edge.errors import NoUsableData, UnreadablePhoto
from wasi_edge.preprocess import Preprocessing, center_view, open_photo, shrink
from wasi_edge.units import format_size


class CalibrationPhotos:
    """`count` of the photos at `paths`.

    skipped     (path, reason) of those met so far that could not be used
    """

    def __init__(
        self, paths: Sequence[Path], count: int, preprocessing: Preprocessing, decode_budget_bytes: int
    ) -> None:
        self._preprocessing, self._decode_budget_bytes = preprocessing, decode_budget_bytes
        chosen = {index * len(paths) // count for index in range(count)}
        self._chosen = [paths[index] for index in sorted(chosen)]
        self._spare = [path for index, path in enumerate(paths) if index not in chosen]
        self._last: np.ndarray | None = None
        self.skipped: list[tuple[Path, str]] = []

    def read(self, index: int) -> np.ndarray:
        """Photo `index`, uint8 (S, S, 3). Raises NoUsableData if no photo at all can be read."""
        path: Path | None = self._chosen[index]
        while path is not None:
            try:
                self._last = self._view(path)
                return self._last
            except UnreadablePhoto as error:
                self.skipped.append((path, str(error)))
                path = self._spare.pop() if self._spare else None
        if self._last is None:
            raise NoUsableData(
                f"no photo to calibrate on can be read; the first, {self.skipped[0][0]}: {self.skipped[0][1]}"
            )
        return self._last  # the one before counts twice: a calibration of n photos needs n

    def _view(self, path: Path) -> np.ndarray:
        side = self._preprocessing.resize_side
        needed = read_header(path, side).decode_bytes
        if needed > self._decode_budget_bytes:
            raise UnreadablePhoto(
                f"decoding needs {format_size(needed)}, "
                f"the budget leaves {format_size(self._decode_budget_bytes)}"
            )
        return center_view(shrink(open_photo(path, side), self._preprocessing), self._preprocessing)
