"""The shape of a vision transformer, and with it the name and shape of every tensor it stores.

One frozen record from which the planner counts, the artefact is checked, the converter plans and
the model is built, so that a tensor's name is spelled in one place. Blocks are pre-norm:
x + scale1 * proj(attention(norm1(x))), then x + scale2 * fc2(gelu(fc1(norm2(x)))), GELU by erf.

No torch: planning happens before torch is imported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from wasi_edge.errors import ArtefactError, UsageError


class BlockShape(NamedTuple):
    """One block at one input size: what it costs follows from this.

    tokens      N, tokens per photo that it works on
    width       D, channels of a token
    mlp_width   M, hidden channels of its MLP
    heads       attention heads
    attended    tokens that look at each other: all of a photo's, or those of a window
    merged      whether it takes four tokens of half the width for one of its own
    """

    tokens: int
    width: int
    mlp_width: int
    heads: int
    attended: int
    merged: bool = False


FEATURES = ("class", "mean", "class+mean", "class+distillation")
_SIZES = ("patch_size", "width", "depth", "heads", "mlp_width", "position_grid", "channels")


@dataclass(frozen=True)
class ViTGeometry:
    """Sizes of a ViT.

    patch_size      side of a patch, pixels
    width           D, channels of a token
    depth           number of blocks
    heads           attention heads; width must be a multiple
    mlp_width       M, hidden channels of the MLP
    position_grid   g: the stored position table is g x g, resampled to the grid of the input
    channels        colour channels of the input
    class_token     whether a class token precedes the patches
    registers       tokens between it and the patches, without a position of their own (Darcet et al. 2024;
                    a distillation token is one)
    features        what the head reads after the last norm: 'class' token, 'mean' of the patches,
                    or both side by side, class first; 'class+distillation': the class token and the first register
    pool_first      whether the mean is taken before the last norm instead of after it; for 'mean' alone
    layer_scale     whether each branch is scaled per channel before it is added
    norm_eps        epsilon of the layer norms

    Raises ArtefactError where the values contradict each other.
    """

    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    position_grid: int
    channels: int = 3
    class_token: bool = True
    features: str = "class+mean"
    layer_scale: bool = False
    norm_eps: float = 1e-6
    registers: int = 0
    pool_first: bool = False
    architecture: ClassVar[str] = "vit"
    # whether tokens change their order between blocks
    has_windows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ArtefactError(f"geometry: {name} should be a whole number above 0, found {value!r}")
        if type(self.registers) is not int or self.registers < 0:
            raise ArtefactError(f"geometry: registers should be a whole number, found {self.registers!r}")
        for name in ("class_token", "layer_scale", "pool_first"):
            if type(getattr(self, name)) is not bool:
                raise ArtefactError(f"geometry: {name} should be true or false, found {getattr(self, name)!r}")
        if self.width % self.heads:
            raise ArtefactError(f"geometry: width {self.width} is not a multiple of the {self.heads} heads")
        if self.features not in FEATURES:
            raise ArtefactError(f"geometry: features should be one of {', '.join(FEATURES)}, found {self.features!r}")
        if "class" in self.features and not self.class_token:
            raise ArtefactError(f"geometry: features {self.features!r} need a class token, the model has none")
        if self.features == "class+distillation" and not self.registers:
            raise ArtefactError("geometry: features 'class+distillation' need a register, the model has none")
        if self.pool_first and self.features != "mean":
            raise ArtefactError(f"geometry: pool_first goes with features 'mean', found {self.features!r}")
        eps = self.norm_eps
        if type(eps) not in (int, float) or not (math.isfinite(eps) and eps > 0):
            raise ArtefactError(f"geometry: norm_eps should be a number above 0, found {eps!r}")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def feature_width(self) -> int:
        """F, the input width of the head: D, or 2 D where it reads two things side by side."""
        return 2 * self.width if "+" in self.features else self.width

    @property
    def leading_tokens(self) -> int:
        """Tokens before those of the patches."""
        return int(self.class_token) + self.registers

    def grid(self, image_size: int) -> int:
        """Patches along one side of a square image of `image_size` pixels.

        Raises UsageError, naming the nearest sizes that work, if it is not a multiple of the patch.
        """
        patch = self.patch_size
        if image_size < 1 or image_size % patch:
            below = image_size // patch * patch
            near = f"{below} or {below + patch}" if below > 0 else f"{patch}"
            raise UsageError(
                f"image size {image_size} is not a multiple of the model's {patch}-pixel patches; try {near}"
            )
        return image_size // patch

    @property
    def queries(self) -> int | None:
        """How many leading tokens the head reads, if those are all it reads: the last block has nothing to do for the
        others. None where it reads all."""
        return {"class": 1, "class+distillation": 2}.get(self.features)

    def read_tokens(self, tokens: int) -> int:
        """Of so many tokens per photo, those that the last block is asked for."""
        return self.queries or tokens

    def tokens(self, image_size: int) -> int:
        """Tokens per image, class token and registers included. Raises UsageError as `grid` does."""
        return self.grid(image_size) ** 2 + self.leading_tokens

    def at_size(self, image_size: int) -> ViTGeometry:
        """The same network with a position table for `image_size`."""
        return dataclasses.replace(self, position_grid=self.grid(image_size))

    def block_shapes(self, image_size: int) -> list[BlockShape]:
        """Of every block, in the order of the forward pass. Raises UsageError as `grid` does."""
        tokens = self.tokens(image_size)
        return [BlockShape(tokens, self.width, self.mlp_width, self.heads, tokens)] * self.depth

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(O, I) of every linear of the blocks, in the order of the forward pass."""
        shapes = {}
        for block in range(self.depth):
            shapes[f"blocks.{block}.qkv"] = (3 * self.width, self.width)
            shapes[f"blocks.{block}.proj"] = (self.width, self.width)
            shapes[f"blocks.{block}.fc1"] = (self.mlp_width, self.width)
            shapes[f"blocks.{block}.fc2"] = (self.width, self.mlp_width)
        return shapes

    def tensor_shapes(self, ranks: Mapping[str, int | None], num_classes: int | None) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the artefact, in the order it is written.

        `ranks` maps a linear's name to its rank K, or None for a dense one; a linear not named is
        dense. `num_classes` None means no head. Raises ArtefactError for names or ranks the
        geometry does not have.
        """
        linears = self.linear_shapes()
        if unknown := sorted(set(ranks) - set(linears)):
            raise ArtefactError(f"geometry: there is no linear {unknown[0]!r} in {self.depth} blocks")
        width, patch = self.width, self.patch_size
        shapes: dict[str, tuple[int, ...]] = {
            "patch_embed.weight": (width, self.channels * patch * patch),
            "patch_embed.bias": (width,),
        }
        if self.class_token:
            shapes["class_token"] = (width,)
        if self.registers:
            shapes["registers"] = (self.registers, width)
        shapes["position"] = (self.position_grid**2 + int(self.class_token), width)
        for block in range(self.depth):
            prefix = f"blocks.{block}"
            for norm, names, scale in (
                ("norm1", ("qkv", "proj"), "scale1"),
                ("norm2", ("fc1", "fc2"), "scale2"),
            ):
                shapes[f"{prefix}.{norm}.weight"] = (width,)
                shapes[f"{prefix}.{norm}.bias"] = (width,)
                for name in names:
                    linear = f"{prefix}.{name}"
                    shapes.update(linear_tensors(linear, *linears[linear], ranks.get(linear)))
                if self.layer_scale:
                    shapes[f"{prefix}.{scale}"] = (width,)
        shapes["norm.weight"] = (width,)
        shapes["norm.bias"] = (width,)
        if num_classes is not None:
            shapes["head.weight"] = (num_classes, self.feature_width)
            shapes["head.bias"] = (num_classes,)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViTGeometry:
        """The inverse of `to_dict`. Raises ArtefactError on missing, unknown or impossible values."""
        return cls(**checked_fields(cls, values))


def checked_fields(cls: type[Any], values: Any) -> Mapping[str, Any]:
    """`values`, if they are fields of the dataclass. Raises ArtefactError for missing and unknown ones."""
    if not isinstance(values, Mapping):
        raise ArtefactError(f"geometry: expected a JSON object, found {values!r}")
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ArtefactError(f"geometry: unknown {', '.join(unknown)}; was it made by a newer wasi-edge?")
    required = [name for name, default in fields.items() if default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise ArtefactError(f"geometry: {', '.join(missing)} missing")
    return values


def linear_tensors(
    name: str, rows: int, columns: int, rank: int | None, has_bias: bool = True
) -> dict[str, tuple[int, ...]]:
    """Tensors of one linear of shape (O, I) = (rows, columns): dense, or left (O, K) and right (K, I)."""
    bias: dict[str, tuple[int, ...]] = {f"{name}.bias": (rows,)} if has_bias else {}
    if rank is None:
        return {f"{name}.weight": (rows, columns), **bias}
    if type(rank) is not int or not 1 <= rank <= min(rows, columns):
        raise ArtefactError(f"{name}: rank should be 1 to {min(rows, columns)}, found {rank!r}")
    return {f"{name}.left": (rows, rank), f"{name}.right": (rank, columns), **bias}
