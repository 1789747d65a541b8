"""torchvision's state dicts of ViT, with the MLP's older and newer names. No torch.

Sizes are read from the shapes; heads, epsilon and activation as in `keys_timm_vit`. The class token is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.keys import Shape, Source, Spelling, depth_of, plan_vit
from wasi_edge.models.keys_timm_vit import patch_rows, vit_geometry

NAME = "torchvision ViT"

_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)\."
_NOTHING = re.compile(r"(?!)")
_SPELLING = Spelling(
    patch="conv_proj",
    class_token="class_token",
    position="encoder.pos_embedding",
    block="encoder.layers.encoder_layer_{}.",
    norm1="ln_1",
    qkv=("self_attention.in_proj_{}",),
    proj="self_attention.out_proj",
    norm2="ln_2",
    fc1="mlp.0",
    fc2="mlp.3",
    norm="encoder.ln",
    head=("heads.head",),
)


def recognises(found: Mapping[str, Shape]) -> bool:
    """Whether these are keys of this layout."""
    return "conv_proj.weight" in found


def geometry_from_shapes(found: Mapping[str, Shape], heads: int | None = None) -> ViTGeometry:
    """Geometry by the shapes of the tensors. Raises ConversionError where they make none."""
    names = _spelling(found)
    return vit_geometry(
        patch=found["conv_proj.weight"],
        rows=patch_rows(found.get(names.position, ())),
        mlp=found.get(f"{names.block.format(0)}{names.fc1}.weight", ()),
        depth=depth_of(found, _BLOCK),
        heads=heads,
        features="class" if f"{names.head[0]}.weight" in found else "class+mean",
    )


def plan_tensors(geometry: ViTGeometry, found: Mapping[str, Shape]) -> dict[str, Source]:
    """For each tensor of ours, in the artefact's order, the source keys that make it.

    Raises ConversionError listing the keys that are missing or unknown.
    """
    return plan_vit(geometry, _spelling(found), found, _NOTHING)


def _spelling(found: Mapping[str, Shape]) -> Spelling:
    if f"{_SPELLING.block.format(0)}mlp.linear_1.weight" in found:  # up to torchvision 0.12
        return replace(_SPELLING, fc1="mlp.linear_1", fc2="mlp.linear_2")
    return _SPELLING
