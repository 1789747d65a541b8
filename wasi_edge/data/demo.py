"""Little photos to try the program with, drawn rather than taken: `python -m wasi_edge.data.demo FOLDER`.

Each photo shows one object (mug, leaf, key, ball, bottle, book) on a table or a cloth among
distractors. Position, size, turn, colours, light, focus, exposure and noise vary; only shape
and the way the surface shades tell the classes apart. The files look like a camera's:
sensor-sized JPEGs with an EXIF orientation tag (pixels stored turned accordingly), a camera
make, a date and a GPS position, which nothing made from these photos may repeat.

An object (`demo_objects.py`) is turned, scaled and composed over its own shadow. Every photo has
a generator of its own, keyed by (seed, class, index): the same arguments give the same files, in
whatever number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFilter

from wasi_edge.data.demo_objects import OBJECTS, Points, make_colour, shade
from wasi_edge.errors import UsageError

CAMERA_MAKE = "Wasi Demo Optics"
GPS_LATITUDE = ((47.0, 22.0, 30.25), "N")
GPS_LONGITUDE = ((8.0, 32.0, 12.5), "E")

_STORED_TURN = {
    1: None,
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


def render_demo_photos(
    folder: str | Path,
    classes: int = 4,
    per_class: int = 24,
    seed: int = 0,
    size: tuple[int, int] = (640, 480),
) -> list[Path]:
    """Writes `folder/<class>/IMG_0001.jpg` ... and returns the paths.

    `size` is the sensor's (width, height): a photo whose orientation tag says 6 or 8 is seen upright
    with width and height exchanged. Raises `UsageError` for more classes than can be drawn.
    """
    if not 1 <= classes <= len(OBJECTS) or per_class < 1 or min(size) < 16:
        raise UsageError(
            f"cannot draw {per_class} photos of {classes} classes at {size[0]}x{size[1]}: "
            f"there are {len(OBJECTS)} classes, and a photo has at least 16x16 pixels"
        )
    paths = []
    for number, name in enumerate(list(OBJECTS)[:classes]):
        class_folder = Path(folder) / name
        class_folder.mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            path = class_folder / f"IMG_{index + 1:04}.jpg"
            _write_photo(path, OBJECTS[name], np.random.default_rng([seed, number, index]), size)
            paths.append(path)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m wasi_edge.data.demo", description="Draws photos to try wasi-edge with."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", type=int, default=4, help=f"how many of: {', '.join(OBJECTS)}")
    parser.add_argument("--per-class", type=int, default=24, help="photos of each")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args(arguments)
    try:
        paths = render_demo_photos(words.folder, words.classes, words.per_class, words.seed)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{len(paths)} photos in {words.folder}", file=sys.stderr)
    return 0


def _write_photo(
    path: Path,
    draw_object: Callable[[np.random.Generator], Image.Image],
    rng: np.random.Generator,
    size: tuple[int, int],
) -> None:
    orientation = int(rng.choice([1, 3, 6, 8], p=[0.6, 0.08, 0.22, 0.1]))
    upright_size = size if orientation in (1, 3) else size[::-1]
    scene = _compose(draw_object(rng), rng, upright_size)
    photo = _expose(scene, rng)
    turn = _STORED_TURN[orientation]
    if turn is not None:
        photo = photo.transpose(turn)
    photo.save(path, quality=int(rng.integers(72, 93)), exif=_exif(orientation, rng))


def _compose(sprite: Image.Image, rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """The object, turned and scaled, over background, clutter and its own shadow."""
    width, height = size
    short = min(size)
    scene = _background(rng, size)
    for _ in range(int(rng.integers(2, 6))):
        _add_clutter(scene, rng)
    scene = scene.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.006) * short))  # depth of field
    side = int(short * rng.uniform(0.45, 0.85))
    turned = sprite.resize((side, side), Image.Resampling.LANCZOS).rotate(
        rng.normal(0, 30), Image.Resampling.BICUBIC, expand=True
    )
    if rng.random() < 0.5:
        turned = turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left = int(width * rng.uniform(0.36, 0.64) - turned.width / 2)
    top = int(height * rng.uniform(0.36, 0.64) - turned.height / 2)
    shadow = Image.new("L", size)
    offset = rng.uniform(0.01, 0.05, 2) * side
    shadow.paste(turned.getchannel("A"), (left + int(offset[0]), top + int(offset[1])))
    shadow = shadow.filter(ImageFilter.GaussianBlur(side * rng.uniform(0.02, 0.05)))
    strength = rng.uniform(0.35, 0.7)
    scene.paste((15, 12, 10), (0, 0), shadow.point([int(level * strength) for level in range(256)]))
    scene.paste(turned, (left, top), turned)
    return scene


def _expose(scene: Image.Image, rng: np.random.Generator) -> Image.Image:
    """What lens and sensor do: focus, vignette, white balance, exposure and noise."""
    softness = float(rng.gamma(1.5, 0.5))
    if softness > 0.3:
        scene = scene.filter(ImageFilter.GaussianBlur(softness * min(scene.size) / 480))
    light = np.asarray(scene, np.float32) / 255  # H, W, 3
    height, width = light.shape[:2]
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)
    glow = 1 + rng.uniform(-0.25, 0.25) * x + rng.uniform(-0.25, 0.25) * y - rng.uniform(0, 0.2) * (x**2 + y**2)
    light *= glow[..., None] * np.float32(2 ** rng.uniform(-0.7, 0.45))
    light *= rng.normal(1, 0.06, 3).astype(np.float32)
    light += rng.normal(0, rng.uniform(0.005, 0.03), 1)[0]
    light += rng.standard_normal(light.shape, np.float32) * np.float32(rng.uniform(0.005, 0.035))
    return Image.fromarray((np.clip(light, 0, 1) * 255).astype(np.uint8))


def _exif(orientation: int, rng: np.random.Generator) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = CAMERA_MAKE
    exif[ExifTags.Base.Model] = "Rendered 1"
    exif[ExifTags.Base.Orientation] = orientation
    month, day, hour, minute = rng.integers((1, 1, 8, 0), (13, 29, 20, 60))
    taken = f"2026:{month:02}:{day:02} {hour:02}:{minute:02}:00"
    exif[ExifTags.Base.DateTime] = taken
    camera = exif.get_ifd(ExifTags.IFD.Exif)
    camera[ExifTags.Base.DateTimeOriginal] = taken
    camera[ExifTags.Base.ExposureTime] = 1 / float(rng.choice([30, 60, 125, 250]))
    camera[ExifTags.Base.FNumber] = 1.8
    camera[ExifTags.Base.ISOSpeedRatings] = int(rng.choice([50, 100, 200, 400, 800]))
    position = exif.get_ifd(ExifTags.IFD.GPSInfo)
    position[ExifTags.GPS.GPSLatitude], position[ExifTags.GPS.GPSLatitudeRef] = GPS_LATITUDE
    position[ExifTags.GPS.GPSLongitude], position[ExifTags.GPS.GPSLongitudeRef] = GPS_LONGITUDE
    return exif


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A wooden table, a woven cloth, tiles or a plain surface, seen from above."""
    width, height = size
    kind = rng.integers(4)
    colour = np.array(make_colour(rng, saturation=rng.uniform(0.03, 0.35), value=rng.uniform(0.45, 0.95)), np.float32)
    if kind == 0:
        colour = np.array([150, 105, 65], np.float32) * rng.uniform(0.6, 1.4)
        texture = _smooth_noise(rng, size, (3, 40)) * 0.14 + _smooth_noise(rng, size, (2, 120)) * 0.1
    elif kind == 1:
        pitch = rng.uniform(5, 14)
        y, x = np.mgrid[:height, :width].astype(np.float32)
        texture = 0.06 * (np.sin(2 * np.pi * x / pitch) + np.sin(2 * np.pi * y / pitch))
        texture += _smooth_noise(rng, size, (6, 6)) * 0.12
    elif kind == 2:
        tile = max(8, int(min(size) * rng.uniform(0.2, 0.45)))
        shift = rng.integers(0, tile, 2)
        lines = (np.arange(height)[:, None] + shift[0]) % tile < 4
        joints = lines | ((np.arange(width) + shift[1]) % tile < 4)
        texture = _smooth_noise(rng, size, (12, 12)) * 0.1 - 0.3 * joints
    else:
        texture = _smooth_noise(rng, size, (4, 4)) * 0.12
    pixels = colour * (1 + texture[..., None])
    scene = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return scene.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if rng.random() < 0.5 else scene


