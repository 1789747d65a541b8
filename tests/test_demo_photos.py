"""Photos drawn to try the program with."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from wasi_edge.data.demo import CAMERA_MAKE, OBJECTS, main, render_demo_photos
from wasi_edge.errors import UsageError


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return render_demo_photos(tmp_path_factory.mktemp("photos"), classes=3, per_class=8, seed=5)


def test_a_folder_a_class(photos: list[Path]) -> None:
    assert {path.parent.name for path in photos} == {"mug", "leaf", "key"}
    assert [path.name for path in photos[:8]] == [f"IMG_{number:04}.jpg" for number in range(1, 9)]
    assert len(photos) == 24 and all(path.is_file() for path in photos)


def test_stored_as_the_sensor_lies_and_upright_by_the_tag(photos: list[Path]) -> None:
    seen = set()
    for path in photos:
        with Image.open(path) as image:
            orientation = image.getexif()[ExifTags.Base.Orientation]
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (640, 480))
            assert ImageOps.exif_transpose(image).size == ((640, 480) if orientation in (1, 3) else (480, 640))
        seen.add(orientation)
    assert seen <= {1, 3, 6, 8} and 1 in seen and seen & {6, 8}


def test_shadow_and_object_follow_the_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scene written under each tag looks the same once turned upright."""
    from wasi_edge.data import demo

    flag = Image.new("RGB", (64, 64))
    flag.paste((255, 0, 0), (0, 0, 64, 16))
    flag.paste((0, 0, 255), (0, 0, 16, 64))
    monkeypatch.setattr(demo, "_compose", lambda *_: flag)
    monkeypatch.setattr(demo, "_expose", lambda *_: flag)
    seen = set()
    for path in render_demo_photos(tmp_path, classes=1, per_class=40, size=(64, 64)):
        with Image.open(path) as image:
            seen.add(image.getexif()[ExifTags.Base.Orientation])
            upright = np.asarray(ImageOps.exif_transpose(image), np.int16)
        assert np.abs(upright - np.asarray(flag, np.int16)).mean() < 10
    assert seen == {1, 3, 6, 8}


def test_they_carry_what_reports_must_not_repeat(photos: list[Path]) -> None:
    with Image.open(photos[0]) as image:
        exif = image.getexif()
    assert exif[ExifTags.Base.Make] == CAMERA_MAKE
    position = exif.get_ifd(ExifTags.IFD.GPSInfo)
    assert (position[ExifTags.GPS.GPSLatitudeRef], position[ExifTags.GPS.GPSLatitude][0]) == ("N", 47)
    assert CAMERA_MAKE.encode() in photos[0].read_bytes()


def test_the_same_seed_gives_the_same_files_in_any_number(photos: list[Path], tmp_path: Path) -> None:
    again = render_demo_photos(tmp_path / "again", classes=2, per_class=3, seed=5)
    for path in again:
        twin = next(other for other in photos if other.parts[-2:] == path.parts[-2:])
        assert path.read_bytes() == twin.read_bytes()
    other = render_demo_photos(tmp_path / "other", classes=2, per_class=3, seed=6)
    digests = {hashlib.sha256(path.read_bytes()).digest() for path in again + other}
    assert len(digests) == 12


def test_every_class_can_be_drawn_and_is_visible(tmp_path: Path) -> None:
    for path in render_demo_photos(tmp_path, classes=len(OBJECTS), per_class=1, size=(160, 120)):
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5


def test_more_classes_than_can_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=f"there are {len(OBJECTS)} classes"):
        render_demo_photos(tmp_path / "new", classes=99)
    assert not (tmp_path / "new").exists()
    assert main([str(tmp_path / "new"), "--classes", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: cannot draw")


def test_the_command_writes_photos_without_torch(tmp_path: Path) -> None:
    words = [str(tmp_path), "--classes", "2", "--per-class", "1"]
    code = f"import sys; from wasi_edge.data.demo import main; main({words!r})"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    module = subprocess.run(
        [sys.executable, "-m", "wasi_edge.data.demo", *words], check=True, capture_output=True, text=True
    )
    assert (module.stdout, module.stderr) == ("", f"2 photos in {tmp_path}\n")
    assert sorted(path.parent.name for path in tmp_path.glob("*/*.jpg")) == ["leaf", "mug"]
