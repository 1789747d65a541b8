"""Photo -> pixels -> array: upright, RGB, one definition; hostile files end as `UnreadablePhoto`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import photos
import pytest
from PIL import Image

from wasi_edge.errors import ArtefactError, UnreadablePhoto
from wasi_edge.preprocess import center_view, normalise, open_photo, shrink
from wasi_edge.preprocessing import Preprocessing

TORCH_FREE = [
    "wasi_edge.preprocess",
    *(f"wasi_edge.data.{name}" for name in ("headers", "folder", "split", "cache", "augment")),
]


def corners(picture: Image.Image) -> list[tuple[int, ...]]:
    """Which of red, green, blue are bright in the four corners."""
    pixels = np.asarray(picture)
    height, width, _ = pixels.shape
    places = [(y, x) for y in (height // 8, -height // 8) for x in (width // 8, -width // 8)]
    return [tuple((pixels[y, x] > 128).astype(int)) for y, x in places]


def test_none_of_these_modules_imports_torch() -> None:
    program = f"import sys, {', '.join(TORCH_FREE)}; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


@pytest.mark.parametrize("name", sorted(photos.UNREADABLE))
def test_hostile_files_are_unreadable_with_a_short_reason(name: str, tmp_path: Path) -> None:
    photos.UNREADABLE[name](tmp_path / name)
    with pytest.raises(UnreadablePhoto) as caught:
        open_photo(tmp_path / name, 64)
    assert 5 < len(str(caught.value)) < 120 and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("bomb", [photos.bomb_png, photos.bomb_webp])
def test_a_bomb_is_refused_before_memory_is_taken(bomb: object, tmp_path: Path) -> None:
    path = bomb(tmp_path / "bomb")  # type: ignore[operator]
    tracemalloc.start()
    with pytest.raises(UnreadablePhoto, match="megapixels"):
        open_photo(path, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_the_pixel_cap_is_ours_and_pillows_global_is_untouched(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    path = photos.save_jpeg(tmp_path / "a.jpg", photos.scene(0, 100, 100))
    with pytest.raises(UnreadablePhoto, match="100 x 100"):
        open_photo(path, 10, max_pixels=9_999)
    open_photo(path, 10, max_pixels=10_000)
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_pipe_named_jpg_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadablePhoto, match="regular"):
        open_photo(tmp_path / "pipe.jpg", 64)


def test_heic_without_the_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(UnreadablePhoto, match=r'pip install "wasi-edge\[heic\]"'):
        open_photo(tmp_path / "a.heic", 64)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_ends_upright(orientation: int, tmp_path: Path) -> None:
    picture = open_photo(photos.with_orientation(tmp_path / "a.jpg", orientation), 64)
    assert picture.width > picture.height
    assert corners(picture) == [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]


def test_a_turned_tiff_is_turned_once(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[photos.ORIENTATION] = 6
    photos.quadrants().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.tif", exif=exif)
    assert corners(open_photo(tmp_path / "a.tif", 64)) == [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]


def test_a_broken_exif_block_costs_the_turn_and_not_the_photo(tmp_path: Path) -> None:
    assert open_photo(photos.broken_exif(tmp_path / "a.jpg"), 64).size == (320, 240)


@pytest.mark.parametrize("name", ["Strandläufer 🏖.jpg", "сад.jpg", "a b'c\"d.jpg"])
def test_any_file_name_opens(name: str, tmp_path: Path) -> None:
    assert open_photo(photos.save_jpeg(tmp_path / name, photos.scene(3)), 64).mode == "RGB"


def test_a_wrong_suffix_does_not_matter(tmp_path: Path) -> None:
    photos.quadrants().save(tmp_path / "a.jpg", "PNG")
    assert corners(open_photo(tmp_path / "a.jpg", 64))[0] == (1, 0, 0)


def test_sixteen_bits_keep_their_brightness(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    pixels = np.asarray(open_photo(tmp_path / "a.png", 256))[0, :, 0].astype(int)
    assert np.abs(pixels - np.arange(256)).max() <= 1


def test_float_and_wide_integer_tiffs_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 1, 256, dtype=np.float32), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "f.tif")
    Image.fromarray((ramp * 65535).astype(np.int32)).save(tmp_path / "i.tif")
    for name in ("f.tif", "i.tif"):
        pixels = np.asarray(open_photo(tmp_path / name, 256))[0, :, 0].astype(int)
        assert np.abs(pixels - np.arange(256)).max() <= 1, name


def test_cmyk_keeps_its_colours(tmp_path: Path) -> None:
    photos.quadrants().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert corners(open_photo(tmp_path / "a.jpg", 64)) == [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white(mode: str, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (80, 60), (0, 0, 0, 0))
    picture.paste((200, 0, 0, 255), (40, 0, 80, 60))
    if mode == "P":
        flat = Image.new("P", (80, 60), 0)
        flat.putpalette([0, 0, 0, 200, 0, 0])
        flat.paste(1, (40, 0, 80, 60))
        flat.save(tmp_path / "a.png", transparency=0)
    else:
        picture.convert(mode).save(tmp_path / "a.png")
    pixels = np.asarray(open_photo(tmp_path / "a.png", 60))
    assert (pixels[30, 10] == 255).all() and pixels[30, 70, 1] < 100


def test_transparent_pixels_do_not_darken_an_edge_when_reduced(tmp_path: Path) -> None:
    # Invisible black beside opaque white: a reduction before compositing would show grey.
    picture = Image.new("RGBA", (800, 800), (0, 0, 0, 0))
    picture.paste((255, 255, 255, 255), (333, 0, 800, 800))
    picture.save(tmp_path / "a.png")
    assert np.asarray(open_photo(tmp_path / "a.png", 50)).min() == 255


def test_only_the_first_frame_counts(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    for name in ("a.gif", "a.webp", "a.tif", "a.png"):
        red.save(tmp_path / name, save_all=True, append_images=[blue])
        pixels = np.asarray(open_photo(tmp_path / name, 32))
        assert pixels[20, 20, 0] > 200 and pixels[20, 20, 2] < 60, name


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_reduction_keeps_twice_the_side_and_the_picture(suffix: str, tmp_path: Path) -> None:
    large = photos.scene(4, 1203, 907)
    large.save(tmp_path / f"a.{suffix}", quality=95)
    reduced = open_photo(tmp_path / f"a.{suffix}", 64)
    assert 128 <= min(reduced.size) < 907
    expected = np.asarray(large.resize(reduced.size, Image.Resampling.BOX)).astype(float)
    assert np.abs(np.asarray(reduced) - expected).mean() < 3


@pytest.mark.parametrize("size", [(500, 300), (300, 500), (64, 64), (1, 1), (3000, 2), (7, 900)])
def test_shrink_gives_the_side_and_at_most_two_of_them(size: tuple[int, int]) -> None:
    preprocessing = Preprocessing(image_size=56)
    pixels = shrink(photos.scene(5, *size), preprocessing)
    assert pixels.dtype == np.uint8 and min(pixels.shape[:2]) == 64 and max(pixels.shape[:2]) <= 128
    assert (pixels.shape[1] >= pixels.shape[0]) == (size[0] >= size[1])
    assert center_view(pixels, preprocessing).shape == (56, 56, 3)


def test_the_cut_of_a_panorama_equals_cutting_the_whole() -> None:
    preprocessing = Preprocessing(image_size=64, crop_fraction=1.0)
    panorama = photos.scene(6, 1000, 100)
    whole = np.asarray(panorama.resize((640, 64), Image.Resampling.BICUBIC))[:, 256:384]
    assert np.abs(shrink(panorama, preprocessing).astype(int) - whole).max() <= 1


def test_normalise_is_the_formula_in_contiguous_float32() -> None:
    batch = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    preprocessing = Preprocessing(image_size=8)
    out = normalise(batch, preprocessing)
    expected = (batch / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    assert out.dtype == np.float32 and out.flags.c_contiguous and out.shape == (2, 3, 8, 8)
    np.testing.assert_allclose(out, expected.transpose(0, 3, 1, 2), atol=1e-5)


def test_normalise_takes_little_more_than_its_result() -> None:
    batch = np.zeros((8, 224, 224, 3), dtype=np.uint8)
    tracemalloc.start()
    out = normalise(batch, Preprocessing())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < out.nbytes * 1.1


def test_a_dictionary_round_trip_through_json_changes_nothing() -> None:
    original = Preprocessing(168, 0.9, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert Preprocessing.from_dict(json.loads(json.dumps(original.to_dict()))) == original


@pytest.mark.parametrize(
    "nonsense",
    [
        None,
        [],
        {"image_size": 0},
        {"image_size": True},
        {"image_size": "224"},
        {"crop_fraction": 1.5},
        {"crop_fraction": float("nan")},
        {"interpolation": "psychic"},
        {"interpolation": ["bicubic"]},
        {"std": [0.1, 0.0, 0.1]},
        {"mean": [0.1, 0.2]},
        {"mean": ["a", "b", "c"]},
        {"unknown": 1},
    ],
)
def test_nonsense_is_an_artefact_error(nonsense: object) -> None:
    with pytest.raises(ArtefactError):
        Preprocessing.from_dict(nonsense)


@pytest.mark.parametrize(
    ("given", "image_size", "resize_side", "interpolation"),
    [
        (None, 224, 224, "bilinear"),
        ({"size": 384, "resample": 2}, 384, 384, "bilinear"),
        ({"size": {"height": 224, "width": 224}, "resample": 0}, 224, 224, "nearest"),
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3},
            224,
            256,
            "bicubic",
        ),
        ({"size": {"shortest_edge": 518}, "crop_size": 518, "do_center_crop": False}, 518, 518, "bilinear"),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, 224, 256, "bilinear"),
    ],
)
def test_hugging_face_sizes(given: dict | None, image_size: int, resize_side: int, interpolation: str) -> None:
    read = Preprocessing.from_hugging_face(given)
    assert (read.image_size, read.resize_side, read.interpolation) == (image_size, resize_side, interpolation)


def test_hugging_face_rescaling_is_folded_into_mean_and_std() -> None:
    read = Preprocessing.from_hugging_face(
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5}
    )
    batch = np.full((1, 8, 8, 3), 200, dtype=np.uint8)
    np.testing.assert_allclose(normalise(batch, read), (200 / 127.5 - 0.5) / 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    "bad", [[], {"size": {"height": 224, "width": 384}}, {"resample": 9}, {"image_std": [0, 1, 1]}]
)
def test_hugging_face_nonsense_is_an_artefact_error(bad: object) -> None:
    with pytest.raises(ArtefactError):
        Preprocessing.from_hugging_face(bad)  # type: ignore[arg-type]


def test_the_shipped_backbone_asks_for_256_then_224(shared_model: Path) -> None:
    read = Preprocessing.from_hugging_face(json.loads((shared_model / "preprocessor_config.json").read_text()))
    assert read == Preprocessing()


def test_real_photos_agree_with_the_plain_way(shared_data: Path) -> None:
    preprocessing = Preprocessing()
    for path in sorted((shared_data / "hymenoptera").glob("val/*/*.jpg"))[:6]:
        with Image.open(path) as image:
            plain = image.convert("RGB")
        ours = shrink(open_photo(path, preprocessing.resize_side), preprocessing)
        # These are smaller than twice the side, so nothing is reduced on the way.
        np.testing.assert_array_equal(ours, shrink(plain, preprocessing))
