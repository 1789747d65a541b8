"""The geometry's counts and names, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from wasi_edge.errors import ArtefactError, UsageError
from wasi_edge.models.geometry import ViTGeometry

TINY = ViTGeometry(patch_size=4, width=12, depth=2, heads=3, mlp_width=20, position_grid=5)
VIT_B = ViTGeometry(16, 768, 12, 12, 3072, 14, features="class")


def test_counts():
    assert TINY.tokens(16) == 17
    assert dataclasses.replace(TINY, class_token=False, features="mean").tokens(16) == 16
    assert TINY.head_dim == 4
    assert [dataclasses.replace(TINY, features=f).feature_width for f in ("class", "mean", "class+mean")] == [
        12,
        12,
        24,
    ]
    total = sum(_size(shape) for shape in VIT_B.tensor_shapes({}, 1000).values())
    assert total == 86_567_656  # ViT-B/16 with its ImageNet head, as published


def _size(shape: tuple[int, ...]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


@pytest.mark.parametrize(
    ("size", "hint"), [(223, "208 or 224"), (17, "16 or 32"), (3, "try 16"), (0, "try 16"), (-5, "try 16")]
)
def test_an_image_size_off_the_grid_names_the_nearest(size, hint):
    with pytest.raises(UsageError, match=hint):
        VIT_B.tokens(size)


def test_linears_come_in_the_order_of_the_forward_pass():
    assert list(TINY.linear_shapes().items())[3:6] == [
        ("blocks.0.fc2", (12, 20)),
        ("blocks.1.qkv", (36, 12)),
        ("blocks.1.proj", (12, 12)),
    ]
    assert TINY.linear_shapes()["blocks.0.fc1"] == (20, 12)


def test_every_tensor_has_its_name_and_shape():
    geometry = dataclasses.replace(TINY, depth=1, layer_scale=True)
    assert geometry.tensor_shapes({"blocks.0.qkv": 5, "blocks.0.fc1": None}, 3) == {
        "patch_embed.weight": (12, 48),
        "patch_embed.bias": (12,),
        "class_token": (12,),
        "position": (26, 12),
        "blocks.0.norm1.weight": (12,),
        "blocks.0.norm1.bias": (12,),
        "blocks.0.qkv.left": (36, 5),
        "blocks.0.qkv.right": (5, 12),
        "blocks.0.qkv.bias": (36,),
        "blocks.0.proj.weight": (12, 12),
        "blocks.0.proj.bias": (12,),
        "blocks.0.scale1": (12,),
        "blocks.0.norm2.weight": (12,),
        "blocks.0.norm2.bias": (12,),
        "blocks.0.fc1.weight": (20, 12),
        "blocks.0.fc1.bias": (20,),
        "blocks.0.fc2.weight": (12, 20),
        "blocks.0.fc2.bias": (12,),
        "blocks.0.scale2": (12,),
        "norm.weight": (12,),
        "norm.bias": (12,),
        "head.weight": (3, 24),
        "head.bias": (3,),
    }
    without = dataclasses.replace(TINY, class_token=False, features="mean").tensor_shapes({}, None)
    assert "class_token" not in without and without["position"] == (25, 12) and "head.weight" not in without
    assert not any("scale" in name for name in without)


@pytest.mark.parametrize("ranks", [{"blocks.2.qkv": 3}, {"blocks.0.qkv": 13}, {"blocks.0.qkv": 0}])
def test_impossible_linears_are_refused(ranks):
    with pytest.raises(ArtefactError):
        TINY.tensor_shapes(ranks, None)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 0},
        {"depth": True},
        {"heads": 5},
        {"patch_size": 2.0},
        {"features": "cls"},
        {"class_token": False},
        {"class_token": 1},
        {"norm_eps": 0.0},
        {"norm_eps": float("nan")},
        {"norm_eps": "1e-6"},
    ],
)
def test_contradictions_are_refused(change):
    with pytest.raises(ArtefactError, match="geometry"):
        dataclasses.replace(TINY, **change)


def test_json_round_trip_and_strictness():
    values = json.loads(json.dumps(TINY.to_dict()))
    assert ViTGeometry.from_dict(values) == TINY
    with pytest.raises(ArtefactError, match="unknown windows"):
        ViTGeometry.from_dict(values | {"windows": 4})
    del values["width"]
    with pytest.raises(ArtefactError, match="width missing"):
        ViTGeometry.from_dict(values)
    with pytest.raises(ArtefactError, match="JSON object"):
        ViTGeometry.from_dict([])  # type: ignore[arg-type]


def test_planning_modules_import_no_torch():
    code = (
        "import sys, wasi_edge.artefact, wasi_edge.models.keys_dinov2, wasi_edge.conversion.sources\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
