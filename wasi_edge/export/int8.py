"""Weights and activations in eight bits, by the quantiser of ONNX Runtime (an extra), and what that costs in accuracy.

Every product with a weight becomes one of integers: weights have a scale per output channel, activations one per photo
and value, found as they pass. What the run's own photos are for is the value between two factors: its channels differ
by the singular values of the layer, and a common scale would round the small ones away. So each channel is divided by
how large it becomes on training photos, to the power `_BALANCE`, and its row of the left factor multiplied (the idea of
SmoothQuant, Xiao et al. 2023; between factors it costs nothing).

Weights keep to seven bits of their eight: x86 without VNNI adds pairs of products in 16 bits, which overflow otherwise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from wasi_edge.artefact import Artefact
from wasi_edge.atomic import replacing, scratch
from wasi_edge.errors import ArtefactError, NoUsableData, UnreadablePhoto
from wasi_edge.export.check import LOOSE_TOLERANCE, oblong_picture
from wasi_edge.export.model import write_onnx
from wasi_edge.export.network import between_factors
from wasi_edge.export.photos import Photo, RunPhotos
from wasi_edge.inference.onnx_backend import OnnxClassifier, open_session
from wasi_edge.inference.onnx_metadata import OnnxMetadata
from wasi_edge.inference.predict import decoded_views
from wasi_edge.memory.hardware import integer_instructions
from wasi_edge.onnx_runtime import import_onnxruntime
from wasi_edge.preprocess import normalise
from wasi_edge.preprocessing import Preprocessing

CALIBRATION_PHOTOS = 64
_BALANCE = 0.7
_SMALLEST = 1e-5
_ROUNDS = 5


def write_int8(
    artefact: Artefact,
    out: Path,
    photos: RunPhotos,
    max_drop: float,
    with_preprocessing: bool,
    threads: int,
    on_stage: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Write `out`; returns what was measured: `accuracy_before`, `accuracy_after` on the held-out photos, their number,
    the time of a photo either way and what the CPU has for integers.

    Raises ArtefactError, and writes nothing, where more is lost than `max_drop` (a fraction) and two photos; UsageError
    without ONNX Runtime.
    """
    import_onnxruntime("--int8", "onnxruntime.quantization")  # here, to say early that it is missing
    # beside the target: the system's folder for temporary files may be memory
    with scratch(out, ".plain") as plain, scratch(out, ".int8") as rounded, scratch(out, ".plain-inferred"):
        on_stage("looking at training photos")
        divisors = _divisors(artefact, plain, photos.train, threads)
        on_stage("rounding")
        metadata = write_onnx(artefact, plain, divisors=divisors)
        quantise(plain, rounded)
        on_stage("measuring")
        record = _measured(OnnxClassifier(plain, threads), OnnxClassifier(rounded, threads), photos.val)
        _refuse(record, max_drop)
        if with_preprocessing:
            answers = OnnxClassifier(rounded, threads).probabilities
            metadata = write_onnx(artefact, plain, True, divisors)
            quantise(plain, rounded)
            _compare_photos(artefact.config.preprocessing, open_session(rounded, threads), answers)
        _write_with(replace(metadata, quantisation=record), rounded, out)
    return record


