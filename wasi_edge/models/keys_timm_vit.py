"""timm's state dicts of ViT, DeiT (distilled too) and DINOv2 (with registers too). No torch.

A state dict carries no configuration: sizes are read from the shapes. What shapes do not say: heads, known for the
widths of ViT-Ti, S, B, L and H and refused for others, the epsilon of the norms (1e-6), and that the activation is GELU
by erf. Most variants for which that is not so carry keys that are refused here (SwiGLU, normalised queries, a norm
before the blocks, attention pooling); those that do not (SigLIP, giant) are refused by name, where a folder or a file
states it.

`norm` after the blocks means that the class token is read, or tokens whose mean follows; `fc_norm` that the mean of the
patches is normed. Where a network has no class row in its position table (DINOv2 with registers), the class token
holds its position itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from wasi_edge.errors import ArtefactError, ConversionError
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.keys import Shape, Source, Spelling, depth_of, plan_vit

NAME = "timm ViT"

_IGNORED = re.compile(r"mask_token")
_HEADS = {64: 1, 192: 3, 256: 4, 320: 5, 384: 6, 512: 8, 640: 10, 768: 12, 1024: 16, 1280: 16}
_BLOCK = r"blocks\.(\d+)\."
_REFUSED = {
    r".*\.mlp\.w12\..*|.*\.mlp\.fc1_g\..*": "a SwiGLU MLP",
    r".*\.attn\.[qk]_norm\..*": "normalised queries and keys",
    r"norm_pre\..*": "a norm before the blocks (CLIP)",
    r"attn_pool\..*": "attention pooling",
    r".*\.rel_pos.*|.*relative_position_bias_table": "relative positions (BEiT)",
}
_SPELLING = Spelling(
    patch="patch_embed.proj",
    class_token="cls_token",
    position="pos_embed",
    registers="reg_token",
    distillation="dist_token",
    block="blocks.{}.",
    norm1="norm1",
    qkv=("attn.qkv.{}",),
    proj="attn.proj",
    norm2="norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    scale1="ls1.gamma",
    scale2="ls2.gamma",
    norm="norm",
    head=("head",),
)


def recognises(found: Mapping[str, Shape]) -> bool:
    """Whether these are keys of this layout."""
    return "patch_embed.proj.weight" in found and any(re.match(_BLOCK, key) for key in found)


def geometry_from_shapes(found: Mapping[str, Shape], heads: int | None = None) -> ViTGeometry:
    """Geometry by the shapes of the tensors. Raises ConversionError for a variant we cannot run."""
    for pattern, what in _REFUSED.items():
        if any(re.fullmatch(pattern, key) for key in found):
            raise ConversionError(f"a network with {what} is not supported; plain ViT, DeiT and DINOv2 are")
    pooled = "fc_norm.weight" in found
    if "head_dist.weight" in found:
        features = "class+distillation"
    elif pooled or "cls_token" not in found:
        features = "mean"
    else:
        features = "class" if "head.weight" in found else "class+mean"
    registers = (found["reg_token"][1:2] or (0,))[0] if "reg_token" in found else int("dist_token" in found)
    return vit_geometry(
        patch=found["patch_embed.proj.weight"],
        rows=patch_rows(found.get("pos_embed", ())),
        mlp=found.get("blocks.0.mlp.fc1.weight", ()),
        depth=depth_of(found, _BLOCK),
        heads=heads,
        features=features,
        class_token="cls_token" in found,
        layer_scale="blocks.0.ls1.gamma" in found,
        registers=registers,
        pool_first=pooled,
    )


def plan_tensors(geometry: ViTGeometry, found: Mapping[str, Shape]) -> dict[str, Source]:
    """For each tensor of ours, in the artefact's order, the source keys that make it.

    Raises ConversionError listing the keys that are missing or unknown.
    """
    words = dict(vars(_SPELLING))
    if geometry.pool_first:
        words["norm"] = "fc_norm"
    if geometry.features == "class+distillation":
        words["head"] = ("head", "head_dist")
    return plan_vit(geometry, Spelling(**words), found, _IGNORED)


def patch_rows(table: Shape) -> int:
    """Of a position table (1, rows, D) the rows of patches: what makes a square after none, one or two rows for the
    class and the distillation token. 0 where there is no such table."""
    if len(table) != 3:
        return 0
    for leading in (0, 1, 2):
        rows = table[1] - leading
        if rows > 0 and math.isqrt(rows) ** 2 == rows:
            return rows
    return table[1]


def vit_geometry(*, patch: Shape, rows: int, mlp: Shape, depth: int, heads: int | None, **more: object) -> ViTGeometry:
    """From the shapes of the patch embedding and of an fc1, and the rows of the position table that are patches'."""
    if len(patch) != 4 or patch[2] != patch[3] or len(mlp) != 2:
        raise ConversionError(f"the patch embedding and fc1 of a ViT are not {patch} and {mlp}")
    width, channels, side, _ = patch
    grid = round(rows**0.5) if rows > 0 else 0
    if not grid or grid * grid != rows:
        raise ConversionError(f"{max(rows, 0)} positions of patches make no square")
    if heads is None:
        heads = _HEADS.get(width)
        if heads is None:
            raise ConversionError(
                f"a width of {width} does not tell the number of heads; save the model in Hugging Face's layout, "
                "whose config.json does"
            )
    try:
        return ViTGeometry(
            patch_size=side,
            width=width,
            depth=depth,
            heads=heads,
            mlp_width=mlp[0],
            position_grid=grid,
            channels=channels,
            **more,  # type: ignore[arg-type]
        )
    except ArtefactError as error:
        raise ConversionError(f"the tensors describe no model we can build: {error}") from error
