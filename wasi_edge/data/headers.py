"""What a photo's header tells before anything is decoded: its size, and the memory that decoding will take.

The prediction bounds what `open_photo` followed by `shrink` adds to the process: the sum of what is alive at
the peak. Measured with 12-megapixel files in fresh processes (VmHWM, MB added at a short side of 256; the
decoded picture itself is 46), as tests/test_headers.py does again:

    JPEG          9   decoded at 1/2, 1/4 or 1/8 of its size
      progressive 38  (4:2:0), 72 (4:4:4), 95 (CMYK): libjpeg keeps all coefficients, 2 bytes each, full size
    PNG, BMP     50   the picture alone; 28 with 16-bit grey, 16 with grey or a palette
    GIF          16   one byte a pixel
    WebP        184   two RGBA canvases in the decoder, the copy it hands over, the picture; and the file
    TIFF         50   uncompressed; else 54 to 94: libtiff maps the file and decodes strips (125 where one is
                      the whole picture); 92 where it has to be turned, which Pillow does at full size
    HEIC         93   planes, an RGB copy and the picture
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import IO

from PIL import ImageFile, TiffImagePlugin

from wasi_edge.preprocess import EXIF_ORIENTATION, MAX_PIXELS, opened, reduction, sniffed, webp_dimensions

DEFAULT_MIN_SIDE = 256
# Bands under conversion, decoder tables, file buffers, the shrunk copy.
FIXED_BYTES = 5 * 2**20
_TIFF_ROWS_PER_STRIP, _TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH, _TIFF_BITS = 278, 322, 323, 258


@dataclass(frozen=True)
class Header:
    """One photo as its file announces it: pixels before any EXIF turn, Pillow's names of its format and mode.

    `decode_bytes` bounds the extra memory of open_photo + shrink at a short side of up to `min_side` pixels.
    """

    width: int
    height: int
    format: str
    mode: str
    decode_bytes: int
    min_side: int = DEFAULT_MIN_SIDE


def read_header(path: str | os.PathLike[str], min_side: int = DEFAULT_MIN_SIDE, max_pixels: int = MAX_PIXELS) -> Header:
    """Read a photo's header, decoding nothing. Raises `UnreadablePhoto`, as `open_photo` does."""
    with sniffed(path, max_pixels) as (_, picture_format, start):
        if picture_format == "WEBP":  # Pillow would read the whole file and reserve two canvases
            width, height, has_alpha = webp_dimensions(start)
            needed = 16 * width * height + os.path.getsize(path) + FIXED_BYTES
            return Header(width, height, "WEBP", "RGBA" if has_alpha else "RGB", needed, min_side)
    with opened(path, max_pixels) as image:
        width, height = image.size
        needed = _decoder_bytes(image, os.path.getsize(path), min_side) + FIXED_BYTES
        return Header(width, height, image.format or picture_format, image.mode, needed, min_side)


def _decoder_bytes(image: ImageFile.ImageFile, file_bytes: int, min_side: int) -> int:
    """The peak of opening `image`, bytes, without `FIXED_BYTES`: the largest of its three phases."""
    width, height = image.size
    extra = 0
    if image.format in ("JPEG", "MPO"):
        extra = _coefficient_bytes(image)
        scale = next(s for s in (8, 4, 2, 1) if s <= reduction(width, height, min_side))
        width, height = -(-width // scale), -(-height // scale)
    native = width * height * _bytes_per_pixel(image.mode)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        extra = _tiff_bytes(image, native, file_bytes)
    elif image.format not in (
        "JPEG",
        "MPO",
        "PNG",
        "BMP",
        "DIB",
        "GIF",
    ):  # HEIF, measured
        extra = width * height * 9 // 2 + file_bytes
    factor = reduction(width, height, min_side)
    reduced = 4 * -(-width // factor) * -(-height // factor)
    return max(native + extra, native + reduced, 2 * reduced)  # decoding; reducing; turning upright


def _bytes_per_pixel(mode: str) -> int:
    """What Pillow stores for a pixel of this mode."""
    if mode in ("1", "L", "P"):
        return 1
    return 2 if mode.startswith("I;16") else 4


def _tiff_bytes(image: TiffImagePlugin.TiffImageFile, native: int, file_bytes: int) -> int:
    """What a TIFF needs beside its picture: the mapped file and a strip, or the copy that turns it."""
    tags = image.tag_v2
    copy = native if tags.get(EXIF_ORIENTATION, 1) != 1 else 0
    if image.tile and image.tile[0][0] != "libtiff":
        return copy
    bits = tags.get(_TIFF_BITS, (8,))
    columns = tags.get(_TIFF_TILE_WIDTH, image.width)
    rows = tags.get(_TIFF_TILE_LENGTH, tags.get(_TIFF_ROWS_PER_STRIP, image.height))
    strip = min(columns, image.width) * min(rows, image.height) * sum(bits) // 8
    return max(copy, file_bytes + strip)


def _coefficient_bytes(image: ImageFile.ImageFile) -> int:
    """What libjpeg holds for a JPEG that comes in several scans: 2 bytes for each sample."""
    # Of each component: (id, horizontal sampling, vertical sampling, quantisation table).
    layers = getattr(image, "layer", [])
    if image.fp is None or not layers or not _in_several_scans(image.fp, len(layers)):
        return 0
    widest, tallest = max(layer[1] for layer in layers), max(layer[2] for layer in layers)
    # Whole blocks of 8 x 8 for whole groups of `widest` x `tallest` blocks.
    groups = -(-image.width // (8 * widest)) * -(-image.height // (8 * tallest))
    return 2 * 64 * groups * sum(layer[1] * layer[2] for layer in layers)


def _in_several_scans(file: IO[bytes], components: int) -> bool:
    """True where the first scan is progressive, or does not hold all components."""
    file.seek(2)
    while len(marker := file.read(2)) == 2:
        if marker[0] != 0xFF:
            return False  # damaged: decoding will say so
        if marker[1] == 0xFF:  # fill byte
            file.seek(-1, os.SEEK_CUR)
            continue
        (length,) = struct.unpack(">H", file.read(2))
        if marker[1] in (0xC2, 0xC6, 0xCA, 0xCE):
            return True
        if marker[1] == 0xDA:
            return file.read(1)[0] < components
        file.seek(length - 2, os.SEEK_CUR)
    return False
