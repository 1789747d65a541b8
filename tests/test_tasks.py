"""The tasks that keep defaults honest: their splits, and choosing without the data that is reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from photos import save_jpeg, scene
from PIL import Image

from benchmarks.accuracy import leave_one_out, tasks
from benchmarks.accuracy.leave_one_out import CANDIDATES, OURS, chosen, table
from benchmarks.accuracy.study import Store
from benchmarks.accuracy.tasks import TASKS, Task
from benchmarks.mosaics import TILE
from wasi_edge.preprocessing import Preprocessing

SMALL = Preprocessing(32)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photos of two classes in folders, and mosaics of two with a test part."""
    monkeypatch.setattr(tasks, "ROOT", tmp_path)
    tasks._photos.cache_clear()
    for label in ("mug", "key"):
        (tmp_path / "things" / label).mkdir(parents=True)
        for number in range(20):
            save_jpeg(tmp_path / "things" / label / f"{number:02d}.jpg", scene(number))
    rng = np.random.default_rng(0)
    for part, rows in (("train", 4), ("test", 2)):
        (tmp_path / "cifar10" / part).mkdir(parents=True)
        for label in ("cat", "dog"):
            pixels = rng.integers(0, 256, (rows * TILE, 5 * TILE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "cifar10" / part / f"{label}.webp", lossless=True)
    return tmp_path


@pytest.mark.parametrize("data", ["things", "cifar10"])
def test_parts_of_a_split_share_no_photo_and_have_as_many_of_each_class(root: Path, data: str) -> None:
    task = Task("small", data, 32, 8, 6)
    photos = task.photos(SMALL)
    assert len(task.pictures()) == len(photos)
    splits = [task.split(photos, number) for number in (0, 1)]
    for split in splits:
        parts = [set(map(int, part)) for part in (split.train, split.val, split.test)]
        assert sum(map(len, parts)) == len(set.union(*parts))
        labels = photos.labels.numpy()
        assert [np.bincount(labels[part]).tolist() for part in (split.train, split.val, split.test)] == [
            [8, 8],
            [4, 4],
            [6, 6],
        ]
    assert not np.array_equal(splits[0].train, splits[1].train)
    assert np.array_equal(splits[0].test, task.split(photos, 0).test)


def test_photos_of_a_test_part_are_never_trained_on(root: Path) -> None:
    task = Task("small", "cifar10", 32, 8, 6)
    photos = task.photos(SMALL)
    split = task.split(photos, 0)
    assert all(photos.names[i].startswith("test/") for i in split.test)
    assert not any(photos.names[i].startswith("test/") for i in (*split.train, *split.val))


def test_draws_of_classes_share_none_and_are_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "ROOT", tmp_path)
    (tmp_path / tasks.TINY / "train").mkdir(parents=True)
    for number in range(200):
        (tmp_path / tasks.TINY / "train" / f"n{number:03d}.webp").touch()
    draws = [tasks.tiny_classes(name) for name in tasks.TINY_DRAWS]
    assert [len(draw) for draw in draws] == [10, 10, 50]
    assert len(set(tasks.reserved_classes())) == 70 == len(set().union(*draws))


def test_absent_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="things is absent"):
        Task("small", "things", 32, 8, 6).photos(SMALL)


def test_a_task_is_reported_by_what_other_data_chose() -> None:
    some = [Task(name, data, 84, 10, 10) for name, data in (("a-1", "a"), ("a-2", "a"), ("b", "b"), ("c", "c"))]
    scores = {
        "loved by a": {"a-1": 0.99, "a-2": 0.99, "b": 0.5, "c": 0.5},
        "good elsewhere": {"a-1": 0.1, "a-2": 0.1, "b": 0.6, "c": 0.6},
    }
    assert [chosen(scores, some, task.data) for task in some] == [
        "good elsewhere",
        "good elsewhere",
        "loved by a",
        "loved by a",
    ]
    # what a candidate lacks is not counted for another
    assert chosen({"one": {"b": 0.1}, "two": {"b": 0.2, "c": 0.0}}, some, "a") == "two"
    assert chosen({"one": {"b": 0.1}, "two": {"c": 0.2}}, some, "a") is None


def test_the_table_pairs_splits_and_leaves_out_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = list(CANDIDATES)[:2]
    monkeypatch.setattr(leave_one_out, "CANDIDATES", {label: CANDIDATES[label] for label in (first, second)})
    store = Store("leave_one_out", {}, tmp_path)
    some = [TASKS[1], TASKS[2]]
    for task, values in zip(some, ((0.8, 0.9), (0.7, 0.6)), strict=True):
        for label, value in zip((first, second), values, strict=True):
            for split in (0, 1):
                store.runs[f"{task.name} | {label} | {split}"] = {"best": {"test": value + 0.01 * split}}
        store.runs[f"{task.name} | vanilla | 0"] = {"best": {"test": 0.85}}
        store.runs[f"{task.name} | lite0, frozen | 0"] = {"test": 0.5}
    rows = {row["task"]: row for row in table(store, some)}
    row = rows["clothing-40"]
    assert row["candidate"] == first  # which is ahead on flowers
    assert row[OURS] == pytest.approx(80.5) and row["- vanilla"] == pytest.approx(-5) and row["lite0, frozen"] == 50
    assert row["- head"] is None and rows["flowers-20"]["candidate"] == second
    assert rows["mean of 2"]["vanilla"] == pytest.approx(85) and rows["mean of 2"]["- head"] is None
    assert rows[f"candidate: {first}"][OURS] == pytest.approx(75.5)
