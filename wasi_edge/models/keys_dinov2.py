"""Hugging Face `Dinov2Model` and `Dinov2ForImageClassification` checkpoints. No torch.

DINOv2 is a ViT with LayerScale; its keys are those of `keys_vit` (see there for how old and new
spellings are unified) but for the norms and the MLP. Its classifier reads the class token and the mean
of the patch tokens, which is what we use for a bare backbone too. The mask token, of no use after
pretraining, is dropped. SwiGLU MLPs (the giant model) and register tokens are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from wasi_edge.errors import ConversionError
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.keys_vit import (
    Source,
    build_geometry,
    canonical_attention,
    canonical_keys,
    plan_from_table,
)

MODEL_TYPE = "dinov2"

# Used for fields that config.json leaves out: the defaults of transformers' Dinov2Config.
_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}
_IGNORED = re.compile(r"embeddings\.mask_token|pooler\..*")
_SWIGLU = re.compile(r"\.mlp\.(weights_in|weights_out|gate_proj|up_proj|down_proj)\.")
_BLOCK = {
    "norm1": "norm1",
    "proj": "attention.o_proj",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_SCALES = {"scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1"}


def geometry_from_config(config: Mapping[str, Any], keys: Iterable[str] | None = None) -> ViTGeometry:
    """Geometry of a `Dinov2Model` from its config.json.

    `keys`, the checkpoint's tensor names, are accepted for symmetry with `keys_vit` and looked at
    only to refuse variants. Raises ConversionError for a variant we cannot run.
    """
    merged = {**_DEFAULTS, **config}
    if merged.get("use_swiglu_ffn"):
        raise ConversionError(_no_swiglu())
    if merged.get("num_register_tokens"):
        raise ConversionError(_no_registers())
    _refuse_variants(keys or ())
    width, ratio = merged["hidden_size"], merged["mlp_ratio"]
    if type(width) is not int or type(ratio) not in (int, float):
        raise ConversionError(
            f"config.json: hidden_size and mlp_ratio should be numbers, found {width!r} and {ratio!r}"
        )
    return build_geometry(merged, mlp_width=int(width * ratio), features="class+mean", layer_scale=True)


def plan_tensors(geometry: ViTGeometry, keys: Iterable[str]) -> dict[str, Source]:
    """For each tensor of ours, in the artefact's order, the source keys that make it.

    Raises ConversionError listing the keys that are missing or unknown, or naming the variant.
    """
    names = list(keys)
    _refuse_variants(names)
    canonical = canonical_keys(names, "dinov2.", canonical_attention)
    return plan_from_table(geometry, canonical, _BLOCK, _SCALES, _IGNORED)


def _refuse_variants(keys: Iterable[str]) -> None:
    for key in keys:
        if key.endswith("embeddings.register_tokens"):
            raise ConversionError(_no_registers())
        if _SWIGLU.search(key):
            raise ConversionError(_no_swiglu())


def _no_registers() -> str:
    return "DINOv2 with register tokens is not supported; use the variant without registers"


def _no_swiglu() -> str:
    return "DINOv2 with a SwiGLU MLP (the giant model) is not supported; use small, base or large"
