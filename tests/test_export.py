"""Exported files: what they compute against the engine, how they are written, what they say of themselves."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from models import TINY
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from photos import save_jpeg, scene
from PIL import Image
from tiny_artefact import LABELS, write_tiny

from wasi_edge.artefact import fingerprint, open_artefact
from wasi_edge.errors import ArtefactError
from wasi_edge.export import check, graph, model
from wasi_edge.export.answers import sample_views
from wasi_edge.export.check import checked_export
from wasi_edge.export.graph import Graph, write_model
from wasi_edge.export.model import write_onnx
from wasi_edge.export.network import between_factors
from wasi_edge.export.preprocessing import add_preprocessing
from wasi_edge.inference.onnx_backend import OnnxClassifier
from wasi_edge.inference.onnx_metadata import OnnxMetadata
from wasi_edge.inference.predict import read_view
from wasi_edge.inference.torch_backend import TorchClassifier
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.geometry_swin import SwinGeometry
from wasi_edge.preprocess import center_view, normalise, shrink
from wasi_edge.preprocessing import Preprocessing

VIT = {"patch_size": 4, "width": 24, "depth": 2, "heads": 3, "mlp_width": 40, "position_grid": 4}
SWIN = {"patch_size": 2, "width": 12, "depths": (2, 3), "stage_heads": (2, 3), "window": 2, "mlp_ratio": 2.0}
# geometry, rank, input size
NETWORKS = {
    "class and mean": (TINY, 6, 16),
    "dense": (TINY, None, 16),
    "class": (ViTGeometry(**VIT, features="class"), 6, 16),
    "class, dense": (ViTGeometry(**VIT, features="class"), None, 16),
    "mean": (ViTGeometry(**VIT, features="mean", class_token=False), 6, 16),
    "mean first": (ViTGeometry(**VIT, features="mean", class_token=False, pool_first=True), 6, 16),
    "registers": (ViTGeometry(**VIT, features="class+mean", registers=3, layer_scale=True), 6, 16),
    "distillation": (ViTGeometry(**VIT, features="class+distillation", registers=1), 6, 16),
    "larger": (TINY, 6, 24),
    "smaller": (TINY, 6, 8),
    "swin": (SwinGeometry(**SWIN), 5, 16),
    "swin, dense": (SwinGeometry(**SWIN), None, 16),
    "swin, larger": (SwinGeometry(**SWIN), 5, 24),
    "swin, one window": (SwinGeometry(**SWIN | {"window": 4}), 5, 16),
    "swin, other windows": (SwinGeometry(**SWIN | {"window": 4}), 5, 12),
}


def run(source, **inputs):
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def without_onnx_runtime(monkeypatch, tmp_path):
    """As if it were not installed, here and in child processes."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys\nsys.modules['onnxruntime'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)


