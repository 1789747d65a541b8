"""The objects of the demo photos, one function each, drawn with Pillow and shaded with numpy.

A sprite is a transparent square of 2 x 2 units around the origin, y downward. A function draws flat
colours on it, then multiplies them by a field of light, which is what makes a cylinder look round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]

_SPRITE = 640  # pixels across, before an object is turned and scaled
_Y, _X = np.mgrid[-1 : 1 : _SPRITE * 1j, -1 : 1 : _SPRITE * 1j].astype(np.float32)


def make_colour(rng: np.random.Generator, saturation: float, value: float, hue: float | None = None) -> Colour:
    """A colour of any hue, or of the one given."""
    hue = rng.uniform() if hue is None else hue
    wheel = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    red, green, blue = (255 * value * (1 - saturation + saturation * wheel)).astype(int).tolist()
    return red, green, blue


def shade(colour: Colour, factor: float) -> Colour:
    """The colour in more (above 1) or less light."""
    red, green, blue = (min(255, int(channel * factor)) for channel in colour)
    return red, green, blue


class _Sprite:
    """A square canvas in units (-1 ... 1 both ways, y downward)."""

    def __init__(self) -> None:
        self.image = Image.new("RGBA", (_SPRITE, _SPRITE))
        self.draw = ImageDraw.Draw(self.image)

    def box(self, left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        """Pixel corners of a box in units."""
        return tuple((edge + 1) / 2 * _SPRITE for edge in (left, top, right, bottom))  # type: ignore[return-value]

    def polygon(self, points: np.ndarray | Points, colour: Colour) -> None:
        """A filled polygon given in units."""
        self.draw.polygon([((x + 1) / 2 * _SPRITE, (y + 1) / 2 * _SPRITE) for x, y in points], colour)

    def line(self, points: Points, colour: Colour, width: float) -> None:
        """A stroke given in units."""
        pixels = [((x + 1) / 2 * _SPRITE, (y + 1) / 2 * _SPRITE) for x, y in points]
        self.draw.line(pixels, colour, max(1, int(width * _SPRITE / 2)), "curve")

    def lit(self, light: np.ndarray, gloss: np.ndarray | float = 0.0) -> Image.Image:
        """The finished object: colours times `light` plus `gloss`, two (_SPRITE, _SPRITE) arrays."""
        pixels = np.asarray(self.image).astype(np.float32)
        pixels[..., :3] = pixels[..., :3] * light[..., None] + 255 * np.asarray(gloss)[..., None]
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _bump(x: float, y: float, width: float, height: float) -> np.ndarray:
    """A soft spot of light."""
    return np.exp(-(((_X - x) / width) ** 2) - ((_Y - y) / height) ** 2)


def _round_light(left: float, right: float) -> np.ndarray:
    """Light on a standing cylinder that spans `left` ... `right`."""
    across = np.clip((_X - (left + right) / 2) / ((right - left) / 2), -1, 1)
    return 0.45 + 0.6 * np.sqrt(1 - 0.92 * across**2) - 0.15 * across


def _mug(rng: np.random.Generator) -> Image.Image:
    sprite, colour = _Sprite(), make_colour(rng, rng.uniform(0.05, 0.8), rng.uniform(0.5, 1))
    top, half = rng.uniform(-0.75, -0.55), rng.uniform(0.42, 0.55)
    left, right, bottom = -half - 0.12, half - 0.12, rng.uniform(0.5, 0.75)
    sprite.draw.ellipse(sprite.box(right - 0.3, top + 0.25, right + 0.42, bottom - 0.2), None, shade(colour, 0.85), 46)
    taper = rng.uniform(0, 0.12)
    sprite.draw.ellipse(sprite.box(left + taper, bottom - 0.15, right - taper, bottom + 0.15), colour)
    sprite.polygon([(left, top), (right, top), (right - taper, bottom), (left + taper, bottom)], colour)
    if rng.random() < 0.6:
        stripe, height = make_colour(rng, 0.6, 0.9), rng.uniform(0.08, 0.3)
        sprite.polygon(
            [
                (left + taper / 2, 0),
                (right - taper / 2, 0),
                (right - taper / 2, height),
                (left + taper / 2, height),
            ],
            stripe,
        )
    sprite.draw.ellipse(sprite.box(left, top - 0.15, right, top + 0.15), shade(colour, 1.15))
    drink = shade((92, 52, 24), rng.uniform(0.5, 1.6))
    sprite.draw.ellipse(sprite.box(left + 0.06, top - 0.09, right - 0.06, top + 0.13), drink)
    return sprite.lit(_round_light(left, right), 0.35 * _bump(left + 0.25, 0.05, 0.06, 0.35))


def _leaf(rng: np.random.Generator) -> Image.Image:
    colour = make_colour(
        rng, rng.uniform(0.45, 0.85), rng.uniform(0.35, 0.8), rng.choice([0.03, 0.09, 0.14, 0.25, 0.3, 0.36])
    )
    sprite, half = _Sprite(), rng.uniform(0.3, 0.55)
    t = np.linspace(0, 1, 60)
    teeth = 1 + rng.uniform(0.0, 0.12) * np.sin(t * np.pi * rng.integers(16, 30))
    outline = half * np.sin(np.pi * t ** rng.uniform(0.65, 1.1)) * teeth
    y = -0.85 + 1.45 * t
    points = np.concatenate([np.stack([outline, y], 1), np.stack([-outline, y], 1)[::-1]])
    sprite.line([(0, 0.5), (rng.uniform(-0.12, 0.12), 0.95)], shade(colour, 0.7), 0.045)
    sprite.polygon(points, colour)
    vein = shade(colour, rng.choice([0.7, 1.3]))
    sprite.line([(0, -0.8), (0, 0.6)], vein, 0.03)
    for start in np.linspace(-0.5, 0.45, int(rng.integers(5, 9))):
        reach = 0.85 * float(np.interp(start - 0.15, y, outline))
        for side in (-1, 1):
            sprite.line([(0, start), (side * reach, start - 0.2)], vein, 0.014)
    blotches = np.asarray(Image.fromarray(rng.standard_normal((9, 9), np.float32)).resize((_SPRITE, _SPRITE)))
    return sprite.lit(0.95 + 0.12 * np.sign(_X) * rng.choice([-1, 1]) + 0.1 * blotches)


def _key(rng: np.random.Generator) -> Image.Image:
    metal = [(196, 198, 204), (205, 170, 92), (150, 120, 90), (120, 124, 130)][rng.integers(4)]
    sprite, clear = _Sprite(), (0, 0, 0, 0)
    bow, shaft = rng.uniform(0.26, 0.36), rng.uniform(0.055, 0.085)
    centre = -0.92 + bow
    if rng.random() < 0.5:
        sprite.draw.ellipse(sprite.box(-bow, centre - bow, bow, centre + bow), metal)
    else:
        sprite.draw.rounded_rectangle(sprite.box(-bow, centre - bow, bow, centre + bow), 60, metal)
    hole, lift = bow * rng.uniform(0.3, 0.68), bow * rng.uniform(0, 0.2)
    sprite.draw.ellipse(sprite.box(-hole, centre - lift - hole, hole, centre - lift + hole), clear)
    sprite.polygon(
        [(-shaft, centre + bow * 0.9), (shaft, centre + bow * 0.9), (shaft, 0.9), (0, 0.97), (-shaft, 0.9)],
        metal,
    )
    for start in np.linspace(0.45, 0.82, int(rng.integers(2, 6))):
        reach = shaft + rng.uniform(0.07, 0.22)
        sprite.polygon([(0, start), (reach, start), (reach, start + 0.06), (0, start + 0.06)], metal)
    sprite.line([(0, centre + bow), (0, 0.85)], shade(metal, 0.72), 0.02)
    brushed = np.repeat(rng.standard_normal((_SPRITE, 1)).astype(np.float32), _SPRITE, 1)
    return sprite.lit(0.85 + 0.25 * _X + 0.2 * np.sin(3 * _Y + rng.uniform(0, 6)) + 0.04 * brushed)


def _ball(rng: np.random.Generator) -> Image.Image:
    sprite, radius = _Sprite(), rng.uniform(0.6, 0.9)
    colour = make_colour(rng, rng.uniform(0.2, 0.9), rng.uniform(0.5, 1))
    other = make_colour(rng, rng.uniform(0.0, 0.9), rng.uniform(0.3, 1))
    sprite.draw.ellipse(sprite.box(-radius, -radius, radius, radius), colour)
    x, y = _X / radius, _Y / radius
    z = np.sqrt(np.clip(1 - x**2 - y**2, 0, 1))
    axis = rng.standard_normal(3)
    axis /= np.linalg.norm(axis)
    along = axis[0] * x + axis[1] * y + axis[2] * z  # latitude's sine on the ball
    pattern = rng.integers(4)
    if pattern == 0:
        painted = np.sin(along * rng.uniform(5, 12)) > 0
    elif pattern == 1:
        painted = np.abs(along) < rng.uniform(0.03, 0.25)
    elif pattern == 2:
        painted = np.sin(7 * x) * np.sin(7 * y) * np.sin(7 * z + 1) > 0.12
    else:
        painted = np.zeros_like(x, bool)
    pixels = np.array(sprite.image)
    pixels[painted & (pixels[..., 3] > 0), :3] = other
    sprite.image = Image.fromarray(pixels)
    facing = np.clip(-0.45 * x - 0.6 * y + 0.65 * z, 0, 1)
    return sprite.lit(0.3 + 0.8 * facing, rng.uniform(0.1, 0.6) * _bump(-0.33 * radius, -0.42 * radius, 0.14, 0.11))


def _bottle(rng: np.random.Generator) -> Image.Image:
    sprite, colour = _Sprite(), make_colour(rng, rng.uniform(0.2, 0.8), rng.uniform(0.3, 0.85))
    half, neck, shoulder = rng.uniform(0.24, 0.34), rng.uniform(0.08, 0.12), rng.uniform(-0.4, -0.1)
    ease = np.linspace(0, np.pi, 20)
    slope = np.stack([neck + (half - neck) * (1 - np.cos(ease)) / 2, shoulder + 0.3 * ease / np.pi - 0.15], 1)
    side = np.concatenate([[[neck, -0.85]], slope, [[half, 0.88], [half - 0.05, 0.93]]])
    sprite.polygon(np.concatenate([side, (side * (-1, 1))[::-1]]), colour)
    cap = make_colour(rng, rng.uniform(0, 0.9), rng.uniform(0.2, 1))
    sprite.draw.rounded_rectangle(sprite.box(-neck - 0.03, -0.96, neck + 0.03, -0.78), 8, cap)
    if rng.random() < 0.8:
        top, paper = rng.uniform(0.15, 0.3), make_colour(rng, 0.15, 0.95)
        sprite.draw.rectangle(sprite.box(-half, top, half, top + 0.45), paper)
        for line in np.arange(top + 0.1, top + 0.4, 0.1):
            sprite.line([(-half * 0.6, line), (half * rng.uniform(0, 0.6), line)], shade(paper, 0.4), 0.03)
    return sprite.lit(_round_light(-half, half), 0.45 * _bump(-half * 0.5, 0.2, 0.035, 0.7))


def _book(rng: np.random.Generator) -> Image.Image:
    sprite, colour = _Sprite(), make_colour(rng, rng.uniform(0.2, 0.9), rng.uniform(0.3, 0.9))
    half, tall, thick = rng.uniform(0.5, 0.62), rng.uniform(0.7, 0.8), rng.uniform(0.06, 0.16)
    sprite.polygon(
        [(-half, tall), (half, tall), (half + thick, tall + thick), (thick - half, tall + thick)],
        (232, 226, 208),
    )
    sprite.polygon(
        [(half, -tall), (half + thick, thick - tall), (half + thick, tall + thick), (half, tall)],
        (214, 206, 186),
    )
    for page in np.linspace(0.2, 0.9, 6) * thick:
        sprite.line(
            [(page - half, tall + page), (half + page, tall + page), (half + page, page - tall)],
            (170, 162, 142),
            0.006,
        )
    sprite.draw.rectangle(sprite.box(-half, -tall, half, tall), colour)
    sprite.draw.rectangle(sprite.box(-half, -tall, -half + 0.09, tall), shade(colour, 0.7))
    title, inset = make_colour(rng, rng.uniform(0, 0.5), 0.95), rng.uniform(0.15, 0.3)
    for line in np.linspace(-0.45, rng.uniform(-0.3, 0.0), int(rng.integers(1, 4))):
        sprite.line([(inset - half, line), (half - rng.uniform(0.1, 0.5), line)], title, 0.07)
    if rng.random() < 0.6:
        radius = rng.uniform(0.12, 0.25)
        sprite.draw.ellipse(sprite.box(-radius, 0.3 - radius, radius, 0.3 + radius), make_colour(rng, 0.6, 0.9))
    return sprite.lit(0.95 - 0.12 * _X - 0.1 * _Y)


OBJECTS: dict[str, Callable[[np.random.Generator], Image.Image]] = {
    "mug": _mug, "leaf": _leaf, "key": _key, "ball": _ball, "bottle": _bottle, "book": _book,
}  # fmt: skip
