"""python -m benchmarks.accuracy.heads [--models default,dense] [--features build/features]

Heads on frozen features, over the ten tasks and their splits: ours in closed form, and ordinary logistic regression
(standardised features, L2, its weight by five folds). Features are kept in a folder and worked out once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy.datasets import Photos
from benchmarks.accuracy.studies import DENSE_MODEL
from benchmarks.accuracy.study import write_table
from benchmarks.accuracy.tasks import SPLITS, TASKS, Task
from wasi_edge.bench.subject import find_subject
from wasi_edge.models.vanilla import build_vanilla
from wasi_edge.training import head as closed_form

MODELS = {"default": "default", "dense": DENSE_MODEL}
DECAYS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
FOLDS, _AT_ONCE = 5, 32
Classifier = Callable[[Tensor, Tensor, int], Callable[[Tensor], Tensor]]


def main() -> None:
    """Features that are missing, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--features", type=Path, default=Path("build/features"))
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    rows = []
    for model in given.models.split(","):
        own = [_row(model, task, given.features) for task in TASKS]
        names = [key for key, value in own[0].items() if isinstance(value, float)]
        rows += [*own, {"model": model, "task": "mean"} | {key: fmean(row[key] for row in own) for key in names}]
    write_table("heads", rows, "test accuracy in percent, mean of three splits")


def _row(model: str, task: Task, folder: Path) -> dict[str, Any]:
    photos = task.photos(find_subject(DENSE_MODEL, task.size).preprocessing)
    features = features_of(model, task, photos, folder)
    classes, found = len(photos.classes), {}
    for split in (task.split(photos, number) for number in SPLITS):
        train, test = torch.from_numpy(split.train), torch.from_numpy(split.test)
        for name, classify in HEADS.items():
            answer = classify(features[train], photos.labels[train], classes)
            right = (answer(features[test]).argmax(1) == photos.labels[test]).float().mean()
            found.setdefault(name, []).append(100 * float(right))
    return {"model": model, "task": task.name} | {name: fmean(values) for name, values in found.items()}


def features_of(model: str, task: Task, photos: Photos, folder: Path) -> Tensor:
    """Features (n, F) of the photos that splits use, zero for others; read from `folder` where they are there."""
    path = folder / f"{model}-{task.name}.pt"
    used = sorted({int(i) for number in SPLITS for part in _parts(task, photos, number) for i in part})
    if path.exists():
        held = torch.load(path, weights_only=True)
        if held["used"] == used:
            return held["features"]
    subject = find_subject(MODELS[model], task.size)
    network = build_vanilla(subject.geometry, subject.reader(None), task.size, 1)
    parts = [used[first : first + _AT_ONCE] for first in range(0, len(used), _AT_ONCE)]
    features = torch.zeros(len(photos), subject.geometry.feature_width)
    for part in parts:
        features[part] = network.features(photos.inputs(part))
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"used": used, "features": features}, path)
    return features


def _parts(task: Task, photos: Photos, number: int) -> Iterator[np.ndarray]:
    split = task.split(photos, number)
    yield from (split.train, split.val, split.test)


def ours(features: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """As `finetune` fits it."""
    head = closed_form.fit_head(features, labels, classes)
    return lambda x: x @ head.weight.t() + head.bias


def logistic(features: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Logistic regression on standardised features, the weight of its L2 term by five stratified folds."""
    mean, deviation = features.mean(0), features.std(0)
    scaled = (features - mean) / deviation.clamp_min(1e-4 * float(deviation.max()))
    fold = torch.zeros(len(labels), dtype=torch.long)
    for label in range(classes):
        members = (labels == label).nonzero().flatten()
        fold[members[torch.randperm(len(members), generator=torch.Generator().manual_seed(label))]] = (
            torch.arange(len(members)) % FOLDS
        )

    def loss(decay: float) -> float:
        total = 0.0
        for number in range(FOLDS):
            kept, left_out = fold != number, fold == number
            weight = _logistic_weight(scaled[kept], labels[kept], classes, decay)
            logits = _with_one(scaled[left_out]) @ weight.t()
            total += float(torch.nn.functional.cross_entropy(logits, labels[left_out], reduction="sum"))
        return total

    weight = _logistic_weight(scaled, labels, classes, min(DECAYS, key=loss))
    return lambda x: _with_one((x - mean) / deviation.clamp_min(1e-4 * float(deviation.max()))) @ weight.t()


def _logistic_weight(features: Tensor, labels: Tensor, classes: int, decay: float) -> Tensor:
    """(C, F + 1), the bias last and free of decay."""
    x = _with_one(features).double()
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(x @ weight.t(), labels)
            loss = loss + decay / 2 * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return weight.detach().float()


def _with_one(features: Tensor) -> Tensor:
    return torch.cat((features, torch.ones(len(features), 1, dtype=features.dtype)), 1)


HEADS: dict[str, Classifier] = {"ours": ours, "logistic regression": logistic}


if __name__ == "__main__":
    main()
