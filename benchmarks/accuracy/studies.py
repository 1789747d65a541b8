"""The studies: which model, on which photos, learns how.

Defaults are chosen on the validation part of fixed splits (`recipes`); what is claimed is measured on random splits,
the same for every method (`against_vanilla`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy.converted import converted
from benchmarks.accuracy.datasets import ROOT, Photos, fixed_split, load_photos, random_split
from benchmarks.accuracy.learn import Variant, head_accuracy, learn, photo_features, settings_of
from benchmarks.accuracy.study import Job
from wasi_edge.bench.subject import Subject, find_subject

EPSILON, CALIBRATION = 0.8, 400
DENSE_MODEL = str(ROOT.parent / "models" / "vit-s14")
WASI, VANILLA, HEAD = Variant(), Variant("vanilla", epochs=10), Variant("head")

# data set: input size in pixels, photos a class
RECIPE_SETS: dict[str, tuple[int, int | None]] = {"clothing": (112, None), "flowers": (56, 100), "cifar10": (56, 100)}
RECIPES: dict[str, Variant] = {
    "wasi": WASI,
    "wasi, lr 2e-5": replace(WASI, learning_rate=2e-5),
    "wasi, lr 8e-5": replace(WASI, learning_rate=8e-5),
    "wasi, lr 1.6e-4": replace(WASI, learning_rate=1.6e-4),
    "wasi, momentum 0.9": replace(WASI, momentum=0.9),
    "wasi, rising over 0.1": replace(WASI, warm_up=0.1),
    "wasi, r 16": replace(WASI, gradient_rank=16),
    "wasi, dense rate x4": replace(WASI, dense_rate=1.0),
    "wasi, crops from 0.6": replace(WASI, smallest_crop=0.6),
    "wasi, no smoothing": replace(WASI, label_smoothing=0.0),
    "vanilla, lr 2e-5": Variant("vanilla", learning_rate=2e-5),
    "vanilla, lr 5e-5": Variant("vanilla", learning_rate=5e-5),
    "vanilla, lr 1e-4": Variant("vanilla", learning_rate=1e-4),
    "lora, lr 5e-4": Variant("lora", learning_rate=5e-4),
    "lora, lr 1e-3": Variant("lora", learning_rate=1e-3),
    "lora, lr 2e-3": Variant("lora", learning_rate=2e-3),
}


def recipes(datasets: list[str], repeats: int) -> Iterator[Job]:
    """Learning rates and what else a step does, each on the validation part of every data set."""
    for seed in range(repeats):
        for name in datasets or RECIPE_SETS:
            size, per_class = RECIPE_SETS[name]
            for label, variant in RECIPES.items():
                yield _job(name, size, per_class, label, variant, seed, fixed=True)


# data set: input size, photos a class, random splits
CLAIM_SETS: dict[str, tuple[int, int | None]] = {
    "clothing": (168, None),
    "flowers": (112, None),
    "hymenoptera": (168, None),
    "cifar10": (84, 700),
}


def against_vanilla(datasets: list[str], repeats: int) -> Iterator[Job]:
    """WASI of the dense network converted on the photos it trains on, its vanilla and closed-form head; and WASI of the
    embedded model: the same splits."""
    for split in range(repeats):
        for name in datasets or CLAIM_SETS:
            size, per_class = CLAIM_SETS[name]
            yield _converted_job(name, size, per_class, split)
            for label, variant in (("wasi, embedded", WASI), ("head", HEAD), ("vanilla", VANILLA)):
                yield _job(name, size, per_class, label, variant, split, fixed=False)


def _converted_job(name: str, size: int, per_class: int | None, split: int) -> Job:
    dense = _subject(DENSE_MODEL, size)

    def work() -> dict[str, Any]:
        photos = _photos(name, size, per_class)
        parts = random_split(photos, split)
        with converted(DENSE_MODEL, photos, parts.train, CALIBRATION, EPSILON, size) as (subject, seconds):
            return learn(subject, photos, parts, WASI, split) | {"conversion_seconds": round(seconds, 1)}

    settings = settings_of(WASI, dense, photos_per_class=per_class, epsilon=EPSILON, calibration_photos=CALIBRATION)
    return Job(name, "wasi", split, work, settings)


# data set: photos a class, and how many of all are trained on and tested on
HEAD_SETS: dict[str, tuple[int | None, int, int]] = {
    "clothing": (None, 200, 200),
    "flowers": (None, 500, 500),
    "hymenoptera": (None, 60, 30),
    "cifar10": (500, 2500, 2500),
}


def embedded_heads(datasets: list[str], repeats: int) -> Iterator[Job]:
    """The closed-form head on the features of the dense network and of the embedded model, at 168 px."""
    for name in datasets or HEAD_SETS:
        per_class, train, test = HEAD_SETS[name]
        for label, model in (("dense", DENSE_MODEL), ("embedded", "default")):
            settings = settings_of(HEAD, _subject(model, 168), photos_per_class=per_class, train=train, test=test)
            for split in range(repeats):
                yield Job(name, label, split, partial(_head_test, name, model, per_class, train, test, split), settings)


def _head_test(name: str, model: str, per_class: int | None, train: int, test: int, split: int) -> dict[str, Any]:
    photos = _photos(name, 168, per_class)
    order = np.random.default_rng(split).permutation(len(photos))
    features = _features(name, model, per_class)
    return {"test": head_accuracy(features, photos, order[:train], order[train : train + test])}


@lru_cache(maxsize=1)
def _features(name: str, model: str, per_class: int | None) -> torch.Tensor:
    return photo_features(_subject(model, 168), _photos(name, 168, per_class))


STUDIES: dict[str, Callable[[list[str], int], Iterator[Job]]] = {
    "embedded_heads": embedded_heads,
    "recipes": recipes,
    "against_vanilla": against_vanilla,
}


def _job(name: str, size: int, per_class: int | None, label: str, variant: Variant, split: int, fixed: bool) -> Job:
    subject = _subject("default" if variant.method == "wasi" else DENSE_MODEL, size)

    def work() -> dict[str, Any]:
        photos = _photos(name, size, per_class)
        parts = fixed_split(name, photos) if fixed else random_split(photos, split)
        return learn(subject, photos, parts, variant, split)

    return Job(name, label, split, work, settings_of(variant, subject, photos_per_class=per_class))


@lru_cache(maxsize=4)
def _subject(model: str, size: int) -> Subject:
    return find_subject(model, size)


@lru_cache(maxsize=1)
def _photos(name: str, size: int, per_class: int | None) -> Photos:
    return load_photos(name, _subject(DENSE_MODEL, size).preprocessing, per_class)
