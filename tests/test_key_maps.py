"""Hugging Face checkpoints under our names: both architectures, every spelling, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from wasi_edge.artefact import ModelConfig, write_artefact
from wasi_edge.conversion.sources import open_source
from wasi_edge.errors import ConversionError
from wasi_edge.models import keys_dinov2, keys_vit
from wasi_edge.preprocessing import Preprocessing

D, M, P, G, DEPTH, CLASSES = 12, 24, 4, 3, 2, 5
REAL = Path(__file__).resolve().parents[2] / "shared" / "models" / "vit-s14"

# How the three generations of transformers spell the inside of a block, per architecture.
OLD = {
    "layer": "encoder.layer.{}.",
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "o": "attention.output.dense",
}
NEW = {
    "layer": "layers.{}.",
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "o": "attention.o_proj",
}
MIXED = NEW | {"layer": "encoder.layer.{}."}
VIT_OLD = {"fc1": "intermediate.dense", "fc2": "output.dense"}
MLP = {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
STYLES = {
    "dinov2": {"old": OLD | MLP, "transformers 5": MIXED | MLP, "layers": NEW | MLP},
    "vit": {"old": OLD | VIT_OLD, "transformers 5": NEW | MLP, "mixed": MIXED | VIT_OLD},
}
CASES = [
    (kind, style, classifier) for kind, styles in STYLES.items() for style in styles for classifier in (False, True)
]


def config_of(kind: str, classifier: bool) -> dict:
    config = {
        "model_type": kind,
        "architectures": [
            {"dinov2": "Dinov2", "vit": "ViT"}[kind] + ("ForImageClassification" if classifier else "Model")
        ],
        "hidden_size": D,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 3,
        "image_size": P * G,
        "patch_size": P,
        "num_channels": 3,
        "hidden_act": "gelu",
        "qkv_bias": True,
    }
    if classifier:
        config["id2label"] = {str(index): f"class {index % 4}" for index in range(CLASSES)}  # 0 and 4 collide
    return config | ({"mlp_ratio": 2} if kind == "dinov2" else {"intermediate_size": M})


def tensors_of(kind: str, style: str, classifier: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(what the Hugging Face file holds, what we should read), random."""
    rng = np.random.default_rng(1)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    words = STYLES[kind][style]
    prefix = f"{kind}." if classifier else ""
    theirs: dict[str, np.ndarray] = {}
    ours: dict[str, np.ndarray] = {}

    def put(key: str, name: str, *shape: int) -> None:
        theirs[key] = ours[name] = random(*shape)

    base = f"{prefix}embeddings."
    put(f"{base}patch_embeddings.projection.weight", "patch_embed.weight", D, 3, P, P)
    ours["patch_embed.weight"] = ours["patch_embed.weight"].reshape(D, 3 * P * P)
    put(f"{base}patch_embeddings.projection.bias", "patch_embed.bias", D)
    put(f"{base}cls_token", "class_token", 1, 1, D)
    ours["class_token"] = ours["class_token"].reshape(D)
    put(f"{base}position_embeddings", "position", 1, G * G + 1, D)
    ours["position"] = ours["position"][0]
    for block in range(DEPTH):
        layer, name = prefix + words["layer"].format(block), f"blocks.{block}"
        norms = ("norm1", "norm2") if kind == "dinov2" else ("layernorm_before", "layernorm_after")
        for kind_, *shape in (("weight", D, D), ("bias", D)):
            parts = [random(*shape) for _ in "qkv"]
            for letter, part in zip("qkv", parts, strict=True):
                theirs[f"{layer}{words[letter]}.{kind_}"] = part
            ours[f"{name}.qkv.{kind_}"] = np.concatenate(parts)
            put(f"{layer}{words['o']}.{kind_}", f"{name}.proj.{kind_}", *shape)
            put(f"{layer}{norms[0]}.{kind_}", f"{name}.norm1.{kind_}", D)
            put(f"{layer}{norms[1]}.{kind_}", f"{name}.norm2.{kind_}", D)
        put(f"{layer}{words['fc1']}.weight", f"{name}.fc1.weight", M, D)
        put(f"{layer}{words['fc1']}.bias", f"{name}.fc1.bias", M)
        put(f"{layer}{words['fc2']}.weight", f"{name}.fc2.weight", D, M)
        put(f"{layer}{words['fc2']}.bias", f"{name}.fc2.bias", D)
        if kind == "dinov2":
            put(f"{layer}layer_scale1.lambda1", f"{name}.scale1", D)
            put(f"{layer}layer_scale2.lambda1", f"{name}.scale2", D)
    put(f"{prefix}layernorm.weight", "norm.weight", D)
    put(f"{prefix}layernorm.bias", "norm.bias", D)
    if classifier:
        put("classifier.weight", "head.weight", CLASSES, 2 * D if kind == "dinov2" else D)
        put("classifier.bias", "head.bias", CLASSES)
    return theirs, ours