def relative(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.fixture
def tiny(tmp_path):
    return write_tiny(tmp_path / "model")


@pytest.fixture
def exported(tiny, tmp_path):
    with open_artefact(tiny) as artefact:
        write_onnx(artefact, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


# ---- what is computed --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_answers_are_those_of_the_engine(name, tmp_path):
    geometry, rank, size = NETWORKS[name]
    folder = write_tiny(tmp_path / "m", rank, geometry=geometry, preprocessing=Preprocessing(image_size=size))
    out = tmp_path / "m.onnx"
    with open_artefact(folder) as artefact:
        write_onnx(artefact, out)
    onnx.checker.check_model(str(out), full_check=True)
    views = sample_views(size, 3)
    expected = TorchClassifier(folder).logits(views)
    ours = OnnxClassifier(out, 1)
    assert relative(ours.logits(views), expected) < 1e-5
    for view, row in zip(views, expected, strict=True):  # the batch is open
        assert relative(ours.logits(view[None])[0], row) < 1e-5


@pytest.mark.parametrize("name", ["registers", "class", "swin"])
def test_no_operator_is_particular_to_a_runtime(name, tmp_path):
    geometry, rank, size = NETWORKS[name]
    folder = write_tiny(tmp_path / "m", rank, geometry=geometry, preprocessing=Preprocessing(image_size=size))
    with open_artefact(folder) as artefact:
        write_onnx(artefact, tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    views = sample_views(size, 2)
    pixels = normalise(views, Preprocessing(image_size=size))
    found = ReferenceEvaluator(model).run(None, {"pixels": pixels})[0]
    assert relative(found, TorchClassifier(folder).logits(views)) < 1e-5


def test_factors_stay_factors(exported):
    """Two thin products for each linear: no (O, I) matrix is in the file."""
    shapes = {tuple(tensor.dims) for tensor in onnx.load(exported).graph.initializer}
    for out, inner in set(TINY.linear_shapes().values()) | {(TINY.width, TINY.width)}:
        assert (out, inner) not in shapes and (inner, out) not in shapes


def test_what_is_between_factors_may_be_scaled_without_changing_an_answer(tiny, tmp_path):
    rng = np.random.default_rng(0)
    with open_artefact(tiny) as artefact:
        divisors = {
            name: np.exp(rng.normal(size=6)).astype(np.float32) for name in between_factors(artefact.config.linears)
        }
        write_onnx(artefact, tmp_path / "plain.onnx")
        write_onnx(artefact, tmp_path / "scaled.onnx", divisors=divisors)
    views = sample_views(16, 2)
    plain, scaled = (OnnxClassifier(tmp_path / f"{name}.onnx", 1).logits(views) for name in ("plain", "scaled"))
    assert 0 < relative(scaled, plain) < 1e-5
    before, after = (
        {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in onnx.load(tmp_path / f"{name}.onnx").graph.initializer
        }
        for name in ("plain", "scaled")
    )
    for linear, divisor in divisors.items():
        np.testing.assert_allclose(after[f"{linear}.right"] * divisor, before[f"{linear}.right"], rtol=1e-5)


# ---- the file ----------------------------------------------------------------------------------


def test_the_file_is_what_onnx_would_write(tmp_path):
    """The same graph by onnx's own functions, weight by weight; names, shapes and all that is small agree too."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(3, 200)).astype(np.float32), "b": rng.normal(size=200).astype(np.float32)}
    ours = Graph()
    x = ours.input("x", TensorProto.FLOAT, ("batch", 3))
    x = ours.op("MatMul", "y", x, ours.weight("w", (3, 200), lambda: weights["w"]))
    x = ours.op("Add", "z", x, ours.weight("b", (200,), lambda: weights["b"]))
    ours.output(x, TensorProto.FLOAT, ("batch", 200))
    buffer = io.BytesIO()
    write_model(buffer, ours, {"key": "värde"})
    model = onnx.load_from_string(buffer.getvalue())
    theirs = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="y"), helper.make_node("Add", ["y", "b"], ["z"], name="z")],
        "wasi-edge",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", 3))],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ("batch", 200))],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    assert model.graph == theirs
    assert {entry.key: entry.value for entry in model.metadata_props} == {"key": "värde"}
    assert len(model.SerializeToString()) == len(buffer.getvalue())


def test_one_weight_at_a_time_is_in_memory(tmp_path, monkeypatch):
    alive = []

    def load():
        alive.append(1)
        assert len(alive) == 1
        return np.zeros((4, 4), np.float32)

    class File(io.BytesIO):
        def write(self, data):
            alive.clear()
            return super().write(data)

    ours = Graph()
    x = ours.input("x", TensorProto.FLOAT, (4, 4))
    for number in range(5):
        x = ours.op("MatMul", f"y{number}", x, ours.weight(f"w{number}", (4, 4), load))
    write_model(File(), ours, {})


def test_what_does_not_fit_the_format_is_refused_before_it_is_written(monkeypatch):
    ours = Graph()
    ours.weight("w", (2**15, 2**15), lambda: pytest.fail("read though the file cannot hold it"))
    buffer = io.BytesIO()
    with pytest.raises(ArtefactError, match=r"4\.3 GB, an ONNX file may have 2"):
        write_model(buffer, ours, {})
    assert buffer.getvalue() == b""


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**31 - 1])
def test_lengths_are_written_as_protocol_buffers_do(number):
    from onnx import IntIntListEntryProto

    assert IntIntListEntryProto(key=number).SerializeToString() == b"\x08" + graph._varint(number)


def test_metadata_is_enough_to_predict_with(tiny, exported, tmp_path):
    with open_artefact(tiny) as artefact:
        weights, config = fingerprint(artefact), artefact.config
    metadata = OnnxClassifier(exported, 1).metadata
    assert metadata.labels == LABELS
    assert metadata.preprocessing == config.preprocessing
    assert metadata.weights == weights
    assert metadata.provenance == dict(config.provenance)
    assert OnnxMetadata.from_properties(metadata.to_properties(), "x") == metadata
    changed = dataclasses.replace(metadata, quantisation={"cpu": "AVX2"}, includes_preprocessing=True)
    assert OnnxMetadata.from_properties(changed.to_properties(), "x") == changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.clear(), "was not made by wasi-edge"),
        (lambda p: p.update(labels="[1"), "metadata is damaged"),
        (lambda p: p.pop("weights"), "metadata is damaged"),
        (lambda p: p.update(wasi_edge_schema="99"), "newer wasi-edge"),
    ],
)
def test_files_of_others_and_damaged_ones_are_explained(change, message):
    properties = OnnxMetadata(("a",), Preprocessing(), "w").to_properties()
    change(properties)
    with pytest.raises(ArtefactError, match=message):
        OnnxMetadata.from_properties(properties, "m.onnx")


@pytest.mark.parametrize("content", [b"", b"no model", os.urandom(3000)])
def test_a_file_that_is_no_model_is_one_sentence(content, tmp_path):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"m\.onnx: ONNX Runtime cannot run it"):
        OnnxClassifier(tmp_path / "m.onnx", 1)


def test_the_fingerprint_changes_with_any_tensor_and_not_with_the_place(tiny, tmp_path):
    def of(folder):
        with open_artefact(folder) as artefact:
            return fingerprint(artefact)

    copy, other = write_tiny(tmp_path / "copy"), write_tiny(tmp_path / "other", seed=1)
    relabelled = write_tiny(tmp_path / "relabelled", labels=("a", "b", "c"))
    assert of(copy) == of(tiny)
    assert len({of(tiny), of(other), of(relabelled)}) == 3
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tiny / "model.safetensors")
    for name in tensors:
        changed = {**tensors, name: tensors[name] + np.float32(0.001)}
        save_file(changed, copy / "model.safetensors")
        assert of(copy) != of(tiny), name


# ---- the check ---------------------------------------------------------------------------------


def test_export_says_how_far_it_is_from_torch(tiny, tmp_path):
    with open_artefact(tiny) as artefact:
        found = checked_export(artefact, tmp_path / "m.onnx")
    assert 0 < found.difference < 1e-5
    assert found.by == "ONNX Runtime"


def test_without_onnx_runtime_onnx_itself_compares(tiny, tmp_path, monkeypatch):
    without_onnx_runtime(monkeypatch, tmp_path)
    with open_artefact(tiny) as artefact:
        found = checked_export(artefact, tmp_path / "m.onnx")
        assert found.by == "onnx's reference evaluator" and 0 < found.difference < 1e-5
        monkeypatch.setattr(check, "_LARGEST_FOR_REFERENCE", 1000)
        found = checked_export(artefact, tmp_path / "m.onnx")
    assert found.difference is None and "wasi-edge[onnxruntime]" in found.reason


def test_a_file_that_answers_otherwise_is_not_left_behind(tiny, tmp_path, monkeypatch):
    out = tmp_path / "m.onnx"
    out.write_bytes(b"the one before")
    answers = check.answers_of
    monkeypatch.setattr(
        check, "answers_of", lambda kind, *rest: answers(kind, *rest) + (0.1 if kind == "onnx" else 0.0)
    )
    with open_artefact(tiny) as artefact, pytest.raises(ArtefactError, match="its answers differ"):
        checked_export(artefact, out)
    assert out.read_bytes() == b"the one before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "model"]


def test_preprocessing_that_goes_wrong_is_found(tiny, tmp_path, monkeypatch):
    right = model.add_preprocessing

    def other(graph, preprocessing, photos):
        return right(graph, dataclasses.replace(preprocessing, mean=(0.9, 0.1, 0.9)), photos)

    monkeypatch.setattr(model, "add_preprocessing", other)
    with open_artefact(tiny) as artefact, pytest.raises(ArtefactError, match="its answers differ"):
        checked_export(artefact, tmp_path / "p.onnx", with_preprocessing=True)
    assert not (tmp_path / "p.onnx").exists()


def test_no_room_for_a_second_process_is_said(tiny, tmp_path):
    with open_artefact(tiny) as artefact:
        found = check.export_beside(artefact, tmp_path / "m.onnx", sample_views(16, 1), np.zeros((1, 3)), 2**20)
    assert found.difference is None and "no room" in found.reason
    assert OnnxClassifier(tmp_path / "m.onnx", 1).labels == list(LABELS)


def test_a_child_that_fails_is_one_sentence(tmp_path):
    with pytest.raises(ArtefactError, match=r"could not be run by torch: .*does not exist"):
        check.answers_of("torch", tmp_path / "nowhere", sample_views(16, 1))


def test_a_model_without_a_classifier_says_what_to_do(tmp_path):
    folder = write_tiny(tmp_path / "backbone", labels=None)
    with open_artefact(folder) as artefact, pytest.raises(ArtefactError, match="wasi-edge finetune PHOTOS --model"):
        write_onnx(artefact, tmp_path / "m.onnx")


# ---- preprocessing within the graph ------------------------------------------------------------


@pytest.mark.parametrize("size", [(97, 64), (64, 97), (300, 40), (41, 300), (48, 48), (640, 481)])
@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(32, 1.0),
        Preprocessing(32, 0.8, "bilinear"),
        Preprocessing(29, 0.9, even_offset=True),
        Preprocessing(32, 1.0, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), squash=True),
    ],
    ids=["bicubic", "bilinear", "even", "squash"],
)
def test_photos_come_out_as_pillow_prepares_them(preprocessing, size):
    """The middle is the same to the pixel: noise, where one pixel's shift would show in every value."""
    ours = Graph()
    photos = ours.input("photos", TensorProto.UINT8, ("batch", "height", "width", 3))
    pixels = add_preprocessing(ours, preprocessing, photos)
    ours.output(pixels, TensorProto.FLOAT, ("batch", 3, preprocessing.image_size, preprocessing.image_size))
    buffer = io.BytesIO()
    write_model(buffer, ours, {})
    pictures = np.random.default_rng(1).integers(80, 176, (2, size[1], size[0], 3), dtype=np.uint8)
    views = [center_view(shrink(Image.fromarray(picture), preprocessing), preprocessing) for picture in pictures]
    expected = normalise(np.stack(views), preprocessing)
    off = np.abs(run(buffer.getvalue(), photos=pictures) - expected)
    off *= 255 * np.array(preprocessing.std, np.float32).reshape(3, 1, 1)
    assert off.max() < 3.1 and off.mean() < 0.3  # of 255: Pillow rounds once more, between the two directions


def test_an_interpolation_that_onnx_lacks_is_refused(tmp_path):
    folder = write_tiny(tmp_path / "m", preprocessing=Preprocessing(16, interpolation="lanczos"))
    with open_artefact(folder) as artefact:
        write_onnx(artefact, tmp_path / "m.onnx")
        with pytest.raises(ArtefactError, match=r"'lanczos'.*export without --with-preprocessing"):
            write_onnx(artefact, tmp_path / "p.onnx", with_preprocessing=True)
    assert not (tmp_path / "p.onnx").exists()


def test_the_whole_way_from_photo_to_probabilities_is_checked(tiny, tmp_path):
    out = tmp_path / "p.onnx"
    with open_artefact(tiny) as artefact:
        found = checked_export(artefact, out, with_preprocessing=True)
    assert found.difference < 1e-5
    onnx.checker.check_model(str(out), full_check=True)
    found = run(str(out), photos=sample_views(40, 2))
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    with pytest.raises(ArtefactError, match="prepares photos itself"):
        OnnxClassifier(out, 1)


def test_one_photo_has_one_label_whatever_computes_it(tiny, exported, tmp_path):
    """torch, ONNX Runtime, the graph that prepares photos, and the photo lying on its side with a note in its EXIF."""
    with open_artefact(tiny) as artefact:
        write_onnx(artefact, tmp_path / "p.onnx", with_preprocessing=True)
    by_torch, by_onnx = TorchClassifier(tiny), OnnxClassifier(exported, 1)
    for seed in range(6):
        upright = save_jpeg(tmp_path / f"{seed}.jpg", scene(seed, 96, 64), quality=98, subsampling=0)
        exif = Image.Exif()
        exif[0x0112] = 6
        with Image.open(upright) as picture:
            lying = picture.transpose(Image.Transpose.ROTATE_90)
            photo = np.asarray(picture.convert("RGB"))
        lying.save(tmp_path / f"{seed}-lying.png", exif=exif)
        view = read_view(upright, by_torch.preprocessing)[None]
        turned = read_view(tmp_path / f"{seed}-lying.png", by_torch.preprocessing)[None]
        answers = {
            int(found.argmax())
            for found in (
                by_torch.logits(view),
                by_onnx.logits(view),
                by_onnx.logits(turned),
                by_torch.logits(turned),
                run(str(tmp_path / "p.onnx"), photos=photo[None]),
            )
        }
        assert len(answers) == 1


def test_json_is_valid_in_every_property(exported):
    properties = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    assert json.loads(properties["labels"]) == list(LABELS)
    assert json.loads(properties["preprocessing"])["image_size"] == 16
