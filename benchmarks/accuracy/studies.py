"""The studies: which model, on which photos, learns how.

Defaults are chosen on folds of the photos that fixed splits do not keep for tests (`recipes`); what is claimed is
measured on random splits, the same for every method (`against_vanilla`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy.converted import converted, converted_by_command, simpler
from benchmarks.accuracy.datasets import ROOT, Photos, Split, all_photos, folds, load_photos, random_split
from benchmarks.accuracy.learn import ONE_RATE, Variant, head_accuracy, learn, photo_features, settings_of
from benchmarks.accuracy.study import Job
from wasi_edge.artefact import read_config
from wasi_edge.bench.subject import Subject, find_subject
from wasi_edge.method import Optimizer

EPSILON, CALIBRATION = 0.8, 400
DENSE_MODEL = str(ROOT.parent / "models" / "vit-s14")
Divide = Callable[[Photos], Split]
WASI, VANILLA, HEAD = Variant(), Variant("vanilla", epochs=10), Variant("head")
EVEN = Variant(**ONE_RATE)


@dataclass(frozen=True)
class Source:
    """Photos of a data set at an input size: all, or so many of each class from the `first` on."""

    name: str
    size: int
    per_class: int | None = None
    first: int = 0

    def photos(self) -> Photos:
        return _photos(self)

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on; the size stands beside the model's."""
        return {"photos_per_class": self.per_class} | ({"first_photo": self.first} if self.first else {})


# of cifar10 photos that `against_vanilla` never sees
RECIPE_SETS = (Source("cifar10", 84, 200, 1000), Source("clothing", 168), Source("flowers", 112))
# a fold of cifar10 trains on and validates with three times as many photos as one of the others: two are enough
RECIPE_FOLDS = {"cifar10": 2, "clothing": 3, "flowers": 3}
# rows that begin so are of the dense network, converted on the photos that they train on
CONVERTED = "wasi, one rate"
RECIPES: dict[str, Variant] = {
    CONVERTED: EVEN,
    f"{CONVERTED}, 1e-4": replace(EVEN, learning_rate=1e-4),
    f"{CONVERTED}, 1.6e-4": replace(EVEN, learning_rate=1.6e-4),
    "vanilla": VANILLA,
}
# on the first fold alone: far behind there, or one of many
FIRST_FOLD_RECIPES: dict[str, Variant] = {
    "vanilla, lr 2e-5": replace(VANILLA, learning_rate=2e-5),
    "vanilla, lr 1e-4": replace(VANILLA, learning_rate=1e-4),
    "embedded": WASI,
    "embedded, one rate": EVEN,
    "embedded, all blocks": replace(WASI, trained_share=1.0),
    "embedded, lr 6e-5": replace(WASI, learning_rate=6e-5),
    "embedded, lr 2.4e-4": replace(WASI, learning_rate=2.4e-4),
    "embedded, 10 epochs": replace(WASI, epochs=10),
    "embedded, crops from 0.6": replace(WASI, smallest_crop=0.6),
    "embedded, no smoothing": replace(WASI, label_smoothing=0.0),
}


def recipes(datasets: list[str], repeats: int) -> Iterator[Job]:
    """Learning rates and what else a step does, on folds of every data set's training and validation photos."""
    for fold, source in itertools.product(range(repeats), RECIPE_SETS):
        if fold >= RECIPE_FOLDS[source.name] or (datasets and source.name not in datasets):
            continue
        split = partial(folds, source.name, number=fold)
        for label, variant in (RECIPES | FIRST_FOLD_RECIPES if fold == 0 else RECIPES).items():
            yield _row_job(source, label, variant, fold, split)


CLAIM_SETS = (
    Source("clothing", 168),
    Source("flowers", 112),
    Source("hymenoptera", 168),
    Source("cifar10", 84, 700),
)
# of a set with many photos six epochs are too few: more of them still take less than vanilla's ten, and that many steps
# `finetune` learns by SGD; the other rule at twice its usual rate
LONG = replace(WASI, epochs=16, optimizer=Optimizer.SGD, weight_decay=0.0)
LONG_POLAR, LARGE_SETS = replace(WASI, epochs=16, learning_rate=2.4e-4), ("cifar10",)
OURS, OURS_LONG = "wasi, embedded", "wasi, embedded, 16 epochs"
# few photos are tested on and a run takes minutes: more seeds on the same splits tell luck in training from the method
SEEDED_SETS, OTHER_SEEDS = ("clothing", "hymenoptera"), (5, 10)


