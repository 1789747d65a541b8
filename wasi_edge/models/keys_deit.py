"""Hugging Face `DeiTModel`, `DeiTForImageClassification` and `DeiTForImageClassificationWithTeacher`. No torch.

A ViT with a distillation token behind the class token, which is to us a register that the head may read. With a
teacher's classifier beside its own, the answer is the mean of both (Touvron et al. 2021, section 4): one classifier on
the two tokens side by side. (Hugging Face stores DeiT without distillation as a plain ViT.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from wasi_edge.models import keys_vit
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.keys import (
    Shape,
    Source,
    build_geometry,
    has_classifier,
    plan_vit,
)

MODEL_TYPE = "deit"

_TWO_HEADS = ("cls_classifier", "distillation_classifier")


def geometry_from_config(config: Mapping[str, Any], keys: Iterable[str] | None = None) -> ViTGeometry:
    """Geometry of a `DeiTModel` from its config.json; arguments and errors as for `keys_vit`."""
    merged = {**keys_vit.DEFAULTS, **config}
    names = None if keys is None else set(keys)
    if names is None:
        declared = " ".join(str(name) for name in config.get("architectures") or [])
        is_taught = declared.endswith("WithTeacher")
    else:
        is_taught = f"{_TWO_HEADS[0]}.weight" in names
    features = "class+distillation" if is_taught else "class" if has_classifier(config, names) else "class+mean"
    return build_geometry(merged, mlp_width=merged["intermediate_size"], features=features, registers=1)


def plan_tensors(geometry: ViTGeometry, found: Mapping[str, Shape]) -> dict[str, Source]:
    """For each tensor of ours, in the artefact's order, the source keys that make it. Errors as for `keys_vit`."""
    spelling = replace(
        keys_vit.SPELLING,
        distillation="embeddings.distillation_token",
        head=_TWO_HEADS if geometry.features == "class+distillation" else keys_vit.SPELLING.head,
    )
    return plan_vit(geometry, spelling, found, keys_vit.IGNORED, lambda key: keys_vit.canonical(key, "deit."))
