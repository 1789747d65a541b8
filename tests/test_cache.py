"""The cache: bit-identical with prediction, reused when complete, else rebuilt, within the byte budget."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import photos
import pytest

from wasi_edge.data import cache as cache_module
from wasi_edge.data.cache import PhotoCache, build_cache, open_cache
from wasi_edge.data.folder import Photo, scan_folder
from wasi_edge.data.split import difference_hash
from wasi_edge.errors import WasiEdgeError
from wasi_edge.preprocess import center_view, open_photo, shrink
from wasi_edge.preprocessing import Preprocessing

MB = 2**20
SMALL = Preprocessing(image_size=56)


@pytest.fixture
def found(tmp_path: Path) -> tuple[Photo, ...]:
    root = photos.class_folders(tmp_path / "photos", {"a": 4, "b": 4})
    photos.twelve_megapixels("jpeg", root / "a" / "big.jpg")
    photos.truncated_jpeg(root / "b" / "cut.jpg")
    photos.quadrants().save(root / "b" / "png.png")
    return scan_folder(root).photos


def build(
    found: tuple[Photo, ...], directory: Path, budget: int = 64 * MB, threads: int = 2, **more: object
) -> PhotoCache:
    return build_cache(found, directory, more.pop("preprocessing", SMALL), budget, threads, **more)  # type: ignore[arg-type]


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    opened: list[Path] = []

    def counted(path: Path, *rest: int) -> object:
        opened.append(path)
        return open_photo(path, *rest)

    monkeypatch.setattr(cache_module, "open_photo", counted)
    return opened


def test_the_cached_view_is_bit_identical_with_prediction(found: tuple[Photo, ...], tmp_path: Path) -> None:
    with build(found, tmp_path / "cache") as cache:
        assert len(cache) == len(found) - 1 and cache.labels == ["a"] * 5 + ["b"] * 5
        for index, path in enumerate(cache.paths):
            direct = shrink(open_photo(path, SMALL.resize_side), SMALL)
            np.testing.assert_array_equal(cache.read(index), direct)
            np.testing.assert_array_equal(center_view(cache.read(index), SMALL), center_view(direct, SMALL))
            assert cache.hashes[index] == difference_hash(direct)


def test_unreadable_photos_are_listed_with_their_reason(found: tuple[Photo, ...], tmp_path: Path) -> None:
    with build(found, tmp_path / "cache") as cache:
        (entry,) = cache.skipped
    assert entry.path == "b/cut.jpg" and "truncated" in entry.reason


def test_threads_change_not_one_byte(found: tuple[Photo, ...], tmp_path: Path) -> None:
    for threads in (1, 4):
        build(found, tmp_path / str(threads), threads=threads).close()
    for name in ("pixels.bin", "index.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes()


def test_a_complete_cache_is_reused(found: tuple[Photo, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(found, tmp_path / "cache").close()
    opened = count_decodes(monkeypatch)
    steps: list[tuple[int, int]] = []
    build(found, tmp_path / "cache", on_progress=lambda done, total: steps.append((done, total))).close()
    assert opened == [] and steps == [(len(found), len(found))]
    assert len(open_cache(tmp_path / "cache")) == len(found) - 1


@pytest.mark.parametrize("change", ["preprocessing", "mtime", "label", "fewer", "pixels", "index", "schema"])
def test_whatever_differs_is_rebuilt(
    change: str, found: tuple[Photo, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "cache"
    build(found, directory).close()
    preprocessing = SMALL
    match change:
        case "preprocessing":
            preprocessing = replace(SMALL, interpolation="bilinear")
        case "mtime":
            os.utime(found[0].path, ns=(1, 1))
        case "label":
            found = (replace(found[0], label="c"), *found[1:])
        case "fewer":
            found = found[1:]
        case "pixels":
            os.truncate(directory / "pixels.bin", 1000)
        case "index":
            (directory / "index.json").write_text("{")
        case "schema":
            index = json.loads((directory / "index.json").read_text())
            (directory / "index.json").write_text(json.dumps(index | {"schema": 0}))
    opened = count_decodes(monkeypatch)
    build(found, directory, preprocessing=preprocessing).close()
    assert len(opened) == len(found)


def test_an_interrupted_build_leaves_no_index_and_is_rebuilt(found: tuple[Photo, ...], tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        build(found, tmp_path / "cache", on_progress=interrupt)
    assert threading.active_count() == before
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"lock"}
    with pytest.raises(WasiEdgeError, match="no complete photo cache"):
        open_cache(tmp_path / "cache")
    assert len(build(found, tmp_path / "cache")) == len(found) - 1


def test_the_sum_in_flight_never_exceeds_the_budget(
    found: tuple[Photo, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = {photo.path: photo.header.decode_bytes for photo in found}
    budget = max(needs.values()) + min(needs.values())
    flying, peak, lock = 0, 0, threading.Lock()

    def slow(path: Path, *rest: int) -> object:
        nonlocal flying, peak
        with lock:
            flying += needs[path]
            peak = max(peak, flying)
        time.sleep(0.01)
        try:
            return open_photo(path, *rest)
        finally:
            with lock:
                flying -= needs[path]

    monkeypatch.setattr(cache_module, "open_photo", slow)
    build(found, tmp_path / "cache", budget=budget, threads=8).close()
    assert max(needs.values()) < peak <= budget


def test_a_photo_too_big_for_the_budget_is_listed_and_comes_back_with_a_larger_one(
    found: tuple[Photo, ...], tmp_path: Path
) -> None:
    budget = max(photo.header.decode_bytes for photo in found) - 1
    with build(found, tmp_path / "cache", budget=budget) as cache:
        refused = [entry for entry in cache.skipped if entry.path == "a/big.jpg"]
    assert len(refused) == 1 and "--budget" in refused[0].reason
    with build(found, tmp_path / "cache") as cache:
        assert [entry.path for entry in cache.skipped] == ["b/cut.jpg"]


def test_a_larger_side_than_the_scan_expected_is_predicted_anew(found: tuple[Photo, ...], tmp_path: Path) -> None:
    budget = max(photo.header.decode_bytes for photo in found)
    large = Preprocessing(image_size=592, crop_fraction=1.0)
    with build(found, tmp_path / "cache", budget=budget, preprocessing=large) as cache:
        assert "a/big.jpg" in [entry.path for entry in cache.skipped]


def test_a_photo_gone_since_the_scan_is_listed(found: tuple[Photo, ...], tmp_path: Path) -> None:
    found[0].path.unlink()
    with build(found, tmp_path / "cache") as cache:
        assert any(entry.path == "a/000.jpg" and "not exist" in entry.reason for entry in cache.skipped)


def test_a_full_disk_is_refused_before_decoding(
    found: tuple[Photo, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage(MB, 0, MB))
    opened = count_decodes(monkeypatch)
    with pytest.raises(WasiEdgeError, match="free some space"):
        build(found, tmp_path / "cache")
    assert opened == []


def test_a_disk_that_fills_while_writing_says_so_and_leaves_nothing(
    found: tuple[Photo, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.raises(WasiEdgeError, match="No space left"):
        build(found, tmp_path / "cache")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"lock"}


def test_a_folder_that_cannot_be_made_is_a_wasi_edge_error(found: tuple[Photo, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WasiEdgeError, match="cannot be written"):
        build(found, tmp_path / "file" / "cache")


def test_two_builds_at_once_end_in_one_good_cache(found: tuple[Photo, ...], tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: build(found, tmp_path / "cache"), range(2))
    for index in range(len(first)):
        np.testing.assert_array_equal(first.read(index), second.read(index))


def test_reading_from_threads_is_safe_and_arrays_are_the_callers(found: tuple[Photo, ...], tmp_path: Path) -> None:
    with build(found, tmp_path / "cache") as cache, ThreadPoolExecutor(4) as pool:
        expected = [cache.read(index) for index in range(len(cache))]
        cache.read(0)[:] = 0
        for index, pixels in zip(
            [*range(len(cache))] * 20, pool.map(cache.read, [*range(len(cache))] * 20), strict=True
        ):
            np.testing.assert_array_equal(pixels, expected[index])


def test_the_index_tells_what_training_needs(found: tuple[Photo, ...], tmp_path: Path) -> None:
    found = tuple(replace(photo, part="val" if photo.label == "b" else "train") for photo in found)
    build(found, tmp_path / "cache").close()
    with open_cache(tmp_path / "cache") as cache:
        assert cache.preprocessing == SMALL and set(cache.parts) == {"train", "val"}


def test_real_photos(shared_data: Path, tmp_path: Path) -> None:
    found = scan_folder(shared_data / "hymenoptera").photos
    preprocessing = Preprocessing(image_size=168)
    with build(found, tmp_path / "cache", preprocessing=preprocessing) as cache:
        assert len(cache) == 90 and cache.skipped == []
        direct = shrink(open_photo(cache.paths[50], preprocessing.resize_side), preprocessing)
        np.testing.assert_array_equal(cache.read(50), direct)
