"""Hugging Face `ViTModel` and `ViTForImageClassification` checkpoints, and what key maps share. No torch.

Every spelling of a key seen in the wild is first brought to one canonical form, that of transformers 5
in memory (`layers.3.attention.q_proj.weight`); one table then says which canonical keys make which
tensor of ours. `vit.` prefixes, `encoder.layer.3.attention.attention.query` (up to transformers 4) and
`layers.3.attention.q_proj` (5) are thus the same thing. Everything in the file must find its place: a
key left over or missing is an error, for a guess would be a silently wrong network.

`ViTForImageClassification` reads the class token after the last norm, so its head is kept on 'class'
features. Without a classifier the features are ours to choose: 'class+mean'. The pooler and the mask
token, which classification never uses, are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wasi_edge.errors import ArtefactError, ConversionError
from wasi_edge.models.geometry import ViTGeometry

MODEL_TYPE = "vit"

# Used for fields that config.json leaves out: the defaults of transformers' ViTConfig.
_DEFAULTS = {
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
_IGNORED = re.compile(r"embeddings\.mask_token|pooler\..*")

# Ours -> canonical, inside a block. "*" is weight or bias.
_BLOCK = {
    "norm1": "layernorm_before",
    "proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


@dataclass(frozen=True)
class Source:
    """How one tensor of ours is made: `keys` concatenated along the first axis, then reshaped.

    `keys` empty means zeros (a bias the checkpoint does not have); `shape` None means as stored.
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...] | None


def geometry_from_config(config: Mapping[str, Any], keys: Iterable[str] | None = None) -> ViTGeometry:
    """Geometry of a `ViTModel` from its config.json.

    `keys` are the checkpoint's tensor names; without them `architectures` says whether there is a
    classifier. Raises ConversionError for a variant we cannot run.
    """
    merged = {**_DEFAULTS, **config}
    classifier = has_classifier(config, keys)
    return build_geometry(
        merged,
        mlp_width=merged["intermediate_size"],
        features="class" if classifier else "class+mean",
        layer_scale=False,
    )


def plan_tensors(geometry: ViTGeometry, keys: Iterable[str]) -> dict[str, Source]:
    """For each tensor of ours, in the artefact's order, the source keys that make it.

    Raises ConversionError listing the keys that are missing or unknown.
    """
    names = list(keys)
    canonical = canonical_keys(names, "vit.", _canonical)
    return plan_from_table(geometry, canonical, _BLOCK, {}, _IGNORED)


def has_classifier(config: Mapping[str, Any], keys: Iterable[str] | None) -> bool:
    """Whether the checkpoint carries a classifier: by its keys, or else by its declared class."""
    if keys is not None:
        return "classifier.weight" in set(keys)
    return any(str(name).endswith("ForImageClassification") for name in config.get("architectures") or [])


def build_geometry(config: Mapping[str, Any], *, mlp_width: Any, features: str, layer_scale: bool) -> ViTGeometry:
    """A ViTGeometry from the fields that Hugging Face's ViT-like configurations share.

    Raises ConversionError for non-square images or patches, another activation than exact GELU, or
    sizes that are not sizes.
    """
    if config["hidden_act"] not in ("gelu", "gelu_python"):
        raise ConversionError(
            f"activation {config['hidden_act']!r} is not supported; only models with exact 'gelu' are"
        )
    patch_size = _square(config, "patch_size")
    try:
        return ViTGeometry(
            patch_size=patch_size,
            width=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            mlp_width=mlp_width,
            position_grid=_square(config, "image_size") // patch_size,
            channels=config["num_channels"],
            features=features,
            layer_scale=layer_scale,
            norm_eps=config["layer_norm_eps"],
        )
    except ArtefactError as error:
        raise ConversionError(f"config.json describes no model we can build: {error}") from error


