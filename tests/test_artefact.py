"""Model folders: checked when opened, atomic when written, identical after a round trip."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from wasi_edge import artefact as module
from wasi_edge.artefact import (
    ModelConfig,
    is_artefact,
    is_foreign_folder,
    open_artefact,
    read_config,
    write_artefact,
)
from wasi_edge.errors import ArtefactError
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.preprocessing import Preprocessing

GEOMETRY = ViTGeometry(4, 12, 2, 3, 20, 5, layer_scale=True)
RANKS: dict[str, int | None] = dict.fromkeys(GEOMETRY.linear_shapes(), 4) | {"blocks.1.fc2": None}
CONFIG = ModelConfig(
    name="tiny",
    geometry=GEOMETRY,
    linears=RANKS,
    preprocessing=Preprocessing(image_size=16),
    epsilon=0.8,
    id2label={0: "Katze", 1: "Hündin", 2: "dog"},
    provenance={"source": "random"},
    training={"epochs": 3},
)


def fill(folder: Path, config: ModelConfig = CONFIG, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    with write_artefact(folder, config) as writer:
        for name, shape in config.tensor_shapes().items():
            writer.add(name, rng.standard_normal(shape).astype(config.dtype))
    return folder


def edit(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    values.update(changes)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip_is_bit_identical(tmp_path, dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    fill(tmp_path / "a", config)
    with open_artefact(tmp_path / "a") as first, write_artefact(tmp_path / "b", first.config) as writer:
        assert first.config == config
        for name in first.tensors:
            assert first.tensors.dtype(name) == dtype
            writer.add(name, first.tensors.read(name))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "b" / name).stat().st_mode & 0o777 == 0o666 & 0o644 & ~_umask()
    assert sorted(os.listdir(tmp_path / "b")) == ["config.json", "model.safetensors"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_config_json_is_what_the_contract_names(tmp_path):
    values = json.loads((fill(tmp_path) / "config.json").read_text(encoding="utf-8"))
    assert values["schema_version"] == 1 and values["architecture"] == "vit"
    assert values["id2label"] == {"0": "Katze", "1": "Hündin", "2": "dog"}
    assert values["label2id"] == {"Katze": 0, "Hündin": 1, "dog": 2} == CONFIG.label2id
    assert values["linears"]["blocks.0.qkv"] == {"kind": "factored", "rank": 4}
    assert values["linears"]["blocks.1.fc2"] == {"kind": "dense"}
    assert CONFIG.labels == ["Katze", "Hündin", "dog"] and CONFIG.num_classes == 3
    assert ModelConfig.from_dict(values) == CONFIG


def test_a_backbone_has_no_labels(tmp_path):
    config = dataclasses.replace(CONFIG, id2label=None, training=None, epsilon=None)
    with open_artefact(fill(tmp_path, config)) as opened:
        assert opened.config == config and "head.weight" not in opened.tensors
        assert config.label2id is None and config.num_classes is None and config.labels == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schema_version": 2}, "newer wasi-edge .*upgrade"),
        ({"schema_version": "1"}, "schema_version should be"),
        ({"schema_version": 0}, "schema_version should be"),
        ({"architecture": "beit"}, "architecture"),
        ({"dtype": "bfloat16"}, "dtype should be"),
        ({"epsilon": 1.5}, "epsilon"),
        ({"epsilon": "0.8"}, "epsilon"),
        ({"name": 3}, "name"),
        ({"geometry": 5}, "geometry"),
        ({"linears": {}}, "no rank is given for blocks.0.qkv"),
        ({"linears": {"blocks.0.qkv": {"kind": "sparse"}}}, "kind"),
        ({"linears": []}, "linears should be a JSON object"),
        ({"preprocessing": None}, "preprocessing should be"),
        ({"id2label": {"0": "a", "2": "b"}}, "without gaps"),
        ({"id2label": {"0": "a", "1": "a", "2": "b"}}, "differ"),
        ({"id2label": {"zero": "a"}}, "numbers"),
        ({"id2label": None}, "does not know: head.weight"),
        ({"id2label": {"0": "a", "1": "b"}}, r"head.weight has shape \(3, 24\)"),
        ({"dtype": "float16", "geometry": {**GEOMETRY.to_dict(), "layer_scale": False}}, "does not know"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, changes, expected):
    edit(fill(tmp_path), **changes)
    with pytest.raises(ArtefactError, match=expected) as caught:
        open_artefact(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_float16_weights_under_a_float32_config_are_refused(tmp_path):
    edit(fill(tmp_path, dataclasses.replace(CONFIG, dtype="float16")), dtype="float32")
    with pytest.raises(ArtefactError, match="expected float32 tensors"):
        open_artefact(tmp_path)


def test_missing_pieces(tmp_path):
    with pytest.raises(ArtefactError, match="does not exist"):
        open_artefact(tmp_path)
    fill(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"model\.safetensors"):
        open_artefact(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArtefactError, match="not valid JSON"):
        open_artefact(tmp_path)


def test_writing_something_else_than_the_config_says_leaves_the_old_model(tmp_path):
    fill(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    shapes = CONFIG.tensor_shapes()
    for spoil, expected in (
        (lambda name: name == "norm.bias" and "skip", "missing: norm.bias"),
        (lambda name: name == "norm.bias" and "shape", "norm.bias has shape"),
    ):
        with (
            pytest.raises(ArtefactError, match=expected),
            write_artefact(tmp_path, dataclasses.replace(CONFIG, id2label={0: "other", 1: "b", 2: "c"})) as w,
        ):
            for name, shape in shapes.items():
                fault = spoil(name)
                if fault != "skip":
                    w.add(name, np.zeros((*shape, 1) if fault == "shape" else shape, np.float32))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


@pytest.mark.parametrize("same_meaning", [True, False])
def test_a_crash_between_the_two_files_never_puts_old_labels_on_new_weights(tmp_path, monkeypatch, same_meaning):
    fill(tmp_path)
    labels = CONFIG.id2label if same_meaning else {0: "x", 1: "y", 2: "z"}

    def power_cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json_atomic", power_cut)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, dataclasses.replace(CONFIG, id2label=labels, training={"epochs": 4}), seed=1)
    assert is_artefact(tmp_path) == same_meaning
    if same_meaning:
        open_artefact(tmp_path).close()


def test_detection(tmp_path):
    ours, theirs, neither = (tmp_path / name for name in ("a", "b", "c"))
    fill(ours)
    for folder in (theirs, neither):
        folder.mkdir()
    (theirs / "config.json").write_text('{"model_type": "vit"}')
    (neither / "config.json").write_text("[]")
    folders = (ours, theirs, neither, tmp_path / "none")
    assert [is_artefact(folder) for folder in folders] == [True, False, False, False]
    assert [is_foreign_folder(folder) for folder in folders] == [False, True, False, False]
    with pytest.raises(ArtefactError, match="wasi-edge convert"):
        read_config(theirs)
