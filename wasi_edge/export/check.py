"""Exported, and whether the file answers as the model does that it was made from; if not, there is no file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wasi_edge.artefact import Artefact
from wasi_edge.atomic import drafted
from wasi_edge.errors import ArtefactError
from wasi_edge.export.answers import REFERENCE, RUNTIME, answers_of, runner, sample_views
from wasi_edge.export.model import write_onnx
from wasi_edge.metrics import softmax
from wasi_edge.preprocess import center_view, normalise, shrink
from wasi_edge.preprocessing import Preprocessing

# measured: resident memory of the child, whose libraries and buffers come to `_BASE`, over the file's size
_BASE_BYTES, _BYTES_PER_FILE_BYTE = 90 * 2**20, {RUNTIME: 1.6, REFERENCE: 4.2}
# onnx's evaluator keeps every value of the network and several copies of its weights
_LARGEST_FOR_REFERENCE = 80 * 2**20
_PICTURES = 3
# largest difference that is left to arithmetic in another order, relative to the largest answer
TOLERANCE = 1e-4
# of probabilities, where a photo was resized
LOOSE_TOLERANCE = 0.02


@dataclass(frozen=True)
class Check:
    """`difference`: the largest of any answer, relative to the largest answer; None where nothing was compared, and
    the `reason`."""

    difference: float | None
    by: str | None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Keys of `export --json` and of a run's report."""
        return {"logit_difference": self.difference, "compared_by": self.by, "not_compared": self.reason}


def checked_export(artefact: Artefact, out: Path, with_preprocessing: bool = False) -> Check:
    """Write `out` and compare it with torch on pictures made up here, each in a process of its own.

    Raises ArtefactError, as `write_onnx` and `compare` do; `out` is as it was then.
    """
    preprocessing = artefact.config.preprocessing
    with drafted(out) as draft:
        write_onnx(artefact, draft, with_preprocessing)
        pictures = sample_views(preprocessing.resize_side, _PICTURES)
        views = [center_view(picture, preprocessing) for picture in pictures]
        oblong, view = oblong_picture(preprocessing)
        *expected, expected_oblong = answers_of("torch", artefact.folder, np.stack([*views, view]))
        if not with_preprocessing:
            return compare(draft, normalise(np.stack(views), preprocessing), np.stack(expected))
        # a resize rounds otherwise than Pillow: that is compared apart
        compare(draft, oblong[None], softmax(expected_oblong[None]), tolerance=LOOSE_TOLERANCE)
        return compare(draft, pictures, softmax(np.stack(expected)))


def oblong_picture(preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 (H, W, 3) that has to be resized and cropped, and its view (S, S, 3)."""
    side = preprocessing.resize_side
    picture = Image.fromarray(sample_views(2 * side, 1, seed=1)[0]).resize((side * 3 // 2, side * 5 // 4))
    return np.asarray(picture), center_view(shrink(picture, preprocessing), preprocessing)


def export_beside(
    artefact: Artefact, out: Path, views: np.ndarray, logits: np.ndarray | None, available_bytes: int
) -> Check:
    """`checked_export` for a process that knows answers already: `logits` (B, C) of `views` uint8 (B, S, S, 3). Nothing
    is compared without them, or where that needs more than `available_bytes`."""
    with drafted(out) as draft:
        write_onnx(artefact, draft)
        if logits is None:
            return Check(None, None, "the run held weights, or what frozen blocks made of photos, in 16 bits")
        return compare(draft, normalise(views, artefact.config.preprocessing), logits, available_bytes)


def compare(
    path: Path,
    inputs: np.ndarray,
    expected: np.ndarray,
    available_bytes: int | None = None,
    tolerance: float = TOLERANCE,
) -> Check:
    """The answers of the file `path` to what its graph takes against those `expected` (B, C), in a process of at most
    `available_bytes`. Raises ArtefactError where they differ by more than `tolerance`."""
    by, size = runner(), path.stat().st_size
    if by == REFERENCE and size > _LARGEST_FOR_REFERENCE:
        return Check(None, None, 'without ONNX Runtime this takes much memory: pip install "wasi-edge[onnxruntime]"')
    if available_bytes is not None and _BASE_BYTES + _BYTES_PER_FILE_BYTE[by] * size > available_bytes:
        return Check(None, None, "the budget has no room for a second process that holds the model")
    found = float(np.abs(answers_of("onnx", path, inputs) - expected).max() / np.abs(expected).max())
    if not found <= tolerance:
        raise ArtefactError(
            f"{path}: its answers differ from the model's by {found:.1e} of the largest, more than {tolerance:g}: {by} "
            "computes it wrongly here; please report it"
        )
    return Check(found, by)
