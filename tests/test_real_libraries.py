"""Our networks against those of timm, transformers and torchvision: the same random checkpoint, the same logits.

Every parameter is random, norms, biases and LayerScale too: none may be ignored or put elsewhere.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from real_libraries import perturbed, timm, torchvision_models, transformers

from wasi_edge.conversion.sources import DenseSource, open_source
from wasi_edge.errors import ConversionError
from wasi_edge.layers.saving import Pass
from wasi_edge.models.network import build_network
from wasi_edge.models.vanilla import build_vanilla
from wasi_edge.preprocess import center_view, normalise, shrink
from wasi_edge.preprocessing import Preprocessing

CLASSES = 7
TIMM = [
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_base_patch32_224",
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
]
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 56,
    "patch_size": 14,
    "num_labels": CLASSES,
}
HUGGING_FACE = {
    "ViT": {"intermediate_size": 80},
    "DeiT": {"intermediate_size": 80},
    "DeiT WithTeacher": {"intermediate_size": 80},
    "Dinov2": {"mlp_ratio": 2},
    "Dinov2WithRegisters": {"mlp_ratio": 2, "num_register_tokens": 3},
    "Swin": {"embed_dim": 12, "depths": [2, 2, 3], "num_heads": [2, 3, 4], "patch_size": 2, "window_size": 7},
}


def read_as(source: DenseSource, dtype: torch.dtype) -> Any:
    return lambda name: torch.from_numpy(source.read(name)).to(dtype)


def explicit_logits(source: DenseSource, pixels: torch.Tensor) -> torch.Tensor:
    """Of the engine, with dense linears."""
    geometry = source.geometry
    ranks = dict.fromkeys(geometry.linear_shapes())
    model = build_network(geometry, ranks, read_as(source, pixels.dtype), pixels.shape[-1], head=True)
    return model.logits(pixels, Pass())


def autograd_logits(source: DenseSource, pixels: torch.Tensor) -> torch.Tensor:
    """Of the plain `nn.Module`."""
    read = read_as(source, pixels.dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(pixels.dtype)
    try:
        model = build_vanilla(source.geometry, read, pixels.shape[-1], source.num_classes or 0)
    finally:
        torch.set_default_dtype(default)
    model.head.weight.copy_(read("head.weight"))
    model.head.bias.copy_(read("head.bias"))
    return model(pixels)


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def check(path: Path, model: Any, logits: Any, size: int) -> None:
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), open_source(path) as source:
        assert source.num_classes == CLASSES
        expected = logits(model, pixels)
        assert far(explicit_logits(source, pixels), expected) < 1e-5
        assert far(autograd_logits(source, pixels), expected) < 1e-5
        exact = logits(model.double(), pixels.double())
        assert far(explicit_logits(source, pixels.double()), exact) < 1e-10
        assert far(autograd_logits(source, pixels.double()), exact) < 1e-10


@pytest.mark.parametrize("name", TIMM)
def test_timms_logits(tmp_path, name):
    size = 84 if "dinov2" in name else 224
    more = {"img_size": size} if "dinov2" in name else {}
    model = perturbed(timm().create_model(name, num_classes=CLASSES, **more))
    path = tmp_path / f"{name}.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    check(path, model, lambda model, pixels: model(pixels), size)


def test_a_network_that_pools_before_its_norm(tmp_path):
    model = perturbed(timm().create_model("vit_tiny_patch16_224", num_classes=CLASSES, global_pool="avg"))
    assert "fc_norm.weight" in model.state_dict()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "pooled.safetensors")
    check(tmp_path / "pooled.safetensors", model, lambda model, pixels: model(pixels), 224)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_faces_logits(tmp_path, name):
    library = transformers()
    family, _, ending = name.partition(" ")
    sizes = SMALL | HUGGING_FACE[name]
    if family == "Swin":
        sizes = {key: value for key, value in sizes.items() if not key.startswith(("hidden", "num_hidden", "num_att"))}
    config = getattr(library, f"{family}Config")(**sizes)
    model = perturbed(getattr(library, f"{family}ForImageClassification{ending}")(config))
    model.save_pretrained(tmp_path / "model")
    check(tmp_path / "model", model, lambda model, pixels: model(pixels).logits, 56)


@pytest.mark.parametrize("name", ["vit_b_32", "swin_t"])
def test_torchvisions_logits(tmp_path, name):
    model = perturbed(getattr(torchvision_models(), name)(num_classes=CLASSES))
    safetensors.torch.save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    check(tmp_path / f"{name}.safetensors", model, lambda model, pixels: model(pixels), 224)


def test_swin_as_older_files_and_the_authors_spell_it(tmp_path):
    """Merges counted with the stage they leave, `head` without `fc`, and buffers that follow from the geometry."""
    model = perturbed(timm().create_model("swin_tiny_patch4_window7_224", num_classes=CLASSES))
    now, old = model.state_dict(), {}
    for key, value in now.items():
        if ".downsample." in key:
            _, stage, rest = key.split(".", 2)
            key = f"layers.{int(stage) - 1}.{rest}"
        old[key.replace("head.fc.", "head.")] = value
    old["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    safetensors.torch.save_file(now, tmp_path / "now.safetensors")
    torch.save({"model": old}, tmp_path / "old.pth")
    with open_source(tmp_path / "now.safetensors") as one, open_source(tmp_path / "old.pth") as other:
        assert one.geometry == other.geometry and one.tensor_shapes == other.tensor_shapes
        for name in one.tensor_names:
            np.testing.assert_array_equal(one.read(name), other.read(name))


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "vit_base_patch16_clip_224", "beit_base_patch16_224"])
def test_relatives_that_are_something_else_are_refused_by_name(tmp_path, name):
    with torch.device("meta"):
        model = timm().create_model(name, num_classes=CLASSES)
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"version 2|CLIP|BEiT"):
        open_source(tmp_path / "model.safetensors")


# ---------------------------------------------------------------------- pixels


def photos() -> list[Image.Image]:
    """Structure and noise, upright, lying, square, with odd sides; none so large that reading reduces it."""
    rng = np.random.default_rng(0)
    found = []
    for height, width in ((300, 400), (500, 333), (224, 224), (517, 389)):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        fine = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        noisy = fine + rng.integers(-20, 20, fine.shape)
        found.append(Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)))
    return found


def check_pixels(preprocessing: Preprocessing, theirs: Any) -> None:
    """The same pixels to 1/255, where 0 is black and 1 is white."""
    std = np.array(preprocessing.std)[:, None, None]
    for photo in photos():
        view = center_view(shrink(photo, preprocessing), preprocessing)
        ours = normalise(view[None], preprocessing)[0]
        expected = np.asarray(theirs(photo))
        assert ours.shape == expected.shape
        assert np.abs((ours - expected) * std).max() <= 1.01 / 255


@pytest.mark.parametrize("name", ["ViT", "DeiT", "Bit"])  # Swin's is ViT's, DINOv2's is Bit's
@pytest.mark.parametrize("has_file_of", ["5", "4"])
def test_hugging_faces_pixels(name, has_file_of):
    library = transformers()
    # the one that works with Pillow has had the plain name up to transformers 4
    kind = getattr(library, f"{name}ImageProcessorPil", None) or getattr(library, f"{name}ImageProcessor")
    processor = kind()
    settings = processor.to_dict()
    if has_file_of == "4" and "height" in settings["size"]:
        settings["size"] = settings["size"]["height"]  # one number for both sides
    check_pixels(
        Preprocessing.from_hugging_face(settings),
        lambda photo: processor(photo, return_tensors="np")["pixel_values"][0],
    )


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "vit_small_patch14_dinov2"],
)
@pytest.mark.parametrize("is_told", [True, False])
def test_timms_pixels(tmp_path, name, is_told):
    model = timm().create_model(name, num_classes=CLASSES)
    data = importlib.import_module("timm.data")
    config = data.resolve_data_config(model.pretrained_cfg)
    path = tmp_path / f"{name}.safetensors"
    if is_told:
        path = tmp_path / name
        path.mkdir()
        known = {key: model.pretrained_cfg[key] for key in ("input_size", "crop_pct", "interpolation", "mean", "std")}
        (path / "config.json").write_text(json.dumps({"architecture": name, "pretrained_cfg": known}))
    safetensors.torch.save_file(model.state_dict(), path / "model.safetensors" if is_told else path)
    with open_source(path) as source:
        check_pixels(source.preprocessing, data.create_transform(**config, is_training=False))


@pytest.mark.parametrize("name", ["vit_b_32", "swin_t"])
def test_torchvisions_pixels(tmp_path, name):
    models = torchvision_models()
    weights = {"vit_b_32": "ViT_B_32_Weights", "swin_t": "Swin_T_Weights"}[name]
    safetensors.torch.save_file(getattr(models, name)(num_classes=CLASSES).state_dict(), tmp_path / "m.safetensors")
    with open_source(tmp_path / "m.safetensors") as source:
        check_pixels(source.preprocessing, getattr(models, weights).IMAGENET1K_V1.transforms())
