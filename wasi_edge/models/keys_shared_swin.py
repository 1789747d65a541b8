"""What the key maps of Swin (version 1) share. No torch.

The layouts differ in words, in where the merging of tokens is counted (before or behind a stage), and in whether
queries, keys and values are one linear. Absolute position embeddings (`ape`) and Swin v2 are refused by their keys.
Buffers that follow from the geometry (indices, masks) are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wasi_edge.errors import ArtefactError, ConversionError
from wasi_edge.models.geometry_swin import SwinGeometry
from wasi_edge.models.keys import Shape, Source, canonical_keys, checked_plan, classes_of

_DERIVED = re.compile(r".*(relative_position_index|attn_mask|relative_coords_table)")
_SECOND = re.compile(r".*(logit_scale|cpb_mlp|continuous_position_bias_mlp).*")


@dataclass(frozen=True)
class SwinSpelling:
    """A layout's words; of a block and of a merge "{stage}" and "{block}" stand for its numbers.

    merge_offset    0 where what merges is counted with the stage it leads to, -1 with the one it leaves
    """

    patch: str
    patch_norm: str
    block: str
    norm1: str
    bias_table: str
    qkv: tuple[str, ...]
    proj: str
    norm2: str
    fc1: str
    fc2: str
    merge: str
    merge_offset: int
    norm: str
    head: str


class StateDict:
    """Swin in a layout without a configuration: what `foreign` asks of a layout's file."""

    def __init__(self, name: str, spelling: SwinSpelling, canonical: Callable[[Mapping[str, Shape]], Any]) -> None:
        self.NAME, self._spelling, self._canonical = name, spelling, canonical

    def recognises(self, found: Mapping[str, Shape]) -> bool:
        """Whether these are keys of this layout."""
        first = self._spelling.block.format(stage=0, block=0, twice=1)
        has_window = any(key.startswith(first) and "attn" in key for key in found)
        return has_window and f"{self._spelling.patch}.weight" in found

    def geometry_from_shapes(self, found: Mapping[str, Shape], heads: int | None = None) -> SwinGeometry:
        """Geometry by the shapes of the tensors. Raises ConversionError for a variant we cannot run."""
        refuse_variants(found)
        words, window = self._spelling, 0
        depths: list[int] = []
        head_counts: list[int] = []
        while True:
            depth = 0
            while (table := self._table(found, len(depths), depth)) is not None:
                if depth == 0:
                    head_counts.append(table[1])
                    window = (round(table[0] ** 0.5) + 1) // 2
                depth += 1
            if depth == 0:
                break
            depths.append(depth)
        patch = found.get(f"{words.patch}.weight", ())
        fc1 = found.get(words.block.format(stage=0, block=0, twice=1) + words.fc1 + ".weight", ())
        if len(patch) != 4 or len(fc1) != 2 or not all(fc1) or not depths:
            raise ConversionError("these tensors make no Swin transformer: stages, patches or MLPs are missing")
        return build_swin_geometry(
            patch_size=patch[2],
            width=patch[0],
            depths=tuple(depths),
            stage_heads=tuple(head_counts),
            window=window,
            mlp_ratio=fc1[0] / fc1[1],
            channels=patch[1],
        )

    def plan_tensors(self, geometry: SwinGeometry, found: Mapping[str, Shape]) -> dict[str, Source]:
        """For each tensor of ours, in the artefact's order, the source keys that make it.

        Raises ConversionError listing the keys that are missing or unknown.
        """
        return plan_swin(geometry, self._spelling, found, self._canonical(found))

    def _table(self, found: Mapping[str, Shape], stage: int, block: int) -> Shape | None:
        prefix = self._spelling.block.format(stage=stage, block=block, twice=2 * stage + 1)
        shape = found.get(prefix + self._spelling.bias_table)
        return shape if shape is not None and len(shape) == 2 else None


def plan_swin(
    geometry: SwinGeometry, words: SwinSpelling, keys: Mapping[str, Shape], canonical: Callable[[str], str]
) -> dict[str, Source]:
    """For each tensor of ours what makes it. Raises ConversionError listing what is missing or unknown."""
    refuse_variants(keys)
    names = canonical_keys(keys, canonical)
    found = {name: keys[key] for name, key in names.items()}
    shapes = geometry.tensor_shapes({}, classes_of(found, (words.head,)))
    plan = {name: _source(name, shape, geometry, words, found) for name, shape in shapes.items()}
    return checked_plan(plan, names, _DERIVED, "a Swin (version 1)")


def refuse_variants(keys: Iterable[str]) -> None:
    """Raises ConversionError for Swin v2 and absolute position embeddings."""
    for key in keys:
        if _SECOND.fullmatch(key):
            raise ConversionError("Swin version 2 is not supported; use a Swin of version 1")
        if key == "absolute_pos_embed" or key.endswith("embeddings.position_embeddings"):
            raise ConversionError("Swin with absolute position embeddings is not supported")


def _source(name: str, shape: Shape, geometry: SwinGeometry, words: SwinSpelling, found: Mapping[str, Shape]) -> Source:
    if name == "patch_embed.weight":
        side = geometry.patch_size
        return Source((f"{words.patch}.weight",), ((geometry.width, geometry.channels, side, side),))
    for ours, theirs in (
        ("patch_embed.", words.patch),
        ("patch_norm.", words.patch_norm),
        ("norm.", words.norm),
        ("head.", words.head),
    ):
        if name.startswith(ours):
            return Source((f"{theirs}.{name.removeprefix(ours)}",), (shape,))
    _, index, part, kind = name.split(".")
    stage, block = geometry.stage_of(int(index))
    if part in ("merge", "merge_norm"):
        counted = stage + words.merge_offset
        prefix = words.merge.format(stage=counted, between=2 * stage)
        return Source((f"{prefix}{'reduction' if part == 'merge' else 'norm'}.{kind}",), (shape,))
    prefix = words.block.format(stage=stage, block=block, twice=2 * stage + 1)
    if part == "attention":
        return Source((prefix + words.bias_table,), (shape,))
    if part == "qkv":
        keys = tuple(f"{prefix}{word}.{kind}" for word in words.qkv)
        if kind == "bias" and not any(key in found for key in keys):
            keys = ()  # made without one
        return Source(keys, tuple((shape[0] // len(words.qkv), *shape[1:]) for _ in keys))
    return Source((f"{prefix}{getattr(words, part)}.{kind}",), (shape,))


def build_swin_geometry(**sizes: Any) -> SwinGeometry:
    try:
        return SwinGeometry(**sizes)
    except ArtefactError as error:
        raise ConversionError(f"these sizes describe no model we can build: {error}") from error