def _smooth_noise(rng: np.random.Generator, size: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """(H, W) noise of standard deviation about 0.6 with `cells` = (across, down) bumps."""
    coarse = Image.fromarray(rng.standard_normal((cells[1], cells[0]), np.float32))
    return np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))


def _add_clutter(scene: Image.Image, rng: np.random.Generator) -> None:
    """One distractor near the border: a sheet, a coin, a pencil or a stain."""
    short = min(scene.size)
    angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.62)
    x = scene.width * (0.5 + reach * np.cos(angle))
    y = scene.height * (0.5 + reach * np.sin(angle))
    draw = ImageDraw.Draw(scene)
    colour = make_colour(rng, saturation=rng.uniform(0, 0.7), value=rng.uniform(0.3, 1.0))
    kind = rng.integers(4)
    if kind == 0:
        draw.polygon(_turned_box(x, y, short * rng.uniform(0.1, 0.3), short * rng.uniform(0.1, 0.3), rng), colour)
    elif kind == 1:
        radius = short * rng.uniform(0.03, 0.09)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour, shade(colour, 0.7), 2)
        draw.ellipse(
            (x - radius * 0.7, y - radius * 0.7, x + radius * 0.7, y + radius * 0.7),
            outline=shade(colour, 0.8),
        )
    elif kind == 2:
        draw.polygon(_turned_box(x, y, short * rng.uniform(0.2, 0.4), short * 0.014, rng), colour)
    else:
        rx, ry = short * rng.uniform(0.04, 0.2, 2)
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), shade(colour, 0.8))


def _turned_box(x: float, y: float, half_width: float, half_height: float, rng: np.random.Generator) -> Points:
    angle = rng.uniform(0, np.pi)
    along = np.array([np.cos(angle), np.sin(angle)]) * half_width
    across = np.array([-np.sin(angle), np.cos(angle)]) * half_height
    corners = (along + across, along - across, -along - across, across - along)
    return [(float(x + corner[0]), float(y + corner[1])) for corner in corners]


if __name__ == "__main__":
    sys.exit(main())