def claim_rows(source: Source) -> dict[str, Variant]:
    """What `against_vanilla` compares on a set."""
    rows = {"head": HEAD, "vanilla": VANILLA}
    if source.name in LARGE_SETS:
        return rows | {OURS_LONG: LONG, f"{OURS_LONG}, polar": LONG_POLAR}
    return rows | {OURS: WASI, "embedded, one rate": EVEN, CONVERTED: EVEN}


def against_vanilla(datasets: list[str], repeats: int) -> Iterator[Job]:
    """WASI of the embedded model, and the dense network's vanilla and closed-form head: the same splits. Of sets that
    are not large, WASI at one rate too: of the embedded model, and of the dense network converted on the photos that it
    trains on."""
    for repeat in range(repeats):
        split = partial(random_split, seed=repeat)
        for source in CLAIM_SETS:
            if datasets and source.name not in datasets:
                continue
            for label, variant in claim_rows(source).items():
                yield _row_job(source, label, variant, repeat, split)
            for more in OTHER_SEEDS if source.name in SEEDED_SETS else ():
                yield _job(source, seeded(OURS, more), WASI, repeat, split, "default", more)


def seeded(label: str, more: int) -> str:
    """The row of the same with seeds larger by so much."""
    return f"{label}, seed + {more}"


# data set: photos a class, and how many of all are trained on and tested on
HEAD_SETS: dict[str, tuple[int | None, int, int]] = {
    "clothing": (None, 200, 200),
    "flowers": (None, 500, 500),
    "hymenoptera": (None, 60, 29),
    "cifar10": (500, 2500, 2500),
}


def embedded_heads(datasets: list[str], repeats: int) -> Iterator[Job]:
    """The closed-form head on the features of the dense network and of the embedded model, at 168 px."""
    for name in datasets or HEAD_SETS:
        per_class, train, test = HEAD_SETS[name]
        for label, model in (("dense", DENSE_MODEL), ("embedded", "default")):
            settings = settings_of(
                HEAD, _subject(model, 168), photos_per_class=per_class, train=train, test=test, head="standardised"
            )
            for split in range(repeats):
                yield Job(name, label, split, partial(_head_test, name, model, per_class, train, test, split), settings)


def _head_test(name: str, model: str, per_class: int | None, train: int, test: int, split: int) -> dict[str, Any]:
    photos = _photos(Source(name, 168, per_class))
    order = np.random.default_rng(split).permutation(len(photos))
    features = _features(name, model, per_class)
    return {"test": head_accuracy(features, photos, order[:train], order[train : train + test])}


# what a conversion is calibrated on, the default last
CONVERTED_BY = ("nothing", "photos-1k", "its photos")
# what the photos decide less of: plain ranks, factors by truncation
SIMPLER = {"ranks of epsilon, truncated": (True, True), "ranks of epsilon": (True, False), "truncated": (False, True)}


def conversion(datasets: list[str], repeats: int) -> Iterator[Job]:
    """The dense network converted by the command, at most 512 MB: its closed-form head, and WASI at `EVEN` from there.

    200 photos of `clothing` are calibrated on and trained on, 200 others tested on, as `embedded_heads` has them; the
    rest choose the epoch. On the first split also what other photos are worth, none, and each half of the calibration:
    the ranks, and the factors.
    """
    subject, source = _subject(DENSE_MODEL, 168), Source("clothing", 168)
    for split in range(repeats):
        yield Job(source.name, "dense", split, partial(_dense_heads, source, split), settings_of(HEAD, subject))
        for epsilon in (0.8, 0.6):
            for calibration in CONVERTED_BY if split == 0 else CONVERTED_BY[-1:]:
                settings = settings_of(EVEN, subject, epsilon=epsilon, calibration=calibration)
                run = partial(_conversion, source, calibration, epsilon, split)
                yield Job(source.name, f"{epsilon}, calibrated on {calibration}", split, run, settings)
            for label, less in SIMPLER.items() if split == 0 else ():
                settings = settings_of(EVEN, subject, epsilon=epsilon, calibration="its photos", less=less)
                run = partial(_simpler_conversion, source, less, epsilon, split)
                yield Job(source.name, f"{epsilon}, calibrated on its photos, {label}", split, run, settings)


def _dense_heads(source: Source, split: int) -> dict[str, Any]:
    photos = source.photos()
    return _heads(_features(source.name, DENSE_MODEL, None), photos, _conversion_split(photos, split))