def canonical_keys(keys: Iterable[str], prefix: str, canonical: Any) -> dict[str, str]:
    """Canonical name -> key in the file. Raises ConversionError if two keys mean the same tensor."""
    result: dict[str, str] = {}
    for key in keys:
        name = canonical(key.removeprefix(prefix))
        if name in result:
            raise ConversionError(f"the checkpoint holds the same tensor twice: {result[name]} and {key}")
        result[name] = key
    return result


def plan_from_table(
    geometry: ViTGeometry,
    canonical: Mapping[str, str],
    block: Mapping[str, str],
    scales: Mapping[str, str],
    ignored: re.Pattern[str],
) -> dict[str, Source]:
    """Match canonical keys with our tensors.

    `canonical` maps canonical names to keys in the file; `block` and `scales` map our names inside a
    block to canonical ones (with and without weight/bias); `ignored` matches what may be dropped.
    Raises ConversionError listing everything missing and everything left over.
    """
    num_classes = 1 if "classifier.weight" in canonical else None  # only names matter here
    plan: dict[str, Source] = {}
    missing: list[str] = []
    used: set[str] = set()
    for name, shape in geometry.tensor_shapes({}, num_classes).items():
        wanted = _canonical_sources(name, block, scales)
        if name.endswith(".qkv.bias") and not any(key in canonical for key in wanted):
            wanted = ()  # qkv_bias: false
        missing += [key for key in wanted if key not in canonical]
        used.update(wanted)
        found = tuple(canonical[key] for key in wanted if key in canonical)
        plan[name] = Source(found, None if name.startswith("head.") else shape)
    extra = [key for name, key in canonical.items() if name not in used and not ignored.fullmatch(name)]
    if missing or extra:
        raise ConversionError(_mismatch(missing, extra))
    return plan


def _canonical_sources(name: str, block: Mapping[str, str], scales: Mapping[str, str]) -> tuple[str, ...]:
    """Canonical keys that make our tensor `name`."""
    whole = {
        "patch_embed.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.bias": "embeddings.patch_embeddings.projection.bias",
        "class_token": "embeddings.cls_token",
        "position": "embeddings.position_embeddings",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
        "head.weight": "classifier.weight",
        "head.bias": "classifier.bias",
    }
    if name in whole:
        return (whole[name],)
    _, index, part, *kind = name.split(".")
    if part == "qkv":
        return tuple(f"layers.{index}.attention.{letter}_proj.{kind[0]}" for letter in "qkv")
    if part in scales:
        return (f"layers.{index}.{scales[part]}",)
    return (f"layers.{index}.{block[part]}.{kind[0]}",)


def canonical_attention(key: str) -> str:
    """Old spellings of layers and attention, shared by ViT and DINOv2, in transformers 5's words."""
    key = re.sub(r"^(encoder\.)?layers?\.(?=\d)", "layers.", key)
    key = re.sub(r"\.attention\.(attention\.)?(query|key|value)\.", _short_projection, key)
    return key.replace(".attention.output.dense.", ".attention.o_proj.")


def _short_projection(match: re.Match[str]) -> str:
    return f".attention.{match[2][0]}_proj."


def _canonical(key: str) -> str:
    key = canonical_attention(key)
    key = re.sub(r"^(layers\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1.", key)
    return re.sub(r"^(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2.", key)


def _square(config: Mapping[str, Any], name: str) -> int:
    value = config[name]
    sides = set(value) if isinstance(value, list) else {value}
    if len(sides) != 1 or type(side := sides.pop()) is not int or side < 1:
        raise ConversionError(f"config.json: {name} should be one whole number (a square), found {value!r}")
    return side


def _mismatch(missing: list[str], extra: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"tensors missing: {_few(missing)}")
    if extra:
        parts.append(f"tensors we do not know: {_few(extra)}")
    return f"{'; '.join(parts)}. Does config.json belong to this file, and is it a plain ViT or DINOv2 model?"


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(sorted(names)[:8]) + more
