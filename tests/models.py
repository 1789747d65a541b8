"""Small random networks for tests: factored tensors by artefact name, every parameter perturbed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wasi_edge.layers.linear import PLAIN_KINDS, LinearKinds
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.geometry_swin import SwinGeometry
from wasi_edge.models.network import VisionTransformer, build_network

TINY = ViTGeometry(
    patch_size=4, width=24, depth=2, heads=3, mlp_width=40, position_grid=4, layer_scale=True, features="class+mean"
)


# of TINY, some of them stored dense: one of each kind, those with LayerScale too
MIXED: dict[str, int | None] = {
    name: None if name in ("blocks.0.fc1", "blocks.0.proj", "blocks.1.qkv", "blocks.1.fc2") else 6
    for name in TINY.linear_shapes()
}


def random_tensors(
    geometry: ViTGeometry | SwinGeometry,
    rank: int | Mapping[str, int | None] | None = 6,
    num_classes: int | None = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[dict[str, int | None], dict[str, Tensor]]:
    """`(ranks, tensors)` of a random network; `rank` of every linear or of each by name, None makes it dense."""
    generator = torch.Generator().manual_seed(seed)
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(geometry.linear_shapes(), rank)
    tensors = {}
    for name, shape in geometry.tensor_shapes(ranks, num_classes).items():
        value = torch.randn(shape, generator=generator, dtype=dtype)
        if name.endswith((".left", ".right")) or (name.endswith("weight") and len(shape) == 2):
            value = value / shape[-1] ** 0.5
        elif name.endswith("weight") or "scale" in name:
            value = 1 + 0.1 * value
        else:
            value = 0.1 * value
        tensors[name] = value
    return ranks, tensors


def multiplied_out(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name with L R in place of L and R, whose singular vectors may have either sign."""
    found = dict(tensors)
    for left in [name for name in found if name.endswith(".left")]:
        linear = left.removesuffix("left")
        found[linear + "product"] = found.pop(left) @ found.pop(linear + "right")
    return found


def random_vit(
    geometry: ViTGeometry = TINY,
    rank: int | Mapping[str, int | None] | None = 6,
    image_size: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    kinds: LinearKinds = PLAIN_KINDS,
) -> VisionTransformer:
    """A random network with a classifier of three classes."""
    ranks, tensors = random_tensors(geometry, rank, seed=seed, dtype=dtype)
    return build_network(geometry, ranks, lambda name: tensors[name].clone(), image_size, head=True, kinds=kinds)


def dense_reader(tensors: dict[str, Tensor]):
    """`read` for `build_vanilla`: factored linears multiplied out."""

    def read(name: str) -> Tensor:
        if name in tensors:
            return tensors[name]
        stem = name.removesuffix(".weight")
        return tensors[f"{stem}.left"] @ tensors[f"{stem}.right"]

    return read