def _conversion(source: Source, calibration: str, epsilon: float, split: int) -> dict[str, Any]:
    photos = source.photos()
    parts = _conversion_split(photos, split)
    paths: list[Path] = []
    if calibration == "its photos":
        paths = [ROOT / source.name / photos.names[i] for i in parts.train]
    elif calibration == "photos-1k":
        paths = all_photos(ROOT / "photos-1k")
    with converted_by_command(DENSE_MODEL, paths, epsilon, source.size, "512MB") as (subject, measured):
        return _before_and_after(subject, photos, parts, split) | measured


def _simpler_conversion(source: Source, less: tuple[bool, bool], epsilon: float, split: int) -> dict[str, Any]:
    photos = source.photos()
    parts = _conversion_split(photos, split)
    with (
        simpler(*less),
        converted(DENSE_MODEL, photos, parts.train, len(parts.train), epsilon, source.size) as (subject, seconds),
    ):
        assert subject.folder is not None
        shapes = read_config(subject.folder).tensor_shapes().values()
        measured = {"seconds": round(seconds, 1), "stored_parameters": sum(map(math.prod, shapes))}
        return _before_and_after(subject, photos, parts, split) | measured


def _before_and_after(subject: Subject, photos: Photos, parts: Split, seed: int) -> dict[str, Any]:
    heads = _heads(photo_features(subject, photos), photos, parts)
    tuned = learn(subject, photos, parts, EVEN, seed)["best"]
    return {**heads, "tuned": tuned["test"], "tuned_val": tuned["val"]}


def _conversion_split(photos: Photos, split: int) -> Split:
    order = np.random.default_rng(split).permutation(len(photos))
    return Split(train=order[:200], val=order[400:], test=order[200:400])


def _heads(features: torch.Tensor, photos: Photos, parts: Split) -> dict[str, float]:
    unseen = np.concatenate([parts.test, parts.val])
    tested = {"test": parts.test, "all unseen": unseen}
    return {name: head_accuracy(features, photos, parts.train, part) for name, part in tested.items()}


@lru_cache(maxsize=1)
def _features(name: str, model: str, per_class: int | None) -> torch.Tensor:
    return photo_features(_subject(model, 168), _photos(Source(name, 168, per_class)))


STUDIES: dict[str, Callable[[list[str], int], Iterator[Job]]] = {
    "conversion": conversion,
    "embedded_heads": embedded_heads,
    "recipes": recipes,
    "against_vanilla": against_vanilla,
}
# splits or folds of each
REPEATS = {"conversion": 3, "embedded_heads": 5, "recipes": 3, "against_vanilla": 5}


def _row_job(source: Source, label: str, variant: Variant, repeat: int, split: Divide) -> Job:
    """A run of the network that its row is about: converted, embedded, or dense."""
    if label.startswith(CONVERTED):
        return _converted_job(source, label, variant, repeat, split)
    return _job(source, label, variant, repeat, split, "default" if variant.method == "wasi" else DENSE_MODEL)


def _job(source: Source, label: str, variant: Variant, repeat: int, split: Divide, model: str, more: int = 0) -> Job:
    """The seed is the number of the repetition and so much `more`."""
    subject, settings = _subject(model, source.size), source.settings | ({"seed_offset": more} if more else {})

    def work() -> dict[str, Any]:
        photos = source.photos()
        return learn(subject, photos, split(photos), variant, repeat + more)

    return Job(source.name, label, repeat, work, settings_of(variant, subject, **settings))


def _converted_job(source: Source, label: str, variant: Variant, repeat: int, split: Divide) -> Job:
    def work() -> dict[str, Any]:
        photos = source.photos()
        parts = split(photos)
        with converted(DENSE_MODEL, photos, parts.train, CALIBRATION, EPSILON, source.size) as (subject, seconds):
            return learn(subject, photos, parts, variant, repeat) | {"conversion_seconds": round(seconds, 1)}

    settings = source.settings | {"epsilon": EPSILON, "calibration_photos": CALIBRATION}
    return Job(source.name, label, repeat, work, settings_of(variant, _subject(DENSE_MODEL, source.size), **settings))


@lru_cache(maxsize=4)
def _subject(model: str, size: int) -> Subject:
    return find_subject(model, size)


@lru_cache(maxsize=4)
def _photos(source: Source) -> Photos:
    preprocessing = _subject(DENSE_MODEL, source.size).preprocessing
    return load_photos(source.name, preprocessing, source.per_class, source.first)
