"""The shape of a Swin transformer (Liu et al. 2021), and the name and shape of every tensor it stores.

Stages of blocks; attention within windows of w x w tokens, in every second block within windows shifted by w // 2; from
one stage to the next four tokens become one of twice the width. Blocks are numbered through all stages, and what merges
tokens belongs to the first block of the stage behind it. The head reads the mean of all tokens after the last norm.

No torch: planning happens before torch is imported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from wasi_edge.errors import ArtefactError, UsageError
from wasi_edge.models.geometry import BlockShape, ViTGeometry, checked_fields, linear_tensors


@dataclass(frozen=True)
class SwinGeometry:
    """Sizes of a Swin transformer.

    patch_size      side of a patch, pixels
    width           D, channels of a token of the first stage; each stage doubles it
    depths          blocks of each stage
    stage_heads     attention heads of each stage
    mlp_ratio       hidden channels of an MLP over its width
    window          side of a window, tokens; the bias tables are stored for it
    channels        colour channels of the input
    norm_eps        epsilon of the layer norms

    Raises ArtefactError where the values contradict each other.
    """

    patch_size: int
    width: int
    depths: tuple[int, ...]
    stage_heads: tuple[int, ...]
    window: int
    mlp_ratio: float = 4.0
    channels: int = 3
    norm_eps: float = 1e-5
    architecture: ClassVar[str] = "swin"
    has_windows: ClassVar[bool] = True
    # what a head reads, in the words of ViTGeometry
    features: ClassVar[str] = "mean"
    queries: ClassVar[None] = None
    leading_tokens: ClassVar[int] = 0
    registers: ClassVar[int] = 0
    class_token: ClassVar[bool] = False
    layer_scale: ClassVar[bool] = False
    pool_first: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("patch_size", "width", "window", "channels"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ArtefactError(f"geometry: {name} should be a whole number above 0, found {value!r}")
        for name in ("depths", "stage_heads"):
            values = getattr(self, name)
            if not values or not all(type(value) is int and value > 0 for value in values):
                raise ArtefactError(f"geometry: {name} should be whole numbers above 0, found {values!r}")
        if len(self.depths) != len(self.stage_heads):
            raise ArtefactError(f"geometry: {len(self.depths)} stages but heads of {len(self.stage_heads)}")
        for stage, heads in enumerate(self.stage_heads):
            if self.stage_width(stage) % heads:
                raise ArtefactError(f"geometry: width {self.stage_width(stage)} is no multiple of {heads} heads")
        for name in ("mlp_ratio", "norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not (math.isfinite(value) and 0 < value < 1e3):
                raise ArtefactError(f"geometry: {name} should be a number above 0, found {value!r}")

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def feature_width(self) -> int:
        """F, the input width of the head."""
        return self.stage_width(len(self.depths) - 1)

    def stage_width(self, stage: int) -> int:
        """Channels of a token of a stage."""
        return self.width * 2**stage

    def stage_of(self, block: int) -> tuple[int, int]:
        """The stage of a block, and its number within it."""
        for stage, depth in enumerate(self.depths):
            if block < depth:
                return stage, block
            block -= depth
        raise IndexError(f"there are only {self.depth} blocks")

    def read_tokens(self, tokens: int) -> int:
        """Of so many tokens per photo, those that the last block is asked for: all."""
        return tokens

    def grid(self, image_size: int) -> int:
        """Patches along one side of a square image. Raises UsageError, naming the nearest sizes that work, if the
        stages cannot halve it."""
        step = self.patch_size * 2 ** (len(self.depths) - 1)
        if image_size < 1 or image_size % step:
            below = image_size // step * step
            near = f"{below} or {below + step}" if below > 0 else f"{step}"
            raise UsageError(f"image size {image_size} is not a multiple of {step}, as this model needs; try {near}")
        return image_size // self.patch_size

    def tokens(self, image_size: int) -> int:
        """Tokens per image before the first block. Raises UsageError as `grid` does."""
        return self.grid(image_size) ** 2

    def window_at(self, image_size: int) -> int:
        """Side of the windows: the stored one where it tiles every stage, else that of the last stage's whole grid,
        which tiles all of them (with the bias tables resampled)."""
        last = self.grid(image_size) >> (len(self.depths) - 1)
        return last if last % self.window else self.window

    def shift_at(self, image_size: int, block: int) -> int:
        """By how many tokens the windows of a block are shifted."""
        stage, number = self.stage_of(block)
        window = self.window_at(image_size)
        return window // 2 if number % 2 and window < self.grid(image_size) >> stage else 0

    def at_size(self, image_size: int) -> SwinGeometry:
        """The same network with bias tables for the windows of `image_size`."""
        return dataclasses.replace(self, window=self.window_at(image_size))

    def block_shapes(self, image_size: int) -> list[BlockShape]:
        """Of every block, in the order of the forward pass. Raises UsageError as `grid` does."""
        shapes = []
        for block in range(self.depth):
            stage, number = self.stage_of(block)
            width = self.stage_width(stage)
            shapes.append(
                BlockShape(
                    tokens=(self.grid(image_size) >> stage) ** 2,
                    width=width,
                    mlp_width=round(self.mlp_ratio * width),
                    heads=self.stage_heads[stage],
                    attended=self.window_at(image_size) ** 2,
                    merged=stage > 0 and number == 0,
                )
            )
        return shapes

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(O, I) of every linear of the blocks, in the order of the forward pass."""
        shapes = {}
        for block in range(self.depth):
            stage, number = self.stage_of(block)
            width = self.stage_width(stage)
            hidden = round(self.mlp_ratio * width)
            if stage and not number:
                shapes[f"blocks.{block}.merge"] = (width, 2 * width)
            shapes[f"blocks.{block}.qkv"] = (3 * width, width)
            shapes[f"blocks.{block}.proj"] = (width, width)
            shapes[f"blocks.{block}.fc1"] = (hidden, width)
            shapes[f"blocks.{block}.fc2"] = (width, hidden)
        return shapes

    def tensor_shapes(self, ranks: Mapping[str, int | None], num_classes: int | None) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the artefact, in the order it is written; as that of `ViTGeometry`."""
        linears = self.linear_shapes()
        if unknown := sorted(set(ranks) - set(linears)):
            raise ArtefactError(f"geometry: there is no linear {unknown[0]!r} in {self.depth} blocks")
        shapes: dict[str, tuple[int, ...]] = {
            "patch_embed.weight": (self.width, self.channels * self.patch_size**2),
            "patch_embed.bias": (self.width,),
            **_norm("patch_norm", self.width),
        }
        for block in range(self.depth):
            stage, _ = self.stage_of(block)
            width, prefix = self.stage_width(stage), f"blocks.{block}"
            if (merge := f"{prefix}.merge") in linears:
                shapes |= _norm(f"{prefix}.merge_norm", 2 * width)
                shapes |= linear_tensors(merge, *linears[merge], ranks.get(merge), has_bias=False)
            for norm, names in (("norm1", ("qkv", "proj")), ("norm2", ("fc1", "fc2"))):
                shapes |= _norm(f"{prefix}.{norm}", width)
                for name in names:
                    linear = f"{prefix}.{name}"
                    shapes |= linear_tensors(linear, *linears[linear], ranks.get(linear))
            shapes[f"{prefix}.attention.bias_table"] = ((2 * self.window - 1) ** 2, self.stage_heads[stage])
        shapes |= _norm("norm", self.feature_width)
        if num_classes is not None:
            shapes["head.weight"] = (num_classes, self.feature_width)
            shapes["head.bias"] = (num_classes,)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self) | {"depths": list(self.depths), "stage_heads": list(self.stage_heads)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SwinGeometry:
        """The inverse of `to_dict`. Raises ArtefactError on missing, unknown or impossible values."""
        given = dict(checked_fields(cls, values))
        for name in ("depths", "stage_heads"):
            if not isinstance(given[name], list | tuple):
                raise ArtefactError(f"geometry: {name} should be a list, found {given[name]!r}")
            given[name] = tuple(given[name])
        return cls(**given)


Geometry = ViTGeometry | SwinGeometry
_BY_ARCHITECTURE: dict[str, type[ViTGeometry] | type[SwinGeometry]] = {"vit": ViTGeometry, "swin": SwinGeometry}


def geometry_from_dict(architecture: str, values: Mapping[str, Any]) -> Geometry:
    """The geometry of an architecture by name. Raises ArtefactError for an unknown one, and as `from_dict` does."""
    if architecture not in _BY_ARCHITECTURE:
        known = " or ".join(repr(name) for name in _BY_ARCHITECTURE)
        raise ArtefactError(f"config: architecture should be {known}, found {architecture!r}")
    return _BY_ARCHITECTURE[architecture].from_dict(values)


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
