"""How a photo becomes a model's input, as a record: what `config.json` stores, and what files of other libraries say.
No torch, no Pillow.

`preprocess.py` carries it out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from wasi_edge.errors import ArtefactError

# in the order of Pillow's numbers for them
_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


@dataclass(frozen=True)
class Preprocessing:
    """How a photo becomes a model's input: lengths in pixels; mean and std per channel, on the 0..1 scale.

    `crop_fraction` is the part of the shrunk short side that the model sees (1.0: all of it). `squash`: a photo is made
    square by scaling its sides differently, instead of losing what is beyond the middle. `even_offset`: where that
    leaves half a pixel, the middle begins at the even one of the two (torchvision, timm), not at the first.
    Raises `ArtefactError` on values that make no sense, whichever way it is built.
    """

    image_size: int = 224
    crop_fraction: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    squash: bool = False
    even_offset: bool = False

    def __post_init__(self) -> None:
        _require_int("image_size", self.image_size, 8, 2048)
        _require_number("crop_fraction", self.crop_fraction, 0.25, 1.0)
        if self.interpolation not in _INTERPOLATIONS:
            raise ArtefactError(f"interpolation must be one of {sorted(_INTERPOLATIONS)}: {self.interpolation!r}")
        _three("mean", self.mean, -1e6)
        _three("std", self.std, 1e-6)
        for name in ("squash", "even_offset"):
            if type(value := getattr(self, name)) is not bool:
                raise ArtefactError(f"preprocessing: {name} must be true or false, found {value!r}")

    @property
    def resize_side(self) -> int:
        """Short side of a shrunk photo, pixels."""
        return round(self.image_size / self.crop_fraction)

    def with_image_size(self, image_size: int) -> Preprocessing:
        """The same preprocessing for another input size (same crop fraction)."""
        return dataclasses.replace(self, image_size=image_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as `config.json` stores them."""
        return dataclasses.asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, d: Any) -> Preprocessing:
        """The inverse of `to_dict`; keys left out take their defaults. Raises `ArtefactError`."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(d, dict) or not set(d) <= names:
            raise ArtefactError(f"preprocessing: expected keys among {sorted(names)}, found {d!r}")
        triples: dict[str, Any] = {name: _three(name, d[name], -1e6) for name in ("mean", "std") if name in d}
        return cls(**(d | triples))

    @classmethod
    def plain_vit(cls, image_size: int = 224) -> Preprocessing:
        """What Hugging Face assumes for a ViT that comes without a preprocessor file."""
        return cls(image_size, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), squash=True)

    @classmethod
    def from_timm(cls, d: dict[str, Any]) -> Preprocessing:
        """Read a `pretrained_cfg`, as timm's configurations on the hub hold it. Raises `ArtefactError`."""
        size = d.get("input_size", [3, 224, 224])
        if not isinstance(size, list | tuple) or len(size) != 3 or size[1] != size[2]:
            raise ArtefactError(f"pretrained_cfg: input_size should be [3, S, S], found {size!r}")
        _require_int("input_size", size[1], 8, 2048)
        crop = _require_number("crop_pct", d.get("crop_pct", 0.875), 0.25, 1.0)
        mean = _three("mean", d.get("mean", cls.mean), -1e6)
        std = _three("std", d.get("std", cls.std), 1e-6)
        squash = d.get("crop_mode", "center") == "squash"
        side = int(size[1])
        crop = side / int(side / crop)  # timm rounds the length before the crop down
        return cls(side, crop, str(d.get("interpolation", "bicubic")), mean, std, squash, even_offset=True)

    @classmethod
    def from_hugging_face(cls, d: dict[str, Any] | None) -> Preprocessing:
        """Read a `preprocessor_config.json` (None: there is no such file). Raises `ArtefactError`."""
        if d is None:
            return cls.plain_vit()
        if not isinstance(d, dict):
            raise ArtefactError(f"preprocessor_config.json: expected an object, found {type(d).__name__}")
        size = d.get("size", 224)
        resize_side = _square("size", size)
        image_size = resize_side
        squash = "height" in size if isinstance(size, dict) else not _takes_short_sides(d)
        if d.get("do_center_crop", "crop_size" in d):
            image_size = _square("crop_size", d.get("crop_size", resize_side))
        elif d.get("crop_pct") and resize_side < 384:  # ConvNeXT's files: enlarge first, then crop to `size`
            resize_side = round(image_size / _require_number("crop_pct", d["crop_pct"], 0.25, 1.0))
            squash = False
        resample = _require_int("resample", d.get("resample", _INTERPOLATIONS.index("bilinear")), 0, 5)
        normalised = d.get("do_normalize", True)
        mean = _three("image_mean", d.get("image_mean", 0.5) if normalised else 0.0, -1e6)
        std = _three("image_std", d.get("image_std", 0.5) if normalised else 1.0, 1e-6)
        # (x * f - mean) / std is the usual formula with mean and std divided by 255 f.
        factor = d.get("rescale_factor", 1 / 255) if d.get("do_rescale", True) else 1.0
        gain = 255 * _require_number("rescale_factor", factor, 1e-6, 1.0)
        mean = _three("image_mean", [value / gain for value in mean], -1e6)
        std = _three("image_std", [value / gain for value in std], 1e-6)
        crop = min(1.0, image_size / resize_side)
        return cls(image_size, crop, _INTERPOLATIONS[resample], mean, std, squash)


def _require_number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ArtefactError(f"preprocessing: {name} must lie in {low:g} .. {high:g}, found {value!r}")
    return float(value)


def _require_int(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ArtefactError(f"preprocessing: {name} must be whole, {low} to {high}, found {value!r}")
    return value


def _three(name: str, values: Any, low: float) -> tuple[float, float, float]:
    """One number of at least `low` per channel, out of three of them or of one for all."""
    triple = (values,) * 3 if isinstance(values, int | float) else values
    if not isinstance(triple, list | tuple) or len(triple) != 3:
        raise ArtefactError(f"preprocessing: {name} must be three numbers, found {values!r}")
    red, green, blue = (_require_number(name, value, low, 1e6) for value in triple)
    return red, green, blue


def _takes_short_sides(d: dict[str, Any]) -> bool:
    """Whether a length without a word is that of the short side, by the processor that Hugging Face would use; ViT's,
    DeiT's and Swin's take it for both."""
    kind = str(d.get("image_processor_type") or d.get("feature_extractor_type") or "")
    return kind.startswith(("Bit", "CLIP", "ConvNext", "Beit"))


def _square(name: str, size: Any) -> int:
    """One length out of Hugging Face's ways: 224, {"shortest_edge": n}, {"height": n, "width": n}."""
    if isinstance(size, dict):
        edges = [size[key] for key in ("shortest_edge", "height", "width") if key in size]
        size = edges[0] if edges and edges.count(edges[0]) == len(edges) else size
    return _require_int(name, size, 8, 4096)
