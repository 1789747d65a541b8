"""Hugging Face `Dinov2Model`, `Dinov2ForImageClassification`, and both with register tokens. No torch.

DINOv2 is a ViT with LayerScale; its keys are those of `keys_vit` (see there for how old and new
spellings are unified) but for the norms and the MLP. Its classifier reads the class token and the mean
of the patch tokens, which is what we use for a bare backbone too. Register tokens (Darcet et al. 2024) stand behind
the class token, have no position and are read by nobody. The mask token, of no use after
pretraining, is dropped. SwiGLU MLPs (the giant model) are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from wasi_edge.errors import ConversionError
from wasi_edge.models import keys_vit
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.keys import (
    Shape,
    Source,
    build_geometry,
    canonical_attention,
    plan_vit,
)

MODEL_TYPE = "dinov2"
MODEL_TYPE_WITH_REGISTERS = "dinov2_with_registers"

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
_SWIGLU = re.compile(r"\.mlp\.(weights_in|weights_out|gate_proj|up_proj|down_proj)\.")
SPELLING = replace(
    keys_vit.SPELLING,
    norm1="norm1",
    norm2="norm2",
    scale1="layer_scale1.lambda1",
    scale2="layer_scale2.lambda1",
    registers="embeddings.register_tokens",
)


def geometry_from_config(config: Mapping[str, Any], keys: Iterable[str] | None = None) -> ViTGeometry:
    """Geometry of a `Dinov2Model` from its config.json.

    `keys`, the checkpoint's tensor names, are accepted for symmetry with `keys_vit` and looked at
    only to refuse variants. Raises ConversionError for a variant we cannot run.
    """
    merged = {**_DEFAULTS, **config}
    if merged.get("use_swiglu_ffn"):
        raise ConversionError(_no_swiglu())
    _refuse_variants(keys or ())
    width, ratio = merged["hidden_size"], merged["mlp_ratio"]
    if type(width) is not int or type(ratio) not in (int, float):
        raise ConversionError(
            f"config.json: hidden_size and mlp_ratio should be numbers, found {width!r} and {ratio!r}"
        )
    given = 4 if merged.get("model_type") == MODEL_TYPE_WITH_REGISTERS else 0
    registers = merged.get("num_register_tokens", given)
    return build_geometry(
        merged, mlp_width=int(width * ratio), features="class+mean", layer_scale=True, registers=registers
    )


def plan_tensors(geometry: ViTGeometry, found: Mapping[str, Shape]) -> dict[str, Source]:
    """For each tensor of ours, in the artefact's order, the source keys that make it. `found`: key -> shape.

    Raises ConversionError listing the keys that are missing or unknown, or naming the variant.
    """
    _refuse_variants(found)
    return plan_vit(geometry, SPELLING, found, keys_vit.IGNORED, _canonical)


def _canonical(key: str) -> str:
    return canonical_attention(re.sub(r"^dinov2(_with_registers)?\.", "", key))


def _refuse_variants(keys: Iterable[str]) -> None:
    for key in keys:
        if _SWIGLU.search(key):
            raise ConversionError(_no_swiglu())


def _no_swiglu() -> str:
    return "DINOv2 with a SwiGLU MLP (the giant model) is not supported; use small, base or large"
