"""The split: bursts stay together, classes do not disturb each other, nothing depends on luck."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import photos
import pytest
from PIL import Image, ImageEnhance

from wasi_edge.data.folder import scan_folder
from wasi_edge.data.split import MAX_DISTANCE, difference_hash, near_duplicate_groups, split
from wasi_edge.errors import UsageError
from wasi_edge.preprocess import open_photo, shrink
from wasi_edge.preprocessing import Preprocessing


def distance(first: int, second: int) -> int:
    return (first ^ second).bit_count()


def nudged(picture: Image.Image, seed: int) -> Image.Image:
    """The next shot of a burst: slightly shifted, turned and brighter."""
    rng = np.random.default_rng(seed)
    width, height = picture.size
    dx, dy = rng.uniform(-0.01, 0.01, 2)
    box = (width * (0.015 + dx), height * (0.015 + dy), width * (0.985 + dx), height * (0.985 + dy))
    moved = picture.rotate(rng.uniform(-0.5, 0.5), Image.Resampling.BICUBIC).resize(picture.size, box=box)
    return ImageEnhance.Brightness(moved).enhance(rng.uniform(0.95, 1.05))


def test_the_hash_is_64_bits_and_mirrors() -> None:
    ramp = np.tile(np.linspace(255, 0, 90).astype(np.uint8)[None, :, None], (80, 1, 3))
    assert difference_hash(ramp) == 2**64 - 1
    assert difference_hash(np.ascontiguousarray(ramp[:, ::-1])) == 0


def test_the_hash_survives_scale_and_brightness() -> None:
    picture = photos.scene(1, 800, 600)
    other = ImageEnhance.Brightness(picture.resize((200, 150))).enhance(0.8)
    assert distance(difference_hash(np.asarray(picture)), difference_hash(np.asarray(other))) <= 3


def test_groups_join_through_chains_and_respect_classes() -> None:
    far = 0xFFFF_FFFF_0000_0000
    hashes = [0, 2**6 - 1, 2**12 - 1, far, 0]
    assert near_duplicate_groups(hashes, max_distance=6) == [0, 0, 0, 1, 0]
    assert near_duplicate_groups(hashes, ["a", "a", "a", "a", "b"], 6) == [0, 0, 0, 1, 2]
    assert near_duplicate_groups(hashes, max_distance=5) == [0, 1, 2, 3, 0]
    assert near_duplicate_groups([]) == []


def test_the_distance_is_exact_over_all_64_bits_and_blocks() -> None:
    rng = np.random.default_rng(0)
    hashes = [int(word) for word in rng.integers(0, 2**64, 600, dtype=np.uint64)]
    # A partner 300 places on, so in another block of rows, 6 bits away; and one 7 bits away.
    for index in range(50):
        flips = rng.choice(64, 7, replace=False)
        hashes[300 + index] = hashes[index] ^ sum(1 << int(bit) for bit in flips[: 6 + index % 2])
    groups = near_duplicate_groups(hashes, max_distance=6)
    assert [groups[300 + i] == groups[i] for i in range(50)] == [i % 2 == 0 for i in range(50)]


def test_five_thousand_photos_take_seconds_at_most() -> None:
    hashes = [int(word) for word in np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64)]
    start = time.perf_counter()
    near_duplicate_groups(hashes)
    assert time.perf_counter() - start < 5


def test_a_rendered_burst_is_one_group_and_scenes_are_not() -> None:
    pictures = [nudged(photos.scene(seed, 400, 300), 10 * seed + shot) for seed in range(6) for shot in range(8)]
    groups = near_duplicate_groups([difference_hash(np.asarray(picture)) for picture in pictures])
    assert len(set(groups)) <= 9 and all(len(set(groups[8 * s : 8 * s + 8])) <= 2 for s in range(6))
    assert all(set(groups[:8]).isdisjoint(groups[8 * s : 8 * s + 8]) for s in range(1, 6))


@pytest.mark.parametrize("seed", range(5))
def test_no_group_stands_on_both_sides(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = [f"c{index % 3}" for index in range(120)]
    groups = [int(g) * 3 + index % 3 for index, g in enumerate(rng.integers(0, 12, 120))]
    train, val = split(labels, groups, [None] * 120, 0.2, seed)
    assert {groups[i] for i in train}.isdisjoint(groups[i] for i in val)
    assert sorted([*train, *val]) == list(range(120))
    for label in set(labels):
        assert any(labels[i] == label for i in train) and any(labels[i] == label for i in val)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_each_class_trains_and_validates_if_it_has_two_groups(fraction: float) -> None:
    labels = ["burst"] * 9 + ["pair"] * 2 + ["uneven"] * 10
    groups = [0] * 9 + [1, 2] + [3] * 9 + [4]
    train, val = split(labels, groups, [None] * 21, fraction, 0)
    for label in ("pair", "uneven"):
        assert any(labels[i] == label for i in train) and any(labels[i] == label for i in val)
    assert all(labels[i] != "burst" for i in val)


def test_the_fraction_holds_for_single_photos() -> None:
    labels = ["a"] * 50 + ["b"] * 100
    train, val = split(labels, list(range(150)), [None] * 150, 0.2, 7)
    assert (len(train), len(val)) == (120, 30) and sum(val < 50) == 10


def test_another_class_does_not_reshuffle() -> None:
    alone = split(["m"] * 40, list(range(40)), [None] * 40, 0.25, 3)[1]
    labels = ["a"] * 10 + ["m"] * 40 + ["z"] * 10
    beside = split(labels, list(range(60)), [None] * 60, 0.25, 3)[1]
    np.testing.assert_array_equal(alone, [i - 10 for i in beside if labels[i] == "m"])


def test_seeds_differ_and_classes_of_equal_size_do_too() -> None:
    labels = ["a"] * 40 + ["b"] * 40
    first, second = (split(labels, list(range(80)), [None] * 80, 0.25, seed)[1] for seed in (0, 1))
    assert list(first) != list(second)
    assert list(first[first < 40]) != list(first[first >= 40] - 40)


def test_given_parts_are_kept_and_train_alone_is_split() -> None:
    parts = ["train", "val", None, "val"]
    train, val = split(list("aabb"), [0, 0, 1, 1], parts, 0.2, 0)
    assert (list(train), list(val)) == ([0, 2], [1, 3])
    assert len(split(["a"] * 10, list(range(10)), ["train"] * 10, 0.2, 0)[1]) == 2


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_that_makes_no_sense_is_a_usage_error(fraction: float) -> None:
    with pytest.raises(UsageError, match="--val-split"):
        split(["a", "a"], [0, 1], [None, None], fraction, 0)


def test_a_zero_fraction_validates_on_nothing() -> None:
    assert len(split(["a", "a"], [0, 1], [None, None], 0.0, 0)[1]) == 0


def test_pythons_hash_seed_changes_nothing() -> None:
    program = (
        "from wasi_edge.data.split import split;"
        "print(split(['x','ä','y'] * 20, list(range(60)), [None] * 60, .3, 5)[1].tolist())"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(answers) == 1


def test_real_bursts_join_and_different_real_photos_hardly_do(shared_data: Path) -> None:
    preprocessing = Preprocessing(image_size=168)
    found = scan_folder(shared_data / "clothing").photos[::4]
    pictures = [open_photo(photo.path, preprocessing.resize_side) for photo in found]
    hashes = [difference_hash(shrink(picture, preprocessing)) for picture in pictures]
    groups = near_duplicate_groups(hashes, [photo.label for photo in found])
    assert len(set(groups)) > 0.95 * len(found)
    shots = [difference_hash(shrink(nudged(picture, seed), preprocessing)) for seed, picture in enumerate(pictures)]
    near = sum(distance(first, second) <= MAX_DISTANCE for first, second in zip(hashes, shots, strict=True))
    assert near > 0.85 * len(found)