def _divisors(artefact: Artefact, path: Path, photos: Sequence[Photo], threads: int) -> dict[str, np.ndarray]:
    """Of every factored linear, how large each channel between its factors becomes, over how large its weights are."""
    values = between_factors(artefact.config.linears)
    if not values:
        return {}
    write_onnx(artefact, path, more_outputs=values.values())
    session = open_session(path, threads)
    largest: dict[str, np.ndarray] = {}
    preprocessing = artefact.config.preprocessing
    step = max(1, len(photos) // CALIBRATION_PHOTOS)
    for _, view in _readable(photos[::step], preprocessing):
        found = session.run(list(values.values()), {"pixels": normalise(view[None], preprocessing)})
        for linear, value in zip(values, found, strict=True):
            ranges = np.abs(value).reshape(-1, value.shape[-1]).max(0)
            largest[linear] = np.maximum(largest[linear], ranges) if linear in largest else ranges
    if not largest:
        raise NoUsableData("none of the run's training photos can be read any more")
    divisors = {}
    for linear, ranges in largest.items():
        weights = np.abs(artefact.tensors.read(f"{linear}.left", np.float32)).max(0)
        logs = _BALANCE * np.log(np.maximum(ranges, _SMALLEST)) - (1 - _BALANCE) * np.log(
            np.maximum(weights, _SMALLEST)
        )
        divisors[linear] = np.exp(logs - logs.mean()).astype(np.float32)
    return divisors


def _readable(photos: Sequence[Photo], preprocessing: Preprocessing) -> Iterator[tuple[str, np.ndarray]]:
    """(class, view) of each photo that can be read."""
    views = decoded_views((photo.path for photo in photos), preprocessing, 4)
    for photo, (_, view) in zip(photos, views, strict=True):
        if not isinstance(view, UnreadablePhoto):
            yield photo.label, view


def _compare_photos(preprocessing: Preprocessing, session: Any, answers: Callable[[np.ndarray], np.ndarray]) -> None:
    """Raises ArtefactError where the graph with preprocessing answers otherwise than the one without."""
    picture, view = oblong_picture(preprocessing)
    found, expected = session.run(None, {"photos": picture[None]})[0], answers(view[None])
    if not np.abs(found - expected).max() <= LOOSE_TOLERANCE:
        raise ArtefactError("photos are prepared wrongly within the graph here; export without --with-preprocessing")


def quantise(source: Path, target: Path) -> None:
    """The file `source` with products by weights in eight bits, as `target`."""
    quantization = import_onnxruntime("--int8", "onnxruntime.quantization")

    # it advises, once a call, to preprocess the model in a way that holds it twice
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        quantization.quantize_dynamic(
            source,
            target,
            per_channel=True,
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logger.setLevel(level)


def _measured(before: OnnxClassifier, after: OnnxClassifier, photos: Sequence[Photo]) -> dict[str, Any]:
    hits, count = {"before": 0, "after": 0}, 0
    timed: list[np.ndarray] = []
    for label, view in _readable(photos, before.preprocessing):
        count += 1
        for key, classifier in (("before", before), ("after", after)):
            hits[key] += classifier.labels[int(classifier.logits(view[None])[0].argmax())] == label
        timed = timed or [view[None]]
    if not count:
        raise NoUsableData("none of the run's held-out photos can be read any more")
    seconds = _seconds(before, after, timed[0])
    return {
        "accuracy_before": hits["before"] / count,
        "accuracy_after": hits["after"] / count,
        "num_val_images": count,
        "ms_before": round(1000 * seconds[0], 2),
        "ms_after": round(1000 * seconds[1], 2),
        "cpu": integer_instructions(),
    }


def _seconds(before: OnnxClassifier, after: OnnxClassifier, view: np.ndarray) -> tuple[float, float]:
    """Of one photo, in turn; each is run once unmeasured first, while threads of the other stop waiting for work."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for classifier, taken in zip((before, after), times, strict=True):
            classifier.logits(view)
            began = time.perf_counter()
            classifier.logits(view)
            taken.append(time.perf_counter() - began)
    return median(times[0]), median(times[1])


def _refuse(record: dict[str, Any], max_drop: float) -> None:
    lost, photos = record["accuracy_before"] - record["accuracy_after"], record["num_val_images"]
    allowed = max(max_drop, 2 / photos)
    if lost > allowed + 1e-9:
        raise ArtefactError(
            f"in eight bits {100 * record['accuracy_after']:.1f} % of {photos} held-out photos are right, before "
            f"{100 * record['accuracy_before']:.1f} %: more is lost than {100 * allowed:.1f} points; "
            "export without --int8, or allow it with --max-drop"
        )


def _write_with(metadata: OnnxMetadata, source: Path, out: Path) -> None:
    """`source` with other metadata."""
    import onnx

    model = onnx.load(source)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, metadata.to_properties())
    onnx.checker.check_model(model)
    with replacing(out) as file:
        file.write(model.SerializeToString())