def save(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def folder_of(folder: Path, kind: str, style: str = "old", classifier: bool = False, **extra) -> Path:
    return save(folder, config_of(kind, classifier), tensors_of(kind, style, classifier)[0] | extra)


@pytest.mark.parametrize(("kind", "style", "classifier"), CASES)
def test_every_spelling_gives_the_same_tensors(tmp_path, kind, style, classifier):
    theirs, ours = tensors_of(kind, style, classifier)
    theirs[("" if not classifier else f"{kind}.") + "embeddings.mask_token"] = np.zeros((1, D), np.float32)
    if kind == "vit" and not classifier:
        theirs["pooler.dense.weight"] = np.zeros((D, D), np.float32)
        theirs["pooler.dense.bias"] = np.zeros(D, np.float32)
    with open_source(save(tmp_path / "model", config_of(kind, classifier), theirs)) as source:
        assert source.name == "model" and source.config is None
        geometry = source.geometry
        assert (geometry.depth, geometry.mlp_width, geometry.position_grid) == (DEPTH, M, G)
        assert geometry.features == ("class" if kind == "vit" and classifier else "class+mean")
        assert geometry.layer_scale == (kind == "dinov2")
        assert geometry.norm_eps == (1e-6 if kind == "dinov2" else 1e-12)
        assert set(source.tensor_names) == set(ours)
        for name, expected in ours.items():
            found = source.read(name)
            assert found.dtype == np.float32 and found.shape == source.tensor_shapes[name]
            np.testing.assert_array_equal(found, expected, err_msg=name)
        expected_labels = ["class 0 (0)", "class 1", "class 2", "class 3", "class 0 (4)"]
        assert source.id2label == (dict(enumerate(expected_labels)) if classifier else None)
        with pytest.raises(ConversionError, match="no tensor named"):
            source.read("blocks.0.q.weight")


@pytest.mark.parametrize("kind", STYLES)
def test_pure_key_maps_agree_with_the_config_alone(kind):
    module = {"dinov2": keys_dinov2, "vit": keys_vit}[kind]
    for classifier in (False, True):
        config, theirs = config_of(kind, classifier), tensors_of(kind, "old", classifier)[0]
        geometry = module.geometry_from_config(config)
        assert geometry == module.geometry_from_config(config, theirs)
        assert list(module.plan_tensors(geometry, theirs)) == list(
            geometry.tensor_shapes({}, CLASSES if classifier else None)
        )


def test_no_qkv_bias_reads_as_zeros_but_one_missing_does_not(tmp_path):
    theirs, _ = tensors_of("vit", "old", False)
    biases = [key for key in theirs if key.endswith(("query.bias", "key.bias", "value.bias"))]
    without = {key: value for key, value in theirs.items() if key not in biases}
    with open_source(save(tmp_path / "a", config_of("vit", False) | {"qkv_bias": False}, without)) as source:
        np.testing.assert_array_equal(source.read("blocks.1.qkv.bias"), np.zeros(3 * D))
    del theirs[biases[0]]
    with pytest.raises(ConversionError, match=r"tensors missing: layers\.0\.attention"):
        open_source(save(tmp_path / "b", config_of("vit", False), theirs))


ZEROS = np.zeros((1, 4, D), np.float32)


@pytest.mark.parametrize(
    ("kind", "change", "extra", "expected"),
    [
        ("dinov2", {}, {"embeddings.register_tokens": ZEROS}, "do not know: embeddings.register_tokens"),
        ("dinov2", {"num_register_tokens": 4}, {}, "missing: embeddings.register_tokens"),
        ("dinov2", {"model_type": "dinov2_with_registers"}, {}, "missing: embeddings.register_tokens"),
        ("dinov2", {"use_swiglu_ffn": True}, {}, "SwiGLU"),
        ("dinov2", {}, {"encoder.layer.0.mlp.weights_in.weight": ZEROS}, "SwiGLU"),
        ("dinov2", {"mlp_ratio": "4"}, {}, "mlp_ratio"),
        ("vit", {}, {"embeddings.distillation_token": ZEROS}, "do not know: embeddings.distillation_token"),
        ("vit", {}, {"layers.1.attention.q_proj.weight": ZEROS}, "the same tensor twice"),
        ("vit", {}, {"encoder.layer.2.layernorm_after.bias": ZEROS}, "do not know: encoder.layer.2"),
        ("vit", {"num_hidden_layers": 3}, {}, "missing: .*layers.2"),
        ("vit", {"intermediate_size": 20}, {}, r"intermediate.dense.weight has shape \(24, 12\)"),
        ("vit", {"image_size": 16}, {}, r"position_embeddings has shape \(1, 10, 12\)"),
        ("vit", {"image_size": [12, 16]}, {}, "square"),
        ("vit", {"image_size": {"height": 12}}, {}, "square"),
        ("vit", {"patch_size": [[4]]}, {}, "square"),
        ("vit", {"hidden_act": "quick_gelu"}, {}, "quick_gelu"),
        ("vit", {"hidden_size": "12"}, {}, "width"),
        ("vit", {"num_attention_heads": 5}, {}, "heads"),
        ("vit", {"model_type": "beit"}, {}, "'beit' is not supported; supported are deit, .* and vit"),
        ("vit", {"model_type": ["vit"]}, {}, "not supported"),
    ],
)
def test_what_is_no_plain_model_is_refused(tmp_path, kind, change, extra, expected):
    folder = folder_of(tmp_path / "model", kind, **extra)
    (folder / "config.json").write_text(json.dumps(config_of(kind, False) | change))
    with pytest.raises(ConversionError, match=expected):
        open_source(folder)


def test_values_that_are_not_finite_are_refused(tmp_path):
    for value in (np.nan, np.inf):
        theirs, _ = tensors_of("vit", "old", False)
        theirs["layernorm.bias"][3] = value
        with (
            open_source(save(tmp_path / "model", config_of("vit", False), theirs)) as source,
            pytest.raises(ConversionError, match="not finite"),
        ):
            source.read("norm.bias")


def test_bfloat16_is_widened(tmp_path):
    theirs, ours = tensors_of("vit", "old", False)
    folder = save(tmp_path / "model", config_of("vit", False), theirs)
    halves = {key: torch.from_numpy(value).bfloat16() for key, value in theirs.items()}
    safetensors.torch.save_file(halves, folder / "model.safetensors")
    with open_source(folder) as source:
        expected = torch.from_numpy(ours["blocks.0.qkv.weight"]).bfloat16().float().numpy()
        np.testing.assert_array_equal(source.read("blocks.0.qkv.weight"), expected)
        assert source.provenance["dtype"] == ["BF16"]


def sharded(tmp_path: Path) -> tuple[Path, dict]:
    theirs, _ = tensors_of("dinov2", "old", True)
    folder = save(tmp_path / "model", config_of("dinov2", True), theirs)
    (folder / "model.safetensors").unlink()
    names = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    keys = list(theirs)
    weight_map = {key: names[index % 2] for index, key in enumerate(keys)}
    for name in names:
        part = {key: theirs[key] for key in keys if weight_map[key] == name}
        safetensors.numpy.save_file(part, folder / name)
    return folder, weight_map


def test_shards_are_read_through_their_index(tmp_path):
    folder, weight_map = sharded(tmp_path)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _, ours = tensors_of("dinov2", "old", True)
    with open_source(folder) as source:
        for name, expected in ours.items():
            np.testing.assert_array_equal(source.read(name), expected)
    for spoiled, expected_message in (
        (weight_map | {"classifier.bias": "../secret.safetensors"}, "not a file name"),
        (weight_map | {"more": "model-00001-of-00002.safetensors"}, "was everything downloaded"),
        ({"classifier.bias": 3}, "weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": spoiled}))
        with pytest.raises(ConversionError, match=expected_message):
            open_source(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"00002.*missing; download it again"):
        open_source(folder)


