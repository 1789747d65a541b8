"""`wasi_edge.load(run)` for programs: the same answers as the commands."""

from __future__ import annotations

import subprocess
import sys

import onnx
import pytest
from photos import class_folders, save_jpeg, scene, truncated_jpeg
from tiny_artefact import LABELS, write_tiny

import wasi_edge
from wasi_edge.errors import ArtefactError, NoUsableData, UsageError
from wasi_edge.inference.predict import predict_paths
from wasi_edge.inference.torch_backend import TorchClassifier


@pytest.fixture
def model(tmp_path):
    return write_tiny(tmp_path / "model")


def test_predicting_takes_one_path_or_many(model, tmp_path):
    paths = [save_jpeg(tmp_path / "p" / f"{seed}.jpg", scene(seed)) for seed in range(3)]
    loaded = wasi_edge.load(model)
    assert loaded.labels == list(LABELS)
    expected = list(predict_paths(TorchClassifier(model), paths, 2))
    assert loaded.predict(tmp_path / "p", top_k=2) == expected
    assert loaded.predict(paths, top_k=2) == expected
    (alone,) = loaded.predict(str(paths[0]), top_k=2)
    assert alone["label"] == expected[0]["label"] and alone["path"] == expected[0]["path"]
    assert list(loaded.stream(iter(paths), top_k=2)) == expected
    assert loaded.predict(paths[0], threshold=1.0)[0]["label"] == "unsure"
    assert len(loaded.predict(paths[0], top_k=99)[0]["top"]) == len(LABELS)


def test_a_photo_that_cannot_be_read_is_an_entry(model, tmp_path):
    (row,) = wasi_edge.load(model).predict(truncated_jpeg(tmp_path / "cut.jpg"))
    assert row["path"].endswith("cut.jpg") and "truncated" in row["error"]


def test_evaluating(model, tmp_path):
    photos = class_folders(tmp_path / "photos", {"cat": 2, "dog": 3})
    result = wasi_edge.load(model).evaluate(photos)
    assert result["num_images"] == 5 and set(result["per_class"]) == set(LABELS)
    with pytest.raises(NoUsableData):
        wasi_edge.load(model).evaluate(class_folders(tmp_path / "other", {"x": 2, "y": 2}))


def test_exporting_and_loading_the_file(model, tmp_path):
    photo = save_jpeg(tmp_path / "p.jpg", scene(0))
    loaded, out = wasi_edge.load(model), tmp_path / "new" / "m.onnx"
    result = loaded.export(out)
    assert result["status"] == "completed" and result["logit_difference"] < 1e-5
    onnx.checker.check_model(str(out), full_check=True)
    assert wasi_edge.load(out).predict(photo)[0]["label"] == loaded.predict(photo)[0]["label"]
    with pytest.raises(UsageError, match=r"ends in \.onnx"):
        loaded.export(tmp_path / "m.bin")


def test_what_is_wrong_is_said(model, tmp_path):
    with pytest.raises(ArtefactError, match="no such model"):
        wasi_edge.load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="'gpu'"):
        wasi_edge.load(model, backend="gpu")
    with pytest.raises(UsageError, match="top_k"):
        wasi_edge.load(model).predict("x.jpg", top_k=0)


def test_importing_the_package_imports_nothing():
    code = "import sys; before = set(sys.modules); import wasi_edge; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "['wasi_edge']"
