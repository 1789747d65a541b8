"""timm's state dicts of Swin, those of its older versions and of the authors' code too. No torch.

Older files count a merge with the stage it leaves, and call the classifier `head` instead of `head.fc`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from wasi_edge.models.keys import Shape
from wasi_edge.models.keys_shared_swin import StateDict, SwinSpelling

_TIMM = SwinSpelling(
    patch="patch_embed.proj",
    patch_norm="patch_embed.norm",
    block="layers.{stage}.blocks.{block}.",
    norm1="norm1",
    bias_table="attn.relative_position_bias_table",
    qkv=("attn.qkv",),
    proj="attn.proj",
    norm2="norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    merge="layers.{stage}.downsample.",
    merge_offset=0,
    norm="norm",
    head="head",
)


def _timm_words(found: Mapping[str, Shape]) -> Callable[[str], str]:
    is_old = "layers.0.downsample.reduction.weight" in found

    def canonical(key: str) -> str:
        if is_old and (match := re.match(r"layers\.(\d+)\.downsample\.", key)):
            key = f"layers.{int(match[1]) + 1}.downsample.{key[match.end() :]}"
        return key.replace("head.fc.", "head.")

    return canonical


LAYOUT = StateDict("timm Swin", _TIMM, _timm_words)