def test_lone_files_and_empty_folders_are_explained(tmp_path):
    folder = folder_of(tmp_path / "model", "vit")
    file = folder / "model.safetensors"
    with pytest.raises(ConversionError, match="give the folder"):
        open_source(file)
    file.unlink()
    with pytest.raises(ConversionError, match="downloaded completely"):
        open_source(folder)
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConversionError, match="holds no model"):
            open_source(path)


def test_preprocessing_of_the_folder_or_of_the_architecture(tmp_path):
    vit, dino = folder_of(tmp_path / "vit", "vit"), folder_of(tmp_path / "dino", "dinov2")
    with open_source(vit) as source:
        assert source.preprocessing == Preprocessing.plain_vit(P * G)
    with open_source(dino) as source:
        assert source.preprocessing == Preprocessing()
    settings = {"size": {"height": 34, "width": 34}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (vit / "preprocessor_config.json").write_text(json.dumps(settings))
    with open_source(vit) as source:
        assert source.preprocessing.image_size == 32  # whole patches
        assert source.preprocessing.std == (0.25, 0.25, 0.25)
    (vit / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ConversionError, match="preprocessor_config"):
        open_source(vit)


def test_our_own_models_are_dense_sources_too(tmp_path):
    folder = folder_of(tmp_path / "hf", "dinov2", classifier=True)
    rng = np.random.default_rng(2)
    with open_source(folder) as source:
        linears: dict[str, int | None] = dict.fromkeys(source.geometry.linear_shapes())
        linears["blocks.0.fc1"], linears["blocks.1.qkv"] = 3, 7
        config = ModelConfig("mixed", source.geometry, linears, source.preprocessing, 0.7, id2label=source.id2label)
        written = {}
        with write_artefact(tmp_path / "own", config) as writer:
            for name, shape in config.tensor_shapes().items():
                factor = name.endswith((".left", ".right"))
                written[name] = rng.standard_normal(shape).astype(np.float32) if factor else source.read(name)
                writer.add(name, written[name])
    with open_source(tmp_path / "own") as own:
        assert own.config == config and own.id2label == config.id2label and own.geometry == config.geometry
        for name in own.tensor_names:
            linear = name.removesuffix(".weight")
            if linears.get(linear):
                product = written[f"{linear}.left"] @ written[f"{linear}.right"]
                np.testing.assert_allclose(own.read(name), product, rtol=1e-5, atol=1e-5)
            else:
                np.testing.assert_array_equal(own.read(name), written[name])
        assert own.tensor_shapes == config.geometry.tensor_shapes({}, CLASSES)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/models/vit-s14")
def test_the_real_vit_s14():
    with open_source(REAL) as source:
        assert source.num_classes is None and source.preprocessing.image_size == 224
        assert dataclasses.asdict(source.geometry) | {"depth": 12, "width": 384, "position_grid": 37} == (
            dataclasses.asdict(source.geometry)
        )
        total = sum(source.read(name).size for name in source.tensor_names)
        assert total == sum(int(np.prod(shape)) for shape in source.tensor_shapes.values()) == 22_056_192
        raw = safetensors.numpy.load_file(REAL / "model.safetensors")
        key = raw["encoder.layer.3.attention.attention.key.weight"].astype(np.float32)
        np.testing.assert_array_equal(source.read("blocks.3.qkv.weight")[384:768], key)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/models/vit-s14")
def test_reading_the_real_model_keeps_only_one_tensor_resident():
    code = (
        "import sys\n"
        "from wasi_edge.conversion.sources import open_source\n"
        "def peak():\n"
        "    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))\n"
        "source = open_source(sys.argv[1])\n"
        "before = peak()\n"
        "for name in source.tensor_names:\n"
        "    source.read(name)\n"
        "assert 'torch' not in sys.modules\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(REAL)], capture_output=True, text=True, check=True)
    # The largest tensor is 2.4 MB as float32 (fc1), qkv's 1.8 MB plus one of its parts; the file has 44 MB.
    assert int(done.stdout) < 12 * 1024  # KiB
