"""`wasi-edge convert` on a small dense model: what it writes and refuses; a failure leaves nothing."""

from __future__ import annotations

import json

import pytest
import torch  # before the command line, whose settings for a fresh process must not reach this one
from models import TINY
from photos import class_folders, save_jpeg, scene, truncated_jpeg
from tiny_artefact import LABELS, write_tiny

from wasi_edge.artefact import open_artefact, read_config
from wasi_edge.cli.app import run
from wasi_edge.conversion.budget import MOST_PHOTOS, calibration_photos, conversion_bytes
from wasi_edge.conversion.calibration import CalibrationPhotos
from wasi_edge.errors import BudgetInfeasible, NoUsableData
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.preprocessing import Preprocessing

VIT_S = ViTGeometry(patch_size=14, width=384, depth=12, heads=6, mlp_width=1536, position_grid=37, layer_scale=True)
LARGE = 2**30


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads would wait for each other longer than these matrices take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def dense(tmp_path):
    return str(write_tiny(tmp_path / "dense", rank=None))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_a_dense_model_into_factors(dense, out, capsys):
    assert run(["convert", dense, str(out), "--epsilon", "0.5", "--dtype", "float16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    config = read_config(out)
    assert result["status"] == "completed" and result["out"] == str(out) and result["epsilon"] == 0.5
    assert result["ranks"] == dict(config.linears) and any(result["ranks"].values())
    assert result["stored_parameters"] < result["dense_parameters"]
    assert result["file_bytes"] == (out / "model.safetensors").stat().st_size
    assert result["peak_rss_bytes"] > 0 and result["calibration_photos"] == 0
    assert config.dtype == "float16" and config.epsilon == 0.5 and config.labels == list(LABELS)
    with open_artefact(out) as artefact:
        assert artefact.tensors.stored_dtype("blocks.0.fc1.bias") == "F16"


def test_a_person_reads_ranks_share_and_size(dense, out, capsys):
    assert run(["convert", dense, str(out), "--epsilon", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "rank by block" in text and "stored share" in text and "file" in text


def test_converting_again_at_the_same_epsilon_keeps_the_ranks(out, tmp_path):
    own = write_tiny(tmp_path / "own", rank=4, epsilon=0.6)
    assert run(["convert", str(own), str(out)]) == 0
    assert all(rank is not None and rank <= 4 for rank in read_config(out).linears.values())


@pytest.mark.parametrize(("epsilon", "says"), [("0.6", True), ("0.5", False)])
def test_what_a_model_in_factors_has_lost_is_said_to_be_gone(out, tmp_path, capsys, epsilon, says):
    own = write_tiny(tmp_path / "own", rank=4, epsilon=0.6)
    class_folders(tmp_path / "photos", {"a": 9, "b": 9})
    assert run(["convert", str(own), str(out), "--calibrate", str(tmp_path / "photos"), "--epsilon", epsilon]) == 0
    assert ("brings nothing back" in capsys.readouterr().err) is says


def test_the_default_epsilon_is_0_8_or_the_models_own(dense, out, tmp_path):
    assert run(["convert", dense, str(out)]) == 0
    assert read_config(out).epsilon == 0.8
    own = write_tiny(tmp_path / "own", rank=4, epsilon=0.6)
    assert run(["convert", str(own), str(tmp_path / "again")]) == 0
    assert read_config(tmp_path / "again").epsilon == 0.6


@pytest.mark.parametrize("sorted_into_classes", [True, False])
def test_calibration_takes_any_folder_of_photos(dense, out, tmp_path, capsys, sorted_into_classes):
    photos = tmp_path / "photos"
    if sorted_into_classes:
        class_folders(photos, {"a": 3, "b": 2})
    else:
        for index in range(5):
            save_jpeg(photos / f"{index}.jpg", scene(index))
    (photos / "Thumbs.db").write_bytes(b"")
    truncated_jpeg(photos / "cut.jpg")
    words = [
        "--calibrate",
        str(photos),
        "--epsilon",
        "0.5",
        "--image-size",
        "20",
        "--budget",
        "1GB",
        "--json",
    ]
    assert run(["convert", dense, str(out), *words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["calibration_photos"] == 6 and result["image_size"] == 20
    assert [entry["reason"][:9] for entry in result["skipped_files"]] == ["truncated"]
    config = read_config(out)
    assert config.preprocessing.image_size == 20 and config.provenance["calibration_photos"] == 6


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{dense}", "{full}"], 2, "is not empty"),
        (["{dense}", "{full}/file"], 2, "is a file"),
        (["{dense}", "{out}", "--epsilon", "0"], 2, "--epsilon must be above 0"),
        (["{own}", "{out}", "--epsilon", "0.9"], 2, "above the 0.6"),
        (["{dense}", "{out}", "--image-size", "30"], 2, "multiple of the model's 4-pixel patches"),
        (["{dense}", "{out}", "--dtype", "int8"], 2, "--dtype"),
        (["{dense}", "{out}", "--budget", "64MB"], 3, "try --budget"),
        (["{dense}", "{out}", "--calibrate", "{empty}"], 4, "no photos found"),
        (["{dense}", "{out}", "--calibrate", "{bad}", "--budget", "1GB"], 4, "no photo to calibrate on"),
        (["{empty}", "{out}"], 1, "holds no config.json"),
        (["{torn}", "{out}"], 1, "cut short"),
    ],
)  # fmt: skip
def test_refusals_leave_nothing_behind(arguments, code, message, dense, out, tmp_path, capsys):
    places = {name: tmp_path / name for name in ("full", "empty", "bad", "own", "torn")}
    for name in ("full", "empty", "bad"):
        places[name].mkdir()
    (places["full"] / "file").write_text("mine")
    truncated_jpeg(places["bad"] / "cut.jpg")
    write_tiny(places["own"], rank=4, epsilon=0.6)
    write_tiny(places["torn"], rank=None)
    tensors = places["torn"] / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    words = [word.format(dense=dense, out=out, **places) for word in arguments]
    assert run(["convert", *words, "--json"]) == code
    captured = capsys.readouterr()
    assert message in json.loads(captured.out)["error"]
    assert not out.exists()
    assert [path.name for path in places["full"].iterdir()] == ["file"]


def test_the_smallest_budget_that_is_named_is_accepted(dense, out, tmp_path, capsys):
    class_folders(tmp_path / "photos", {"a": 2, "b": 2})
    words = ["convert", dense, str(out), "--calibrate", str(tmp_path / "photos"), "--json"]
    assert run([*words, "--budget", "64MB"]) == 3
    smallest = json.loads(capsys.readouterr().out)["smallest_feasible_budget_bytes"]
    assert run([*words, "--budget", str(smallest - 2**20)]) == 3
    capsys.readouterr()
    assert run([*words, "--budget", str(smallest)]) == 0


def test_as_many_photos_calibrate_as_the_budget_allows():
    with pytest.raises(BudgetInfeasible, match="16 calibration photos") as refused:
        calibration_photos(VIT_S, 224, 1000, 300 * 2**20)
    smallest = refused.value.smallest_feasible_budget_bytes
    assert smallest is not None and calibration_photos(VIT_S, 224, 1000, smallest) >= 16
    some = calibration_photos(VIT_S, 224, 1000, 430 * 2**20)
    assert 16 < some < MOST_PHOTOS
    assert conversion_bytes(VIT_S, 224, some) <= 430 * 2**20 < conversion_bytes(VIT_S, 224, some + 1)
    assert calibration_photos(VIT_S, 224, 1000, LARGE) == MOST_PHOTOS
    assert calibration_photos(VIT_S, 224, 7, LARGE) == 7
    assert calibration_photos(TINY, 16, 0, LARGE) == 0


def test_photos_that_cannot_calibrate_are_replaced(tmp_path):
    paths = [save_jpeg(tmp_path / f"{index}.jpg", scene(index)) for index in range(4)]
    truncated_jpeg(paths[2])
    photos = CalibrationPhotos(paths, 2, Preprocessing(image_size=16), 2**30)
    assert [photos.read(index).shape for index in range(2)] == [(16, 16, 3)] * 2
    assert list(photos.skipped) == [paths[2]]
    all_of_them = CalibrationPhotos([paths[2], *paths[:2]], 3, Preprocessing(image_size=16), 2**30)
    assert [all_of_them.read(index).shape for index in range(3)] == [(16, 16, 3)] * 3
    poor = CalibrationPhotos(paths, 2, Preprocessing(image_size=16), 2**20)
    with pytest.raises(NoUsableData, match="the budget leaves 1 MB"):
        poor.read(0)
