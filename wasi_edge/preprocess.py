"""Photo -> pixels -> array: the one definition that training, prediction and export share.

    open_photo    file -> upright RGB picture, reduced while decoding
    shrink        picture -> uint8 (h, w, 3), short side = `resize_side`; what the training cache stores
    center_view   the middle (S, S, 3) of it; what a prediction and a validation see
    normalise     uint8 (B, S, S, 3) -> float32 (B, 3, S, S)

A prediction runs the first three, validation reads the second's result from the cache: bit-identical.

A 12-megapixel photo takes 48 MB decoded and every full-size conversion as much again. So JPEGs are decoded at
a fraction of their size (`Image.draft`), and other formats are converted to RGB and reduced in narrow bands:
the only full-size buffer is the decoder's own. `data/headers.py` predicts it.

A file's first bytes choose the decoder, never its name, and only allow-listed decoders exist. Dimensions are
checked before anything is decoded. Whatever goes wrong with a file is an `UnreadablePhoto` and its reason.
"""

from __future__ import annotations

import importlib
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile

from wasi_edge.errors import UnreadablePhoto
from wasi_edge.preprocessing import Preprocessing

# Importing a plugin registers its decoder: these are the allowed ones. Pillow by itself imports some forty.
for _plugin in ("Bmp", "Gif", "Jpeg", "Mpo", "Png", "Tiff", "WebP"):
    importlib.import_module(f"PIL.{_plugin}ImagePlugin")

# Pillow warns of sizes that `max_pixels` decides and of EXIF damage that we tolerate, amid a progress bar.
# `warnings.catch_warnings` is not thread-safe: one filter, set once.
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_PIXELS = 100_000_000
BAND_PIXELS = 2**18
EXIF_ORIENTATION = 0x0112
_TURN = Image.Transpose
_TURNS = {
    2: _TURN.FLIP_LEFT_RIGHT, 3: _TURN.ROTATE_180, 4: _TURN.FLIP_TOP_BOTTOM, 5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270, 7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_90,
}  # fmt: skip
_RESAMPLING = {name.name.lower(): name for name in Image.Resampling}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_HEIF_LOCK = threading.Lock()


# ---------------------------------------------------------------------- files


