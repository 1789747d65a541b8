"""Finding photos, decoding them ahead, and the torch classifier against the network under autograd."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from models import TINY, dense_reader, random_tensors
from photos import class_folders, save_jpeg, scene, truncated_jpeg
from tiny_artefact import LABELS, write_tiny

from wasi_edge.artefact import open_artefact
from wasi_edge.errors import ArtefactError, UnreadablePhoto, UsageError
from wasi_edge.export.model import write_onnx
from wasi_edge.inference import predict
from wasi_edge.inference.classifier import Backend, open_classifier
from wasi_edge.inference.predict import classified, decoded_views, iter_photos, predict_paths, read_view
from wasi_edge.inference.sorting import copy_into, folder_name
from wasi_edge.inference.torch_backend import TorchClassifier
from wasi_edge.models.vanilla import build_vanilla
from wasi_edge.preprocess import normalise
from wasi_edge.preprocessing import Preprocessing


class Brightness:
    """A classifier without a network: how bright the picture is, in one of three."""

    def __init__(self):
        self.labels = ["dark", "middle", "bright"]
        self.preprocessing = Preprocessing(image_size=16)
        self.batch = 8
        self.batches = []

    def probabilities(self, batch):
        self.batches.append(len(batch))
        mean = batch.reshape(len(batch), -1).mean(1, keepdims=True) / 255
        weights = np.exp(-30 * np.abs(mean - np.array([0.1, 0.5, 0.9])))
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    root = class_folders(tmp_path / "photos", {"b": 2, "a": 3})
    (root / "a" / "._000.jpg").write_bytes(b"left by macOS")
    (root / "a" / "notes.txt").write_text("no photo")
    save_jpeg(root / "@eaDir" / "thumb.jpg", scene(1))
    save_jpeg(root / "loose.jpg", scene(2))
    return root


# ---- finding photos ----------------------------------------------------------------------------


def test_a_folder_gives_its_photos_at_any_depth_without_foreign_files(folder):
    found = [path.relative_to(folder).as_posix() for path in iter_photos([folder])]
    assert found == ["loose.jpg", "a/000.jpg", "a/001.jpg", "a/002.jpg", "b/000.jpg", "b/001.jpg"]


def test_files_are_taken_as_they_come_and_missing_ones_handed_on(folder, tmp_path):
    words = [folder / "a" / "notes.txt", tmp_path / "nowhere.jpg", folder / "b"]
    assert [path.name for path in iter_photos(words)] == ["notes.txt", "nowhere.jpg", "000.jpg", "001.jpg"]


def test_patterns_that_the_shell_left_alone_are_expanded(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [str(path) for path in iter_photos(["a/*0*.jpg"])] == ["a/000.jpg", "a/001.jpg", "a/002.jpg"]
    assert [str(path) for path in iter_photos(["**/001.*"])] == ["a/001.jpg", "b/001.jpg"]
    assert [path.name for path in iter_photos(["a/*"])] == ["000.jpg", "001.jpg", "002.jpg"]
    assert [str(path) for path in iter_photos(["none*.jpg"])] == ["none*.jpg"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    save_jpeg(tmp_path / "IMG[1].jpg", scene(0))
    save_jpeg(tmp_path / "IMG1.jpg", scene(0))
    assert [path.name for path in iter_photos([tmp_path / "IMG[1].jpg"])] == ["IMG[1].jpg"]


def test_a_list_on_standard_input(folder, monkeypatch):
    lines = f"{folder}/a/000.jpg\n\n{folder}/b\r\n".encode() + b"caf\xe9.jpg\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    found = [path.name for path in iter_photos(["-"])]
    assert found == ["000.jpg", "000.jpg", "001.jpg", "caf\udce9.jpg"]


def test_loops_of_links_end_and_the_excluded_folder_is_not_entered(folder):
    (folder / "a" / "up").symlink_to(folder)
    assert len(list(iter_photos([folder]))) == 6
    assert len(list(iter_photos([folder], exclude=folder / "b"))) == 4


# ---- decoding ahead ----------------------------------------------------------------------------


def test_order_is_kept_and_no_more_than_asked_for_is_read_ahead(tmp_path, monkeypatch):
    """The first photo takes longest; the paths are endless."""
    taken = itertools.count()
    paths = (tmp_path / f"{next(taken)}.jpg" for _ in itertools.repeat(None))

    def slow_start(path, preprocessing):
        time.sleep(0.2 if path.stem == "0" else 0.0)
        return np.full((1, 1, 3), int(path.stem), dtype=np.uint8)

    monkeypatch.setattr(predict, "read_view", slow_start)
    stream = decoded_views(paths, Preprocessing(image_size=16), group=6)
    seen = [int(view[0, 0, 0]) for _, view in itertools.islice(stream, 20)]
    stream.close()
    assert seen == list(range(20))
    assert next(taken) <= 24  # four groups


def test_an_endless_stream_is_classified_in_batches(tmp_path):
    path = save_jpeg(tmp_path / "one.jpg", scene(3))
    model = Brightness()
    rows = list(itertools.islice(predict_paths(model, itertools.repeat(path), batch=4), 13))
    assert {row["label"] for row in rows} == {rows[0]["label"]}
    assert model.batches == [4, 4, 4, 4]


def test_a_folder_of_nothing_but_unreadable_files_does_not_pile_up(tmp_path):
    bad = truncated_jpeg(tmp_path / "bad.jpg")
    rows = list(itertools.islice(classified(Brightness(), itertools.repeat(bad), batch=2), 40))
    assert all(isinstance(row, UnreadablePhoto) for _, row in rows)


# ---- predicting --------------------------------------------------------------------------------


def test_rows_keep_their_order_between_errors(tmp_path):
    paths = []
    for index, level in enumerate([20, 240, 128]):
        paths.append(save_jpeg(tmp_path / f"{index}.jpg", scene(0, 64, 48).point(lambda _, v=level: v)))
        paths.append(tmp_path / f"missing{index}.jpg")
    rows = list(predict_paths(Brightness(), paths, top_k=2, batch=2))
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert [row.get("label") for row in rows] == ["dark", None, "bright", None, "middle", None]
    assert rows[1] == {"path": str(paths[1]), "error": "the file does not exist"}
    assert len(rows[0]["top"]) == 2
    assert rows[0]["top"][0] == ["dark", rows[0]["probability"]]
    assert rows[0]["top"][0][1] >= rows[0]["top"][1][1]


def test_a_label_below_the_threshold_is_unsure_and_keeps_its_figures(tmp_path):
    path = save_jpeg(tmp_path / "grey.jpg", scene(0, 64, 48).point(lambda _: 77))
    (sure,) = predict_paths(Brightness(), [path])
    (unsure,) = predict_paths(Brightness(), [path], threshold=0.999)
    assert unsure["label"] == "unsure"
    assert unsure["top"] == sure["top"] and unsure["probability"] == sure["probability"]


# ---- the torch classifier ----------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "dtype"), [(6, "float32"), (None, "float32"), (6, "float16")])
def test_probabilities_are_those_of_the_network_under_autograd(tmp_path, rank, dtype):
    model = TorchClassifier(write_tiny(tmp_path / "m", rank, dtype))
    batch = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    found = model.probabilities(batch)
    _, tensors = random_tensors(TINY, rank, 3)
    stored = {
        name: value.to(torch.float16 if dtype == "float16" else torch.float32).double()
        for name, value in tensors.items()
    }
    twin = build_vanilla(TINY, dense_reader(stored), 16, 3)
    with torch.no_grad():
        twin.double().head.weight.copy_(stored["head.weight"])
        twin.head.bias.copy_(stored["head.bias"])
        expected = twin(torch.from_numpy(normalise(batch, model.preprocessing)).double()).softmax(1)
    assert found.dtype == np.float32
    assert np.abs(found - expected.numpy()).max() < 1e-5
    assert model.labels == list(LABELS)


def test_memory_holds_float32_factors_and_no_dense_weight(tmp_path):
    model = TorchClassifier(write_tiny(tmp_path / "m", 6, "float16"))
    shapes = {tuple(value.shape) for value in model._network.parameters().values()}
    assert not shapes & set(TINY.linear_shapes().values())
    assert all(value.dtype == torch.float32 for value in model._network.parameters().values())
    assert not any(value.requires_grad for value in model._network.parameters().values())


def test_a_photo_is_predicted_the_same_alone_and_among_others(tmp_path):
    paths = [save_jpeg(tmp_path / f"{index}.jpg", scene(index)) for index in range(5)]
    model = TorchClassifier(write_tiny(tmp_path / "m"))
    together = [row["probability"] for row in predict_paths(model, paths, batch=8)]
    alone = [next(predict_paths(model, [path]))["probability"] for path in paths]
    assert together == pytest.approx(alone, abs=1e-6)
    assert read_view(paths[0], model.preprocessing).shape == (16, 16, 3)


def test_a_model_without_a_classifier_says_what_to_do(tmp_path):
    with pytest.raises(ArtefactError, match="wasi-edge finetune PHOTOS --model"):
        TorchClassifier(write_tiny(tmp_path / "m", labels=None))


def exported(tmp_path, seed=0):
    folder = write_tiny(tmp_path / "m", seed=seed)
    with open_artefact(folder) as artefact:
        write_onnx(artefact, folder / "model.onnx")
    return folder


def test_onnx_runtime_is_taken_where_there_is_an_exported_model(tmp_path):
    folder = exported(tmp_path)
    batch = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    found = {backend: open_classifier(folder, backend) for backend in Backend}
    kinds = {backend: type(classifier).__name__ for backend, classifier in found.items()}
    assert kinds == {Backend.AUTO: "OnnxClassifier", Backend.ONNX: "OnnxClassifier", Backend.TORCH: "TorchClassifier"}
    by_torch = found[Backend.TORCH].probabilities(batch)
    np.testing.assert_allclose(found[Backend.ONNX].probabilities(batch), by_torch, atol=1e-5)
    alone = open_classifier(folder / "model.onnx")
    assert alone.labels == list(LABELS)
    np.testing.assert_allclose(alone.probabilities(batch), by_torch, atol=1e-5)


def test_predicting_leaves_no_identifier_and_no_queue_of_reports(tmp_path, user_state):
    """ONNX Runtime would keep a device identifier and a database of what to send in the user's cache."""
    folder, photos = exported(tmp_path), class_folders(tmp_path / "photos", {"a": 1})
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    command = [sys.executable, "-m", "wasi_edge", "predict", str(folder), str(photos), "--backend", "onnx"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert [path for path in user_state.rglob("*") if path.is_file()] == []


def test_an_exported_model_of_other_weights_is_not_believed(tmp_path):
    folder, heard = exported(tmp_path), []
    write_tiny(folder, seed=1)
    assert isinstance(open_classifier(folder, on_message=heard.append), TorchClassifier)
    assert len(heard) == 1 and "of other weights" in heard[0]
    with pytest.raises(ArtefactError, match="of other weights than those beside it; make it again: wasi-edge export"):
        open_classifier(folder, Backend.ONNX)


def test_an_exported_model_that_cannot_be_used_is_passed_over(tmp_path):
    folder, heard = exported(tmp_path), []
    with open_artefact(folder) as artefact:
        write_onnx(artefact, folder / "model.onnx", with_preprocessing=True)
    assert isinstance(open_classifier(folder, on_message=heard.append), TorchClassifier)
    (folder / "model.onnx").write_bytes(b"half a fi")
    assert isinstance(open_classifier(folder, on_message=heard.append), TorchClassifier)
    assert "prepares photos itself" in heard[0] and "cannot run it" in heard[1]


def test_a_list_that_is_no_text_is_a_list_of_unreadable_photos(tmp_path):
    rows = list(predict_paths(Brightness(), [Path(f"a\0{number}.jpg") for number in range(20)]))
    assert len(rows) == 20 and all("error" in row for row in rows)


def test_a_backend_that_is_not_there_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="wasi-edge export"):
        open_classifier(write_tiny(tmp_path / "other"), Backend.ONNX)
    folder = exported(tmp_path)
    with pytest.raises(UsageError, match="which torch cannot run"):
        open_classifier(folder / "model.onnx", Backend.TORCH)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert isinstance(open_classifier(folder), TorchClassifier)
    with pytest.raises(UsageError, match=r"wasi-edge\[onnxruntime\]"):
        open_classifier(folder, Backend.ONNX)


