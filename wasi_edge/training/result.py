"""What a finished run leaves behind: report.json, report.html, log.jsonl and the statistics for the next run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wasi_edge.atomic import write_bytes_atomic, write_json_atomic
from wasi_edge.metrics import confusion_matrix, scores
from wasi_edge.report.html import render_finetune_report
from wasi_edge.report.page import write_page
from wasi_edge.report.sections import ReportPhoto
from wasi_edge.tensorfile import TensorFile, TensorWriter
from wasi_edge.training.head import FeatureStatistics, merge_statistics
from wasi_edge.training.loop import Validation
from wasi_edge.training.photos import PhotoSet
from wasi_edge.training.trainer import Trainer

STATISTICS_NAME = "statistics.safetensors"
# enough photos of a class to know its mean and spread; more would only cost time
_STATISTICS_PHOTOS = 64
_RIGHT_PHOTOS = 40
_WRONG_PHOTOS = 40


def held_out_results(
    validation: Validation, held_out: PhotoSet, labels: Sequence[str]
) -> tuple[dict[str, Any], list[ReportPhoto]]:
    """Confusion and per-class scores of the held-out photos, and some of them with their predictions."""
    if len(held_out) == 0:
        return {}, []
    predicted = validation.logits.argmax(1)
    confusion = confusion_matrix(held_out.labels.numpy(), predicted.numpy(), len(labels))
    probability = torch.softmax(validation.logits, 1).amax(1)
    right = [i for i in range(len(held_out)) if predicted[i] == held_out.labels[i]]
    wrong = [i for i in range(len(held_out)) if predicted[i] != held_out.labels[i]]
    wrong.sort(key=lambda i: -float(probability[i]))
    step = max(1, len(right) // _RIGHT_PHOTOS)
    chosen = right[::step][:_RIGHT_PHOTOS] + wrong[:_WRONG_PHOTOS]
    photos = [
        ReportPhoto(
            pixels=held_out.views([i])[0],
            true_label=labels[int(held_out.labels[i])],
            predicted_label=labels[int(predicted[i])],
            probability=float(probability[i]),
            name=held_out.cache.paths[int(held_out.indices[i])].name,
        )
        for i in chosen
    ]
    figures = scores(confusion, list(labels))
    return {
        "confusion": confusion.tolist(),
        "per_class": figures["per_class"],
        "balanced_accuracy": figures["balanced_accuracy"],
    }, photos


def accuracy_on(validation: Validation, held_out: PhotoSet, classes: set[int]) -> float | None:
    """Accuracy on the held-out photos of the given classes, None where there are none."""
    chosen = torch.tensor([int(label) in classes for label in held_out.labels], dtype=torch.bool)
    if not bool(chosen.any()):
        return None
    hits = validation.logits[chosen].argmax(1) == held_out.labels[chosen]
    return float(hits.float().mean())


def old_and_new(labels: Sequence[str], count: int, validation: Validation, held_out: PhotoSet) -> dict[str, Any]:
    """The first `count` of the labels, which an earlier run knew, those that are new, and how well each are recognised
    now."""
    present = set(held_out.cache.labels)
    return {
        "old_classes": list(labels[:count]),
        "new_classes": list(labels[count:]),
        "absent_classes": [label for label in labels if label not in present],
        "old_class_accuracy": accuracy_on(validation, held_out, set(range(count))),
        "new_class_accuracy": accuracy_on(validation, held_out, set(range(count, len(labels)))),
    }


def count_statistics_photos(num_classes: int) -> int:
    """Photos that `save_statistics` looks at, at most."""
    return num_classes * _STATISTICS_PHOTOS


def save_statistics(
    trainer: Trainer, photos: PhotoSet, num_classes: int, earlier: FeatureStatistics | None, folder: Path
) -> None:
    """Feature statistics of the training photos under the final model, and the photos' hashes.

    A later run fits the head of classes that it has no photos of from them, and keeps these photos out of its
    validation. No photo can be rebuilt from either.
    """
    chosen: list[int] = []
    for label in range(num_classes):
        members = (photos.labels == label).nonzero().flatten().tolist()
        step = max(1, len(members) // _STATISTICS_PHOTOS)
        chosen += members[::step][:_STATISTICS_PHOTOS]
    chosen.sort()
    features = features_of(trainer, photos, chosen)
    statistics = FeatureStatistics.of(features, photos.labels[chosen], num_classes)
    if earlier is not None:
        statistics = merge_statistics(statistics, earlier)
    hashes = np.array([photos.cache.hashes[int(i)] for i in photos.indices], dtype=np.uint64)
    with TensorWriter(folder / STATISTICS_NAME, {"format": "wasi-edge statistics"}) as writer:
        writer.add("second", statistics.second.numpy())
        writer.add("sums", statistics.sums.numpy())
        writer.add("counts", statistics.counts.numpy())
        writer.add("training_hashes", hashes)


def load_statistics(folder: Path, num_classes: int, width: int) -> tuple[FeatureStatistics | None, set[int]]:
    """What `save_statistics` wrote, padded to `num_classes`, and the hashes of the photos trained on."""
    path = folder / STATISTICS_NAME
    if not path.exists():
        return None, set()
    with TensorFile(path) as file:
        second, sums, counts = (torch.from_numpy(file.read(name)) for name in ("second", "sums", "counts"))
        hashes = {int(value) for value in file.read("training_hashes")}
    if second.shape != (width, width) or sums.shape[0] > num_classes:
        return None, hashes
    missing = num_classes - len(counts)
    sums = torch.cat((sums, torch.zeros(missing, width, dtype=sums.dtype)))
    return FeatureStatistics(second, sums, torch.cat((counts, torch.zeros(missing, dtype=counts.dtype)))), hashes


def features_of(trainer: Trainer, photos: PhotoSet, positions: Sequence[int], on_done: Any = None) -> Tensor:
    """Features (n, F) of the centre views at `positions`."""
    parts = []
    for first in range(0, len(positions), photos.batch):
        chosen = positions[first : first + photos.batch]
        parts.append(trainer.features(photos.inputs(chosen)).clone())
        if on_done is not None:
            on_done(first + len(chosen))
    return torch.cat(parts)


def write_reports(report: Mapping[str, Any], photos: list[ReportPhoto], out: Path) -> None:
    """report.json, report.html and log.jsonl in `out`, each atomically."""
    write_json_atomic(out / "report.json", dict(report))
    write_page(out / "report.html", render_finetune_report(dict(report), photos))
    lines = "".join(json.dumps(entry) + "\n" for entry in report["history"])
    write_bytes_atomic(out / "log.jsonl", lines.encode())
