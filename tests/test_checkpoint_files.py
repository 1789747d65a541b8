"""Foreign checkpoints as files: layouts told apart by their keys, pickles, hostile files, the hub; from outside too."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from wasi_edge.conversion.sources import open_source
from wasi_edge.errors import ArtefactError, ConversionError
from wasi_edge.models import hub
from wasi_edge.preprocessing import Preprocessing

D, M, P, G, DEPTH = 64, 96, 4, 3, 2


def timm_vit(**more: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A state dict as timm writes it."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, D),
        "pos_embed": (1, G * G + 1, D),
        "patch_embed.proj.weight": (D, 3, P, P),
        "patch_embed.proj.bias": (D,),
        "norm.weight": (D,),
        "norm.bias": (D,),
        "head.weight": (5, D),
        "head.bias": (5,),
    }
    for block in range(DEPTH):
        for name, shape in {
            "norm1": (D,),
            "attn.qkv": (3 * D, D),
            "attn.proj": (D, D),
            "norm2": (D,),
            "mlp.fc1": (M, D),
            "mlp.fc2": (D, M),
        }.items():
            shapes[f"blocks.{block}.{name}.weight"] = shape
            shapes[f"blocks.{block}.{name}.bias"] = shape[:1]
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (shapes | more).items()}


def tensors(state: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in state.items()}


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "wasi_edge", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("wrap", [dict, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3}])
@pytest.mark.parametrize("is_old", [False, True])
def test_pickles_give_what_safetensors_give(tmp_path, wrap, is_old):
    state = timm_vit()
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    torch.save(wrap(tensors(state)), tmp_path / "model.pth", _use_new_zipfile_serialization=not is_old)
    with open_source(tmp_path / "model.safetensors") as one, open_source(tmp_path / "model.pth") as other:
        assert one.geometry == other.geometry and one.geometry.heads == 1 and one.name == other.name == "model"
        for name in one.tensor_names:
            for _ in range(2):  # pages that left come back
                np.testing.assert_array_equal(one.read(name), other.read(name))


def test_names_of_data_parallel_training_are_known(tmp_path):
    torch.save({f"module.{name}": value for name, value in tensors(timm_vit()).items()}, tmp_path / "model.pth")
    with open_source(tmp_path / "model.pth") as source:
        assert source.geometry.depth == DEPTH


def test_parameters_and_transposed_tensors_are_tensors_too(tmp_path):
    state = tensors(timm_vit())
    odd = dict(state)
    odd["norm.weight"] = torch.nn.Parameter(state["norm.weight"])
    odd["blocks.0.attn.proj.weight"] = state["blocks.0.attn.proj.weight"].t().contiguous().t()
    torch.save(odd, tmp_path / "odd.pth")
    torch.save(state, tmp_path / "plain.pth")
    with open_source(tmp_path / "odd.pth") as one, open_source(tmp_path / "plain.pth") as other, torch.enable_grad():
        for name in one.tensor_names:
            np.testing.assert_array_equal(one.read(name), other.read(name))


class Evil:
    """A pickle that makes a file where it is loaded freely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def hostile(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files of many kinds of malice and damage, and what is said about each."""
    folder.mkdir()
    state, found = timm_vit(), {}

    def saved(name: str, content: bytes, expected: str) -> None:
        (folder / name).write_bytes(content)
        found[name] = folder / name, expected

    whole = safetensors.numpy.save(state)
    saved("truncated.safetensors", whole[: len(whole) // 2], "truncated.safetensors")
    terabytes = json.dumps({"cls_token": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    saved("terabytes.safetensors", len(terabytes).to_bytes(8, "little") + terabytes, "terabytes.safetensors")
    saved("header.safetensors", (1 << 50).to_bytes(8, "little") + b"{}", "header.safetensors")
    whole_numbers = {**state, "norm.bias": state["norm.bias"].astype(np.int32)}
    saved("dtype.safetensors", safetensors.numpy.save(whole_numbers), "norm.bias holds I32")
    saved("code.pth", pickle.dumps({"cls_token": Evil(folder / "was-run")}), "code.pth")
    torch.save({"model": Evil(folder / "was-run")}, folder / "zipped.pth")
    found["zipped.pth"] = folder / "zipped.pth", "asks to run code"
    wide = {"cls_token": torch.zeros(1).expand(2048, 2048)}
    torch.save(wide, folder / "expanded.pth")
    found["expanded.pth"] = folder / "expanded.pth", "no plain tensor"
    twice = tensors(state) | {"module.norm.weight": torch.zeros(D)}
    torch.save(twice, folder / "twice.pth")
    found["twice.pth"] = folder / "twice.pth", "same tensor twice"
    torch.save({1: torch.zeros(2)}, folder / "numbers.pth")
    found["numbers.pth"] = folder / "numbers.pth", "holds no state dict"
    saved("noise.pth", b"\x00\x01noise", "or is damaged")
    torch.save([1, 2, 3], folder / "list.pth")
    found["list.pth"] = folder / "list.pth", "holds no state dict"
    saved("notes.txt", b"hello", "no checkpoint by its name")
    resnet = {"conv1.weight": state["norm.bias"], "bn1.num_batches_tracked": np.zeros(1, np.int64)}
    saved("resnet.safetensors", safetensors.numpy.save(resnet), "of no layout known here")
    for name, key, shape, expected in (
        ("swiglu", "blocks.0.mlp.w12.weight", (M, D), "SwiGLU"),
        ("clip", "norm_pre.weight", (D,), "CLIP"),
        ("normed", "blocks.0.attn.q_norm.weight", (D,), "normalised queries"),
        ("more", "blocks.0.extra.weight", (D,), "do not know: blocks.0.extra.weight"),
        ("odd", "pos_embed", (1, 8, D), "make no square"),
        ("flat", "pos_embed", (D,), "make no square"),
        ("deep", "blocks.30000000.norm1.weight", (D,), "numbers of the blocks"),
    ):
        saved(f"{name}.safetensors", safetensors.numpy.save(timm_vit(**{key: shape})), expected)
    wrong = state | {"blocks.1.mlp.fc2.weight": state["blocks.1.mlp.fc1.weight"]}
    saved("shape.safetensors", safetensors.numpy.save(wrong), r"blocks.1.mlp.fc2.weight has shape (96, 64)")
    absent = {name: value for name, value in state.items() if name != "blocks.1.attn.proj.bias"}
    saved("absent.safetensors", safetensors.numpy.save(absent), "missing: blocks.1.attn.proj.bias")
    return found


def test_hostile_files_are_refused_in_one_sentence_and_nothing_is_run(tmp_path):
    for name, (path, expected) in hostile(tmp_path / "files").items():
        with pytest.raises((ConversionError, ArtefactError)) as refusal:
            open_source(path)
        assert expected in str(refusal.value) and "\n" not in str(refusal.value), name
    assert not (tmp_path / "files" / "was-run").exists()


@pytest.mark.parametrize("name", ["zipped.pth", "truncated.safetensors", "terabytes.safetensors", "dtype.safetensors"])
def test_the_command_refuses_them_too_and_writes_nothing(tmp_path, name):
    path, expected = hostile(tmp_path / "files")[name]
    done = command("convert", path, tmp_path / "out")
    assert done.returncode == 1 and expected in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_pickles_are_refused_where_torch_cannot_load_them_safely(tmp_path, monkeypatch):
    torch.save(tensors(timm_vit()), tmp_path / "model.pth")
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(ConversionError, match=r"torch 2\.9\.1 cannot load safely.*2\.10 or newer.*safetensors"):
        open_source(tmp_path / "model.pth")


def test_a_tensor_file_of_hugging_face_wants_its_folder(tmp_path):
    state = {"vit.embeddings.patch_embeddings.projection.weight": np.zeros((D, 3, P, P), np.float32)}
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match="give the folder"):
        open_source(tmp_path / "model.safetensors")


def timm_folder(folder: Path, config: dict) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch4_12"} | config))
    safetensors.numpy.save_file(timm_vit(), folder / "model.safetensors")
    return folder


def test_a_folder_of_timm_says_how_photos_are_prepared_and_what_classes_are_called(tmp_path):
    trained = {
        "input_size": [3, 12, 12],
        "crop_pct": 0.8,
        "interpolation": "bilinear",
        "mean": [0.5] * 3,
        "std": [0.4] * 3,
    }
    more = {"pretrained_cfg": trained, "model_args": {"num_heads": 4}, "label_names": ["a", "b", "c", "d", "e"]}
    with open_source(timm_folder(tmp_path / "tiny", more)) as source:
        assert source.preprocessing == Preprocessing(12, 0.8, "bilinear", (0.5,) * 3, (0.4,) * 3, even_offset=True)
        assert source.geometry.heads == 4 and source.id2label == dict(enumerate("abcde"))
        assert source.provenance["architecture"] == "vit_tiny_patch4_12"


def test_without_a_word_about_photos_those_of_the_usual_weights_are_taken(tmp_path):
    state = timm_vit()
    for name, mean in (("vit_tiny", 0.5), ("deit_tiny", 0.485)):
        safetensors.numpy.save_file(state, tmp_path / f"{name}.safetensors")
        with open_source(tmp_path / f"{name}.safetensors") as source:
            assert (source.preprocessing.mean[0], source.preprocessing.image_size) == (mean, P * G)


def test_a_pickle_in_a_folder_is_read_where_there_is_nothing_better(tmp_path):
    folder = timm_folder(tmp_path / "tiny", {})
    (folder / "model.safetensors").unlink()
    torch.save(tensors(timm_vit()), folder / "pytorch_model.bin")
    with open_source(folder) as source:
        assert source.geometry.depth == DEPTH
    torch.save({}, folder / "optimizer.pt")
    with pytest.raises(ConversionError, match="several pickles"):
        open_source(folder)


def test_converted_files_describe_themselves(tmp_path):
    torch.save(tensors(timm_vit()), tmp_path / "tiny.pth")
    assert command("convert", tmp_path / "tiny.pth", tmp_path / "out", "--epsilon", "0.9").returncode == 0
    for model, kind in ((tmp_path / "tiny.pth", "timm ViT, dense"), (tmp_path / "out", "factored")):
        done = command("info", model, "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["kind"] == kind
    trained = command("finetune", tmp_path, "--model", tmp_path / "tiny.pth")
    assert trained.returncode == 1 and "wasi-edge convert" in trained.stderr


# ---------------------------------------------------------------------- the hub

FAKE_HUB = """
import os, pathlib
class RepositoryNotFoundError(Exception): pass
class RevisionNotFoundError(Exception): pass
class GatedRepoError(RepositoryNotFoundError): pass
class LocalEntryNotFoundError(Exception): pass
def snapshot_download(name, revision, allow_patterns):
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1" and "config.json" in allow_patterns
    kind = name.partition("/")[2]
    if kind in globals():
        raise globals()[kind]("a long story\\nin several lines")
    return str(pathlib.Path(os.environ["FAKE_HUB"], name, revision or "main"))
"""


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A library that finds models under `tmp_path / "hub"`."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "huggingface_hub.py").write_text(FAKE_HUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "library"))
    monkeypatch.setenv("FAKE_HUB", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["hf:owner/tiny", "hf:owner/tiny@v1.0"])
def test_models_of_the_hub_are_fetched_and_converted(fake_hub, tmp_path, name):
    revision = name.partition("@")[2] or "main"
    (fake_hub / "owner" / "tiny").mkdir(parents=True)
    timm_folder(fake_hub / "owner" / "tiny" / revision, {})
    done = command("convert", name, tmp_path / "out", "--epsilon", "0.9")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:owner/RepositoryNotFoundError", "no such model"),
        ("hf:owner/RevisionNotFoundError@x", "no such revision"),
        ("hf:owner/GatedRepoError", "asks for a login"),
        ("hf:owner/LocalEntryNotFoundError", "the hub cannot be reached"),
        ("hf:owner", "expected hf:OWNER/NAME"),
        ("hf:owner/name; rm", "expected hf:OWNER/NAME"),
    ],
)
def test_what_the_hub_cannot_give_is_said_in_one_sentence(fake_hub, name, expected):
    done = command("info", name)
    assert done.returncode == 1 and expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ArtefactError, match=r'pip install "wasi-edge\[hub\]"'):
        hub.fetch("hf:owner/name")
