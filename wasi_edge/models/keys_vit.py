"""Hugging Face `ViTModel` and `ViTForImageClassification` checkpoints. No torch.

Every spelling of a key seen in the wild is first brought to one canonical form, that of transformers 5
in memory (`layers.3.attention.q_proj.weight`). `vit.` prefixes, `encoder.layer.3.attention.attention.query` (up to
transformers 4) and `layers.3.attention.q_proj` (5) are thus the same thing.

`ViTForImageClassification` reads the class token after the last norm, so its head is kept on 'class'
features. Without a classifier the features are ours to choose: 'class+mean'. The pooler and the mask
token, which classification never uses, are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.keys import (
    Shape,
    Source,
    Spelling,
    build_geometry,
    canonical_attention,
    canonical_mlp,
    has_classifier,
    plan_vit,
)

MODEL_TYPE = "vit"

# Used for fields that config.json leaves out: the defaults of transformers' ViTConfig.
DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
IGNORED = re.compile(r"embeddings\.mask_token|pooler\..*")
SPELLING = Spelling(
    patch="embeddings.patch_embeddings.projection",
    class_token="embeddings.cls_token",
    position="embeddings.position_embeddings",
    block="layers.{}.",
    norm1="layernorm_before",
    qkv=tuple(f"attention.{letter}_proj.{{}}" for letter in "qkv"),
    proj="attention.o_proj",
    norm2="layernorm_after",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    norm="layernorm",
    head=("classifier",),
)


def geometry_from_config(config: Mapping[str, Any], keys: Iterable[str] | None = None) -> ViTGeometry:
    """Geometry of a `ViTModel` from its config.json.

    `keys` are the checkpoint's tensor names; without them `architectures` says whether there is a
    classifier. Raises ConversionError for a variant we cannot run.
    """
    merged = {**DEFAULTS, **config}
    features = "class" if has_classifier(config, keys) else "class+mean"
    return build_geometry(merged, mlp_width=merged["intermediate_size"], features=features)


def plan_tensors(geometry: ViTGeometry, found: Mapping[str, Shape]) -> dict[str, Source]:
    """For each tensor of ours, in the artefact's order, the source keys that make it. `found`: key -> shape.

    Raises ConversionError listing the keys that are missing or unknown.
    """
    return plan_vit(geometry, SPELLING, found, IGNORED, lambda key: canonical(key, "vit."))


def canonical(key: str, prefix: str) -> str:
    """A key of ViT or DeiT in transformers 5's words."""
    return canonical_mlp(canonical_attention(key.removeprefix(prefix)))
