"""Hugging Face `SwinModel` and `SwinForImageClassification` checkpoints. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from wasi_edge.errors import ConversionError
from wasi_edge.models.geometry_swin import SwinGeometry
from wasi_edge.models.keys import Shape, Source, refuse_activation, square
from wasi_edge.models.keys_shared_swin import SwinSpelling, build_swin_geometry, plan_swin

MODEL_TYPE = "swin"

# Used for fields that config.json leaves out: the defaults of transformers' SwinConfig.
_DEFAULTS = {
    "image_size": 224,
    "patch_size": 4,
    "num_channels": 3,
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "mlp_ratio": 4.0,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
}
_HUGGING_FACE = SwinSpelling(
    patch="embeddings.patch_embeddings.projection",
    patch_norm="embeddings.norm",
    block="encoder.layers.{stage}.blocks.{block}.",
    norm1="layernorm_before",
    bias_table="attention.self.relative_position_bias_table",
    qkv=tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
    proj="attention.output.dense",
    norm2="layernorm_after",
    fc1="intermediate.dense",
    fc2="output.dense",
    merge="encoder.layers.{stage}.downsample.",
    merge_offset=-1,
    norm="layernorm",
    head="classifier",
)


def geometry_from_config(config: Mapping[str, Any], keys: Iterable[str] | None = None) -> SwinGeometry:
    """Geometry of a Hugging Face `SwinModel` from its config.json; errors as for `keys_vit`."""
    merged = {**_DEFAULTS, **config}
    refuse_activation(merged)
    if merged.get("use_absolute_embeddings"):
        raise ConversionError("Swin with absolute position embeddings is not supported")
    return build_swin_geometry(
        patch_size=square(merged, "patch_size"),
        width=merged["embed_dim"],
        depths=_numbers(merged, "depths"),
        stage_heads=_numbers(merged, "num_heads"),
        window=merged["window_size"],
        mlp_ratio=merged["mlp_ratio"],
        channels=merged["num_channels"],
        norm_eps=merged["layer_norm_eps"],
    )


def plan_tensors(geometry: SwinGeometry, found: Mapping[str, Shape]) -> dict[str, Source]:
    """For each tensor of ours, in the artefact's order, the source keys that make it; of Hugging Face's layout.

    Raises ConversionError listing the keys that are missing or unknown.
    """
    return plan_swin(geometry, _HUGGING_FACE, found, lambda key: key.removeprefix("swin."))


def _numbers(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = config[name]
    if not isinstance(value, list | tuple):
        raise ConversionError(f"config.json: {name} should be a list of whole numbers, found {value!r}")
    return tuple(value)
