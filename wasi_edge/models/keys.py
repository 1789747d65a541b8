"""What the key maps of all checkpoint layouts share. No torch.

A layout's file (`keys_*.py`) says how it spells the tensors of our artefact and where its sizes can be read. Everything
in a checkpoint must find its place: a key left over or missing is an error, for a guess would be a silently wrong
network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wasi_edge.errors import ArtefactError, ConversionError
from wasi_edge.models.geometry import ViTGeometry

Array = np.ndarray[Any, np.dtype[np.float32]]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """How one tensor of ours is made.

    keys     of the checkpoint; none means zeros (a bias that it does not have)
    stored   the shape that each of them should have there
    make     arrays of `keys` -> ours; None: one after another along the first axis, then reshaped
    """

    keys: tuple[str, ...]
    stored: tuple[Shape, ...]
    make: Callable[[Sequence[Array]], Array] | None = None


@dataclass(frozen=True)
class Spelling:
    """A layout's words for the tensors of a ViT; ".weight" and ".bias" follow where nothing else is said.

    qkv          of one stacked linear, or of queries, keys and values; "{}" stands for weight or bias
    block        "{}" stands for the number of the block; the words after it follow it
    head         one classifier, or two whose answers are averaged, on the class and on the distillation token
    """

    patch: str
    class_token: str
    position: str
    block: str
    norm1: str
    qkv: tuple[str, ...]
    proj: str
    norm2: str
    fc1: str
    fc2: str
    norm: str
    head: tuple[str, ...]
    registers: str = ""
    distillation: str = ""
    scale1: str = ""
    scale2: str = ""


def plan_vit(
    geometry: ViTGeometry,
    spelling: Spelling,
    keys: Mapping[str, Shape],
    ignored: re.Pattern[str],
    canonical: Callable[[str], str] = str,
) -> dict[str, Source]:
    """For each tensor of ours, in the artefact's order, what makes it. `keys`: the checkpoint's, with their shapes,
    which `canonical` brings into the words of `spelling`; `ignored` matches those of them that may be dropped.

    Raises ConversionError listing everything missing and everything left over.
    """
    names = canonical_keys(keys, canonical)
    found = {name: keys[key] for name, key in names.items()}
    num_classes = classes_of(found, spelling.head)
    plan = {
        name: _vit_source(name, shape, geometry, spelling, found)
        for name, shape in geometry.tensor_shapes({}, num_classes).items()
    }
    return checked_plan(plan, names, ignored, "a plain ViT, DeiT or DINOv2")


def classes_of(found: Mapping[str, Shape], head: Sequence[str]) -> int | None:
    """Classes of the checkpoint's classifier, None without one."""
    if f"{head[0]}.weight" not in found:
        return None
    shape = found.get(f"{head[0]}.bias", ())
    return shape[0] if len(shape) == 1 and shape[0] else 1


def checked_plan(
    plan: Mapping[str, Source], names: Mapping[str, str], ignored: re.Pattern[str], what: str
) -> dict[str, Source]:
    """`plan` over the canonical `names`, mapped to keys of the checkpoint: over these keys, if it reads them all."""
    wanted = {key for source in plan.values() for key in source.keys}
    missing = sorted(wanted - set(names))
    extra = [key for name, key in names.items() if name not in wanted and not ignored.fullmatch(name)]
    if missing or extra:
        parts = [f"tensors missing: {few(missing)}"] if missing else []
        parts += [f"tensors we do not know: {few(extra)}"] if extra else []
        raise ConversionError(f"{'; '.join(parts)}. Is this a whole checkpoint of {what} model?")
    return {
        name: Source(tuple(names[key] for key in source.keys), source.stored, source.make)
        for name, source in plan.items()
    }


def canonical_keys(keys: Iterable[str], canonical: Callable[[str], str]) -> dict[str, str]:
    """Canonical name -> key in the file. Raises ConversionError if two keys mean the same tensor."""
    result: dict[str, str] = {}
    for key in keys:
        name = canonical(key)
        if name in result:
            raise ConversionError(f"the checkpoint holds the same tensor twice: {result[name]} and {key}")
        result[name] = key
    return result