@contextmanager
def sniffed(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Iterator[tuple[BinaryIO, str, bytes]]:
    """A photo's (file, Pillow's format name, first 32 bytes); any failure, in the body too, is
    `UnreadablePhoto`.
    """
    try:
        # A pipe named .jpg would block for ever on open.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadablePhoto("not a regular file")
        with open(path, "rb") as file:
            start = file.read(32)
            picture_format = _sniff(start)
            if picture_format == "WEBP":
                # WebP's decoder reserves two full canvases when it opens a file: look before.
                _check_size(*webp_dimensions(start)[:2], max_pixels)
            file.seek(0)
            yield file, picture_format, start
    except UnreadablePhoto:
        raise
    except Exception as error:  # decoders raise nearly anything on hostile input: struct.error, KeyError ..
        raise UnreadablePhoto(_reason(error, max_pixels)) from error


@contextmanager
def opened(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Iterator[ImageFile.ImageFile]:
    """A photo as a Pillow image of a permitted size, nothing decoded yet. Raises like `sniffed`."""
    with sniffed(path, max_pixels) as (file, picture_format, _):
        if picture_format == "HEIF":
            _register_heif()
        # A file object rather than a path: Pillow then never maps the file into memory.
        with Image.open(file, formats=[picture_format]) as image:
            _check_size(image.width, image.height, max_pixels)
            yield image  # type: ignore[misc]  # Pillow types the `with` as Image; it is the ImageFile


def _sniff(start: bytes) -> str:
    """Pillow's name of the format that a file's first 32 bytes announce. Raises `UnreadablePhoto`."""
    if not start:
        raise UnreadablePhoto("empty file (0 bytes)")
    if start[:3] == b"\xff\xd8\xff":
        return "JPEG"  # also MPO: Pillow tells them apart by a JPEG marker
    if start[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if start[:2] == b"BM":
        return "BMP"
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
        return "HEIF"
    raise UnreadablePhoto("not a photo: neither JPEG, PNG, WebP, TIFF, GIF, BMP nor HEIC inside")


def _register_heif() -> None:
    """Teach Pillow HEIC, once and only when a HEIC file is met (the library takes several MB)."""
    with _HEIF_LOCK:
        if "HEIF" in Image.OPEN:
            return
        try:
            import pillow_heif
        except ImportError as error:
            reason = 'HEIC needs an extra: pip install "wasi-edge[heic]", or save the photo as JPEG'
            raise UnreadablePhoto(reason) from error
        pillow_heif.register_heif_opener()


def webp_dimensions(start: bytes) -> tuple[int, int, bool]:
    """(width, height, has alpha) out of a WebP's first 30 bytes. Raises `UnreadablePhoto`."""
    if len(start) < 30:
        raise UnreadablePhoto("truncated: the file ends inside its header")
    little = [int.from_bytes(start[at : at + 3], "little") for at in range(30)]  # 24 bits from each offset
    if start[12:16] == b"VP8X":
        return little[24] + 1, int.from_bytes(start[27:30], "little") + 1, bool(start[20] & 0x10)
    if start[12:16] == b"VP8L" and start[20] == 0x2F:
        return (little[21] & 0x3FFF) + 1, (little[22] >> 6 & 0x3FFF) + 1, bool(start[24] & 0x10)
    if start[12:16] == b"VP8 " and start[23:26] == b"\x9d\x01\x2a":
        return little[26] & 0x3FFF, int.from_bytes(start[28:30], "little") & 0x3FFF, False
    raise UnreadablePhoto("damaged WEBP header")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise UnreadablePhoto(f"a picture of {width} x {height} pixels")
    if width * height > max_pixels:
        allowed = f"{max_pixels / 1e6:.0f} megapixels"
        raise UnreadablePhoto(f"{width} x {height} pixels, more than the {allowed} allowed: save it smaller")


def _reason(error: Exception, max_pixels: int) -> str:
    """What a user reads about a file that cannot be used, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than the {max_pixels / 1e6:.0f} megapixels allowed: save it smaller"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it: save it smaller"
    text = str(error)
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return "truncated: the file ends before the picture does"
    if "cannot identify" in text:
        return "damaged: its header cannot be read"
    return f"damaged ({text or type(error).__name__})"


# ---------------------------------------------------------------------- pixels


def open_photo(path: str | os.PathLike[str], min_side: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The photo at `path`: RGB, upright, transparency on white, first frame of several.

    It is reduced on the way by the largest whole factor that leaves its shortest side at least 2 * `min_side`
    pixels, so that a later antialiased resize to `min_side` loses nothing visible.
    Raises `UnreadablePhoto` (truncated, empty, no picture, more than `max_pixels`, HEIC without its extra).
    """
    picture, turn = _decoded(path, min_side, max_pixels)
    return picture if turn is None else picture.transpose(turn)


def _decoded(
    path: str | os.PathLike[str], min_side: int, max_pixels: int
) -> tuple[Image.Image, Image.Transpose | None]:
    """The reduced picture and the turn it still needs; the decoder's buffers are gone when this returns."""
    with opened(path, max_pixels) as image:
        if image.format in ("JPEG", "MPO"):
            image.draft("RGB", (2 * min_side, 2 * min_side))
        image.load()
        turn = _turn(image)  # after load: PNG may keep its EXIF behind the pixels; TIFF is upright by now
        return _reduced_rgb(image, reduction(image.width, image.height, min_side)), turn


def reduction(width: int, height: int, min_side: int) -> int:
    """The whole factor by which `open_photo` reduces a decoded picture of this size."""
    return max(1, min(width, height) // (2 * min_side))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The turn that EXIF asks for; none where the block is damaged or absent."""
    try:
        return _TURNS.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block raises nearly anything, and must not cost the photo
        return None


def _reduced_rgb(image: Image.Image, factor: int) -> Image.Image:
    """A new RGB picture, `factor` times smaller (mean of factor x factor pixels), converted band by band."""
    width, height = image.size
    picture = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    rows = factor * max(1, BAND_PIXELS // (width * factor))
    full_scale = _full_scale(image)
    for top in range(0, height, rows):
        band = _rgb(image.crop((0, top, width, min(height, top + rows))), full_scale)
        picture.paste(band.reduce(factor) if factor > 1 else band, (0, top // factor))
    return picture


def _full_scale(image: Image.Image) -> float:
    """The value that is white, for modes with more than 8 bits a channel."""
    if image.mode.startswith("I;16"):
        return 65535.0
    if image.mode not in ("I", "F"):
        return 255.0
    # 32-bit integers and floats do not tell their range: take the smallest usual one that holds the picture.
    brightest = float(image.getextrema()[1])  # type: ignore[arg-type]
    usual = [1.0, 255.0, 65535.0] if image.mode == "F" else [255.0, 65535.0]
    return next((scale for scale in usual if brightest <= scale), brightest)


def _rgb(band: Image.Image, full_scale: float) -> Image.Image:
    if band.mode.startswith("I;16"):
        # 257 * v8 = v16 exactly spans both ranges; >> 8 is its floor, without a float copy.
        band = Image.fromarray((np.asarray(band) >> 8).astype(np.uint8))
    elif band.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(band, dtype=np.float32)) * np.float32(255.0 / full_scale)
        band = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    if band.mode == "La":
        band = band.convert("LA")
    if not (band.has_transparency_data or band.mode == "RGBa"):
        return band if band.mode == "RGB" else band.convert("RGB")
    see_through = band.convert("RGBA")
    opaque = Image.new("RGB", band.size, "white")
    opaque.paste(see_through, mask=see_through)
    return opaque


def shrink(img: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 (h, w, 3): short side `resize_side`, long side in proportion but cut to 2 * `resize_side`; both as long
    where photos are squashed.

    Antialiased. Only the part that is kept is resized, so a panorama costs no more than a photo.
    """
    side = preprocessing.resize_side
    if preprocessing.squash:
        resized = img.resize((side, side), _RESAMPLING[preprocessing.interpolation])
        return np.array(resized.convert("RGB"), dtype=np.uint8)
    short, long = sorted(img.size)
    full = max(side, long * side // short)  # rounded down, as torchvision, timm and Hugging Face do
    kept = min(full, 2 * side)
    start = (full - kept) // 2 * long / full
    stop = min(float(long), start + kept * long / full)
    resample = _RESAMPLING[preprocessing.interpolation]
    if img.width >= img.height:
        resized = img.resize((kept, side), resample, box=(start, 0, stop, img.height))
    else:
        resized = img.resize((side, kept), resample, box=(0, start, img.width, stop))
    return np.array(resized.convert("RGB"), dtype=np.uint8)


def center_view(shrunk: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """The middle of a shrunk photo: uint8 (h, w, 3) -> (S, S, 3), C-contiguous."""
    size = preprocessing.image_size
    top, left = (_offset(length - size, preprocessing.even_offset) for length in shrunk.shape[:2])
    if min(top, left) < 0:
        raise ValueError(f"a shrunk photo of {shrunk.shape[:2]} holds no view of {size} x {size}")
    return np.ascontiguousarray(shrunk[top : top + size, left : left + size])


def _offset(margin: int, even: bool) -> int:
    return round(margin / 2) if even else margin // 2  # Python rounds halves to even numbers


def normalise(batch: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S), C-contiguous: (x / 255 - mean) / std.

    Written channel by channel straight into the result: no second float array of that size ever exists.
    """
    if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[3] != 3:
        raise ValueError(f"expected uint8 (B, S, S, 3), found {batch.dtype} {batch.shape}")
    out = np.empty((batch.shape[0], 3, *batch.shape[1:3]), dtype=np.float32)
    for channel, (mean, std) in enumerate(zip(preprocessing.mean, preprocessing.std, strict=True)):
        plane = out[:, channel]
        np.multiply(batch[..., channel], np.float32(1 / (255 * std)), out=plane, dtype=np.float32)
        plane -= np.float32(mean / std)
    return out
