"""Networks of well-known sizes with fixed ranks, for what does not depend on what the weights say. No torch."""

from __future__ import annotations

from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.geometry_swin import Geometry, SwinGeometry

# patch, width, depth, heads, as in timm
_VITS = {
    "vit_base_patch16_224": (16, 768, 12, 12),
    "vit_base_patch32_224": (32, 768, 12, 12),
    "vit_small_patch16_224": (16, 384, 12, 6),
    "vit_tiny_patch16_224": (16, 192, 12, 3),
}
# width, blocks and heads of the stages
_SWINS = {
    "swin_tiny_patch4_window7_224": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_small_patch4_window7_224": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
}
GEOMETRIES = (*_VITS, *_SWINS)
# K / min(O, I) that epsilon 0.8 gives on pretrained networks of this kind; at 0.6 it is 0.55 of these
RANK_SHARES = {"qkv": 0.40, "proj": 0.30, "fc1": 0.47, "fc2": 0.47, "merge": 0.47}
EPSILON_SHARES = {0.8: 1.0, 0.6: 0.55}


def synthetic_geometry(name: str, image_size: int) -> Geometry:
    """One of `GEOMETRIES` at an input size. Raises UsageError for a size that its patches do not divide."""
    if name in _SWINS:
        width, depths, heads = _SWINS[name]
        swin = SwinGeometry(4, width, depths, heads, window=7)
        swin.tokens(image_size)
        return swin
    patch, width, depth, heads_of_all = _VITS[name]
    vit = ViTGeometry(patch, width, depth, heads_of_all, 4 * width, image_size // patch, features="class")
    vit.tokens(image_size)
    return vit


def synthetic_ranks(geometry: Geometry, part: float = 1.0) -> dict[str, int | None]:
    """Rank of each linear: `part` of what epsilon 0.8 gives, at least 1 and at most min(O, I)."""
    return {
        name: max(1, min(min(shape), int(part * RANK_SHARES[name.rpartition(".")[2]] * min(shape))))
        for name, shape in geometry.linear_shapes().items()
    }