def test_predicting_on_onnx_runtime_needs_no_torch(tmp_path):
    folder, photo = exported(tmp_path), save_jpeg(tmp_path / "p.jpg", scene(0))
    code = (
        "import sys; from wasi_edge.cli.app import run;"
        f"assert run(['predict', {str(folder)!r}, {str(photo)!r}, '--csv']) == 0;"
        "assert 'onnxruntime' in sys.modules;"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('torch', 'onnx')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# ---- sorting -----------------------------------------------------------------------------------


def test_sorting_copies_never_overwrites_and_may_be_repeated(tmp_path):
    first = save_jpeg(tmp_path / "x" / "IMG.jpg", scene(1))
    second = save_jpeg(tmp_path / "y" / "IMG.jpg", scene(2))
    out = tmp_path / "sorted"
    assert copy_into(out, "cat", first) == out / "cat" / "IMG.jpg"
    assert copy_into(out, "cat", second) == out / "cat" / "IMG-2.jpg"
    assert copy_into(out, "cat", second) == out / "cat" / "IMG-2.jpg"
    assert (out / "cat" / "IMG.jpg").read_bytes() == first.read_bytes()
    assert (out / "cat" / "IMG-2.jpg").read_bytes() == second.read_bytes()
    assert len(list((out / "cat").iterdir())) == 2 and first.exists() and second.exists()


@pytest.mark.parametrize(
    ("label", "name"),
    [("cat", "cat"), ("../x", "_._x"), ("a/b", "a_b"), ("", "_"), (".hidden", "_hidden"), ("x\0y\n", "x_y_"),
     ("grün", "grün"), ("n" * 300, "n" * 100)],
)  # fmt: skip
def test_a_label_becomes_one_folder_name(label, name):
    assert folder_name(label) == name
