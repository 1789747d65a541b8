"""torchvision's state dicts of Swin: stages and merges numbered in one list of `features`. No torch."""

from __future__ import annotations

from wasi_edge.models.keys_shared_swin import StateDict, SwinSpelling

_TORCHVISION = SwinSpelling(
    patch="features.0.0",
    patch_norm="features.0.2",
    block="features.{twice}.{block}.",
    norm1="norm1",
    bias_table="attn.relative_position_bias_table",
    qkv=("attn.qkv",),
    proj="attn.proj",
    norm2="norm2",
    fc1="mlp.0",
    fc2="mlp.3",
    merge="features.{between}.",
    merge_offset=-1,
    norm="norm",
    head="head",
)

LAYOUT = StateDict("torchvision Swin", _TORCHVISION, lambda found: str)
