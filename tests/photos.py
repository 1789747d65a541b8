"""Photos that tests render themselves: camera-like JPEGs, and every file that a decoder should be afraid of.

Not a test module. Colours and blobs are drawn from a seed, so that each seed is another "scene".
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def scene(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    """A smooth RGB picture with a little grain; another seed is another layout."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.integers(-4, 5, (height, width, 1), dtype=np.int16)
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def quadrants(width: int = 400, height: int = 300) -> Image.Image:
    """Red, green / blue, white: any turn or mirroring shows in the corners."""
    picture = Image.new("RGB", (width, height))
    for index, colour in enumerate(["red", "lime", "blue", "white"]):
        picture.paste(colour, (index % 2 * width // 2, index // 2 * height // 2, width, height))
    return picture


def save_jpeg(path: Path, picture: Image.Image, **options: object) -> Path:
    """Write a JPEG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "JPEG", **({"quality": 90} | options))
    return path


def class_folders(root: Path, counts: Mapping[str, int], size: tuple[int, int] = (160, 120)) -> Path:
    """A folder per class with so many different JPEGs each."""
    for number, (name, count) in enumerate(counts.items()):
        for index in range(count):
            save_jpeg(root / name / f"{index:03d}.jpg", scene(1000 * number + index, *size))
    return root


def with_orientation(path: Path, orientation: int) -> Path:
    """A JPEG stored such that turning it as EXIF asks gives `quadrants()`."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    picture = quadrants()
    if orientation in undo:
        picture = picture.transpose(undo[orientation])
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return save_jpeg(path, picture, exif=exif)


def broken_exif(path: Path) -> Path:
    """A sound JPEG whose EXIF block points into nowhere."""
    block = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\x00\x03\xff\xff\xff\xff\xde\xad\xbe\xef" * 3
    return save_jpeg(path, scene(1), exif=block)


def truncated_jpeg(path: Path) -> Path:
    """The first 60 % of a JPEG."""
    save_jpeg(path, scene(2))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    return path


def bomb_png(path: Path, side: int = 50_000) -> Path:
    """A PNG of a few hundred bytes that announces side x side pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def bomb_webp(path: Path) -> Path:
    """A WebP header that announces 16,000 x 16,000 pixels, and nothing behind it."""
    canvas = (15_999).to_bytes(3, "little") * 2
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "truncated.jpg": truncated_jpeg,
    "text.jpg": lambda path: path.write_text("this is no photo"),
    "empty.jpg": lambda path: path.write_bytes(b""),
    "bomb.png": bomb_png,
    "bomb.webp": bomb_webp,
    "start-only.jpg": lambda path: path.write_bytes(b"\xff\xd8\xff"),
    "start-only.png": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"),
    "noise.tif": lambda path: path.write_bytes(b"II*\0" + bytes(range(256)) * 4),
    "noise.gif": lambda path: path.write_bytes(b"GIF89a" + bytes(range(256))),
    "noise.bmp": lambda path: path.write_bytes(b"BM" + bytes(range(256))),
    "noise.webp": lambda path: path.write_bytes(b"RIFF\x10\0\0\0WEBPVP8 " + bytes(64)),
}


def twelve_megapixels(kind: str, path: Path) -> Path:
    """A 4000 x 3000 file of this kind, made quickly (flat compression, no noise)."""
    picture = Image.linear_gradient("L").resize((4000, 3000), Image.Resampling.NEAREST)
    rgb = Image.merge("RGB", (picture, picture.transpose(Image.Transpose.ROTATE_180), picture))
    match kind:
        case "jpeg":
            rgb.save(path, "JPEG", quality=85)
        case "progressive":
            rgb.save(path, "JPEG", quality=85, progressive=True)
        case "cmyk":
            rgb.convert("CMYK").save(path, "JPEG", quality=85)
        case "png":
            rgb.save(path, "PNG", compress_level=1)
        case "png16":
            Image.fromarray(np.asarray(picture).astype(np.uint16) * 257).save(path, "PNG", compress_level=1)
        case "webp":
            rgb.save(path, "WEBP", quality=50, method=0)
        case "tiff":
            rgb.save(path, "TIFF", compression="tiff_lzw")
        case "gif":
            picture.save(path, "GIF")
        case _:
            raise ValueError(kind)
    return path


def hostile_folder(root: Path) -> Path:
    """Add every difficult file to the first class folder below `root`: the unreadable ones and the merely unusual."""
    folder = sorted(path for path in root.iterdir() if path.is_dir())[0]
    for name, make in UNREADABLE.items():
        make(folder / name)
    for kind, suffix in (("cmyk", "jpg"), ("png", "png"), ("png16", "png"), ("webp", "webp")):
        twelve_megapixels(kind, folder / f"twelve-{kind}.{suffix}")
    broken_exif(folder / "broken-exif.jpg")
    palette = scene(3).convert("P")
    palette.info["transparency"] = 0
    palette.save(folder / "palette.png", transparency=0)
    save_jpeg(folder / "grüße-写真.jpg", scene(4))
    for foreign in ("._apple.jpg", "Thumbs.db"):
        (folder / foreign).write_bytes(b"not a photo")
    return root
