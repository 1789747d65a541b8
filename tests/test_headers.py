"""Predicted decoding memory: never below what a fresh process measures, and not far above it."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import photos
import pytest

from wasi_edge.data.headers import read_header
from wasi_edge.errors import UnreadablePhoto

# Resets the peak after the decoder's own code is loaded, so that only the photo is measured.
MEASURE = """
import re, sys
from wasi_edge.preprocess import open_photo, opened, shrink
from wasi_edge.preprocessing import Preprocessing
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
preprocessing = Preprocessing(image_size=256, crop_fraction=1.0)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
shrink(open_photo(sys.argv[1], 256), preprocessing)
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "cmyk", "png", "png16", "webp", "tiff", "gif"])
def test_the_prediction_bounds_a_fresh_process(kind: str, tmp_path: Path) -> None:
    path = photos.twelve_megapixels(kind, tmp_path / "photo")
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip(f"this system does not let a process reset its peak: {run.stderr.strip()[-80:]}")
    measured, predicted = int(run.stdout), read_header(path).decode_bytes
    assert measured <= predicted
    # Small ones are mostly the constant share, where a percentage says nothing.
    assert predicted <= 1.3 * measured + 4 * 2**20


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_reading_a_header_decodes_nothing(kind: str, tmp_path: Path) -> None:
    path = photos.twelve_megapixels(kind, tmp_path / "photo")
    tracemalloc.start()
    header = read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (header.width, header.height) == (4000, 3000)
    assert peak < 2**20


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_webp_headers_read_by_hand_agree_with_pillow(lossless: bool, mode: str, tmp_path: Path) -> None:
    picture = photos.scene(1, 123, 77).convert(mode)
    if mode == "RGBA":
        picture.putalpha(100)
    picture.save(tmp_path / "a.webp", lossless=lossless)
    header = read_header(tmp_path / "a.webp")
    assert (header.width, header.height, header.format, header.mode) == (123, 77, "WEBP", mode)


def test_a_progressive_jpeg_is_charged_for_its_coefficients(tmp_path: Path) -> None:
    picture = photos.scene(2, 1600, 1200)
    plain = read_header(photos.save_jpeg(tmp_path / "a.jpg", picture, subsampling=0))
    progressive = read_header(photos.save_jpeg(tmp_path / "b.jpg", picture, subsampling=0, progressive=True))
    assert progressive.decode_bytes > plain.decode_bytes
    assert progressive.decode_bytes >= 1600 * 1200 * 3 * 2


def test_a_larger_side_needs_more(tmp_path: Path) -> None:
    path = photos.save_jpeg(tmp_path / "a.jpg", photos.scene(3, 3000, 2000))
    assert read_header(path, 592).decode_bytes > read_header(path, 192).decode_bytes


@pytest.mark.parametrize("name", sorted(set(photos.UNREADABLE) - {"truncated.jpg"}))
def test_hostile_headers_are_unreadable(name: str, tmp_path: Path) -> None:
    photos.UNREADABLE[name](tmp_path / name)
    with pytest.raises(UnreadablePhoto):
        read_header(tmp_path / name)