def _vit_source(name: str, shape: Shape, geometry: ViTGeometry, words: Spelling, found: Mapping[str, Shape]) -> Source:
    width, patch = geometry.width, geometry.patch_size
    token = (1, 1, width)
    table = found.get(words.position, ())
    # rows of the position table before those of the patches
    leading = table[1] - geometry.position_grid**2 if len(table) == 3 else int(geometry.class_token)
    leading = min(max(leading, 0), 2)
    table = (1, leading + geometry.position_grid**2, width)
    if name == "patch_embed.weight":
        return Source((f"{words.patch}.weight",), ((width, geometry.channels, patch, patch),))
    if name == "class_token":
        return Source((words.class_token,), (token,))
    if name == "position":
        return Source((words.position,), (table,), _position(leading, geometry.class_token))
    if name == "registers":
        if words.distillation in found:
            return Source((words.distillation, words.position), (token, table), _distillation)
        return Source((words.registers,), ((1, *shape),))
    if name.startswith("head."):
        return _head(name, shape, words.head)
    if name.startswith("norm."):
        return _same(f"{words.norm}.{name[5:]}", shape)
    if not name.startswith("blocks."):
        return _same(f"{words.patch}.{name.rpartition('.')[2]}", shape)
    _, index, part, *kind = name.split(".")
    prefix = words.block.format(index)
    if part == "qkv":
        keys = tuple(prefix + key.format(kind[0]) for key in words.qkv)
        if kind[0] == "bias" and not any(key in found for key in keys):
            keys = ()  # made without one
        return Source(keys, tuple((shape[0] // len(words.qkv), *shape[1:]) for _ in keys))
    return _same(".".join((prefix + getattr(words, part), *kind)), shape)


def _same(key: str, shape: Shape) -> Source:
    return Source((key,), (shape,))


def _position(leading: int, class_token: bool) -> Callable[[Sequence[Array]], Array]:
    """(1, leading + g * g, D) -> (g * g [+1], D); without a row for the class token, whose position is then in the
    token itself, zeros stand for it."""

    def make(parts: Sequence[Array]) -> Array:
        (table,) = parts
        rows = table[0]
        if not class_token:
            return rows[leading:]
        first = rows[:1] if leading else np.zeros_like(rows[:1])
        return np.concatenate((first, rows[leading:]))

    return make


def _distillation(parts: Sequence[Array]) -> Array:
    """The distillation token with its row of the position table: a register, (1, D)."""
    token, table = parts
    return token[0] + table[0, 1:2]


def _head(name: str, shape: Shape, heads: Sequence[str]) -> Source:
    keys = tuple(f"{head}.{name[5:]}" for head in heads)
    if len(heads) == 1:
        return _same(keys[0], shape)
    if name == "head.bias":
        return Source(keys, (shape, shape), lambda parts: (parts[0] + parts[1]) / np.float32(2))
    half = (shape[0], shape[1] // 2)
    # the mean of two classifiers is one on both tokens side by side
    return Source(keys, (half, half), lambda parts: np.concatenate(parts, 1) / np.float32(2))


def build_geometry(config: Mapping[str, Any], **more: Any) -> ViTGeometry:
    """A ViTGeometry from the fields that Hugging Face's ViT-like configurations share, and `more`.

    Raises ConversionError for non-square images or patches, another activation than exact GELU, or
    sizes that are not sizes.
    """
    refuse_activation(config)
    patch_size = square(config, "patch_size")
    try:
        return ViTGeometry(
            patch_size=patch_size,
            width=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            position_grid=square(config, "image_size") // patch_size,
            channels=config["num_channels"],
            norm_eps=config["layer_norm_eps"],
            **more,
        )
    except ArtefactError as error:
        raise ConversionError(f"config.json describes no model we can build: {error}") from error


def refuse_activation(config: Mapping[str, Any]) -> None:
    """Raises ConversionError for another activation than exact GELU."""
    if config["hidden_act"] not in ("gelu", "gelu_python"):
        raise ConversionError(
            f"activation {config['hidden_act']!r} is not supported; only models with exact 'gelu' are"
        )


def square(config: Mapping[str, Any], name: str) -> int:
    """One side out of 224 or [224, 224]. Raises ConversionError for anything else."""
    value = config[name]
    sides = value if isinstance(value, list) else [value]
    side = sides[0] if sides else None
    if type(side) is not int or side < 1 or any(other != side for other in sides):
        raise ConversionError(f"config.json: {name} should be one whole number (a square), found {value!r}")
    return side


def has_classifier(config: Mapping[str, Any], keys: Iterable[str] | None, name: str = "classifier.weight") -> bool:
    """Whether the checkpoint carries a classifier: by its keys, or else by its declared class."""
    if keys is not None:
        return name in set(keys)
    return any("ForImageClassification" in str(name) for name in config.get("architectures") or [])


def canonical_attention(key: str) -> str:
    """Old spellings of Hugging Face's layers and attention in transformers 5's words."""
    key = re.sub(r"^(encoder\.)?layers?\.(?=\d)", "layers.", key)
    key = re.sub(r"\.attention\.(attention\.)?(query|key|value)\.", lambda m: f".attention.{m[2][0]}_proj.", key)
    return key.replace(".attention.output.dense.", ".attention.o_proj.")


def canonical_mlp(key: str) -> str:
    """The same for the MLP of ViT and DeiT."""
    key = re.sub(r"^(layers\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1.", key)
    return re.sub(r"^(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2.", key)


def depth_of(found: Iterable[str], pattern: str) -> int:
    """Blocks, by the numbers that `pattern` finds. Raises ConversionError where they have gaps."""
    numbers = {int(match[1]) for key in found if (match := re.match(pattern, key))}
    if numbers != set(range(len(numbers))):
        raise ConversionError(f"the numbers of the blocks have gaps: {len(numbers)} blocks, the last is {max(numbers)}")
    return len(numbers)


def few(names: Iterable[str]) -> str:
    """The first of them, for an error message."""
    names = sorted(names)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
