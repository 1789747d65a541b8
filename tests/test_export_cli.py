"""`wasi-edge export` and the model.onnx of a run, from outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from photos import save_jpeg, scene
from test_finetune import command, render, run
from tiny_artefact import write_tiny

from wasi_edge.artefact import open_artefact
from wasi_edge.errors import ArtefactError, NoUsableData
from wasi_edge.export import int8
from wasi_edge.export.photos import Photo, RunPhotos, read_run_photos, write_run_photos
from wasi_edge.inference.onnx_backend import OnnxClassifier
from wasi_edge.inference.sorting import copy_into, link_into
from wasi_edge.memory.hardware import integer_instructions


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on coloured photos: (its folder, the photos, its report)."""
    root = tmp_path_factory.mktemp("finished")
    photos = render(root / "photos", per_class=12)
    model = write_tiny(root / "model", rank=6)
    done = run(
        "finetune", photos, "--model", model, "--out", root / "run", "--epochs", 1, "--budget", "600MB", "--json"
    )
    assert done.returncode == 0, done.stderr
    return root / "run", photos, json.loads(done.stdout)


# ---- a run's own file --------------------------------------------------------------------------


def test_a_run_leaves_a_checked_onnx_file(finished):
    out, photos, report = finished
    assert report["onnx"]["file"] == "model.onnx"
    assert report["onnx"]["bytes"] == (out / "model.onnx").stat().st_size
    # a tiny network's plan may have no room for a second process; then that is said
    assert report["onnx"]["logit_difference"] is None or report["onnx"]["logit_difference"] < 1e-4
    assert json.loads((out / "report.json").read_text()) == report
    assert report["peak_rss_bytes"] <= report["planned_peak_rss_bytes"]
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    answers = {}
    for backend in ("onnx", "torch"):
        done = run("predict", out, photos, "--backend", backend, "--json")
        answers[backend] = [(row["path"], row["label"]) for row in json.loads(done.stdout)]
    assert answers["onnx"] == answers["torch"] and len(answers["onnx"]) == 24


def test_a_run_notes_its_photos_by_part(finished):
    out, photos, report = finished
    parts = read_run_photos(out)
    assert (len(parts.train), len(parts.val)) == (report["num_train_images"], report["num_val_images"])
    found = {photo.path for photo in [*parts.train, *parts.val]}
    assert found == set(photos.rglob("*.png"))
    assert all(photo.path.parent.name == photo.label for photo in [*parts.train, *parts.val])


# ---- the command -------------------------------------------------------------------------------


def test_the_contracts_keys(finished, tmp_path):
    out, _, _ = finished
    done = run("export", out, tmp_path / "new" / "m.onnx", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "completed" and result["int8"] is None
    assert result["file_bytes"] == (tmp_path / "new" / "m.onnx").stat().st_size
    assert result["logit_difference"] < 1e-5 and result["compared_by"] == "ONNX Runtime"
    assert result["peak_rss_bytes"] > 50 * 2**20
    shown = run("export", out, tmp_path / "p.onnx", "--with-preprocessing").stdout
    assert "difference to torch" in shown and "opset 18" in shown


def test_eight_bits_are_measured_on_the_runs_own_photos(finished, tmp_path):
    out, _, report = finished
    done = run("export", out, tmp_path / "m.onnx", "--int8", "--max-drop", 1, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["int8"]
    assert found["num_val_images"] == report["num_val_images"]
    assert found["accuracy_before"] == pytest.approx(report["best_val_accuracy"])
    assert 0 <= found["accuracy_after"] <= 1 and found["ms_after"] > 0
    classifier = OnnxClassifier(tmp_path / "m.onnx", 1)
    assert classifier.metadata.quantisation["accuracy_after"] == found["accuracy_after"]
    operators = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert "MatMulInteger" in operators and "DynamicQuantizeLinear" in operators
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    # predict takes it, too
    row = json.loads(run("predict", tmp_path / "m.onnx", out.parent / "photos" / "red" / "0.png", "--json").stdout)[0]
    assert row["label"] in report["classes"]


def test_eight_bits_with_preprocessing_take_photos(finished, tmp_path):
    out, _, _ = finished
    options = ("--int8", "--max-drop", 1, "--with-preprocessing", "--json")
    done = run("export", out, tmp_path / "m.onnx", *options)
    assert done.returncode == 0, done.stderr
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    photos = np.random.default_rng(0).integers(0, 256, (2, 40, 30, 3), dtype=np.uint8)
    np.testing.assert_allclose(session.run(None, {"photos": photos})[0].sum(1), 1, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("{run}", "m.bin"), 2, "ends in .onnx"),
        (("{run}", "m.onnx", "--max-drop", "7"), 2, "--max-drop must be between 0 and 1"),
        (("{run}", "m.onnx", "--photos", "x"), 2, "--photos goes with --int8"),
        (("nowhere", "m.onnx"), 1, "no such model"),
        (("{model}", "m.onnx", "--int8"), 4, "only a run of `finetune` does"),
        (("{run}", "m.onnx", "--int8", "--photos", "elsewhere"), 4, "say where they are now: --photos DIR"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_leaves_no_file(finished, tmp_path, arguments, code, message):
    places = {"run": finished[0], "model": finished[0].parent / "model"}
    words = [word.format(**places) for word in arguments]
    done = subprocess.run(command("export", *words), capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_onnx_runtime_is_named_where_it_is_missing(finished, tmp_path):
    code = (
        "import sys; sys.modules['onnxruntime'] = None; from wasi_edge.cli.app import run;"
        f"sys.exit(run(['export', {str(finished[0])!r}, {str(tmp_path / 'm.onnx')!r}, '--int8']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and 'pip install "wasi-edge[onnxruntime]"' in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- eight bits --------------------------------------------------------------------------------


def record(before, after, photos=130):
    return {"accuracy_before": before, "accuracy_after": after, "num_val_images": photos}


@pytest.mark.parametrize(
    ("before", "after", "photos", "max_drop", "is_refused"),
    [
        (0.90, 0.90, 1000, 0.01, False),
        (0.90, 0.89, 1000, 0.01, False),
        (0.90, 0.888, 1000, 0.01, True),
        (0.90, 0.888, 1000, 0.02, False),
        (110 / 130, 108 / 130, 130, 0.01, False),  # two photos are 1.5 points
        (110 / 130, 107 / 130, 130, 0.01, True),
        (110 / 130, 108 / 130, 130, 0.0, False),
        (0.5, 0.9, 10, 0.0, False),
    ],
)
def test_more_than_the_allowed_drop_and_two_photos_is_refused(before, after, photos, max_drop, is_refused):
    if is_refused:
        with pytest.raises(ArtefactError, match="export without --int8, or allow it with --max-drop"):
            int8._refuse(record(before, after, photos), max_drop)
    else:
        int8._refuse(record(before, after, photos), max_drop)


def test_a_refused_file_is_not_left_behind(finished, tmp_path, monkeypatch):
    out = tmp_path / "m.onnx"
    out.write_bytes(b"the one before")
    monkeypatch.setattr(int8, "_measured", lambda *_: record(1.0, 0.5))
    with open_artefact(finished[0]) as artefact, pytest.raises(ArtefactError, match="more is lost"):
        int8.write_int8(artefact, out, read_run_photos(finished[0]), 0.01, False, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"] and out.read_bytes() == b"the one before"


def test_ranges_between_factors_are_evened_out(finished, tmp_path):
    """Of the values between two factors, the largest of each channel are closer to one another than before."""
    with open_artefact(finished[0]) as artefact:
        photos = read_run_photos(finished[0]).train
        divisors = int8._divisors(artefact, tmp_path / "p.onnx", photos, 1)
        assert set(divisors) == set(artefact.config.linears)
        for linear, divisor in divisors.items():
            assert divisor.shape == (artefact.config.linears[linear],)
            assert np.log(divisor).mean() == pytest.approx(0, abs=1e-4)  # the whole keeps its size


# ---- photos of a run ---------------------------------------------------------------------------


def test_photos_may_have_moved_or_gone(tmp_path):
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        save_jpeg(tmp_path / "old" / name, scene(0, 32, 32))
    root, run_folder = tmp_path / "old", tmp_path / "run"
    run_folder.mkdir()
    train = [Photo(root / "a/1.jpg", "a"), Photo(root / "a/2.jpg", "a")]
    write_run_photos(run_folder, root, train, [Photo(root / "b/1.jpg", "b")])
    assert read_run_photos(run_folder) == RunPhotos(train, [Photo(root / "b/1.jpg", "b")])
    shutil.move(root, tmp_path / "new")
    with pytest.raises(NoUsableData, match="--photos DIR"):
        read_run_photos(run_folder)
    moved = read_run_photos(run_folder, tmp_path / "new")
    assert moved.val == [Photo(tmp_path / "new" / "b/1.jpg", "b")]
    (tmp_path / "new" / "a/1.jpg").unlink()
    assert len(read_run_photos(run_folder, tmp_path / "new").train) == 1


@pytest.mark.parametrize(
    "text", ["{}", '{"root": 3, "train": [], "val": []}', '{"root": "x", "train": [1], "val": []}']
)
def test_a_damaged_list_of_photos_is_one_sentence(tmp_path, text):
    (tmp_path / "photos.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"photos\.json is damaged"):
        read_run_photos(tmp_path)


def test_a_root_named_with_dots_is_the_same_root(tmp_path):
    photo = save_jpeg(tmp_path / "photos" / "a" / "1.jpg", scene(0, 32, 32))
    (tmp_path / "x").mkdir()
    write_run_photos(tmp_path, tmp_path / "x" / ".." / "photos", [Photo(photo, "a")], [Photo(photo, "a")])
    assert read_run_photos(tmp_path).val == [Photo(photo, "a")]


# ---- small things ------------------------------------------------------------------------------


def test_links_go_beside_what_is_there(tmp_path):
    photo, other = save_jpeg(tmp_path / "a" / "x.jpg", scene(0)), save_jpeg(tmp_path / "b" / "x.jpg", scene(1))
    first = link_into(tmp_path / "sorted", "cat", photo)
    assert first.is_symlink() and first.resolve() == photo.resolve()
    assert link_into(tmp_path / "sorted", "cat", photo) == first
    second = link_into(tmp_path / "sorted", "cat", other)
    assert second.name == "x-2.jpg" and second.resolve() == other.resolve()


def test_a_link_is_no_copy(tmp_path):
    """Sorted as links once and as copies later: whoever then empties the inbox keeps the copies."""
    photo = save_jpeg(tmp_path / "inbox" / "x.jpg", scene(0))
    link = link_into(tmp_path / "sorted", "cat", photo)
    copy = copy_into(tmp_path / "sorted", "cat", photo)
    assert copy != link and not copy.is_symlink() and copy.read_bytes() == photo.read_bytes()
    assert copy_into(tmp_path / "sorted", "cat", photo) == copy


def test_predict_links_where_it_is_asked_to(finished, tmp_path):
    out, photos, _ = finished
    done = run("predict", out, photos, "--sort-into", tmp_path / "s", "--link", "--json")
    rows = json.loads(done.stdout)
    assert len(rows) == 24 and {path.resolve() for path in (tmp_path / "s").rglob("*.png")} == set(
        path.resolve() for path in photos.rglob("*.png")
    )
    done = run("predict", out, photos, "--link")
    assert done.returncode == 2 and "--sort-into" in done.stderr


def test_evaluate_leaves_a_page(finished, tmp_path):
    out, photos, _ = finished
    done = run("evaluate", out, photos, "--out", tmp_path / "e", "--json")
    result = json.loads(done.stdout)
    kept = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert result["accuracy"] == kept["accuracy"] and kept["photos"] == str(photos)
    page = (tmp_path / "e" / "report.html").read_text(encoding="utf-8")
    assert "recognised" in page and "data:image/jpeg;base64," in page
    wrong = round(24 * (1 - result["accuracy"]))
    assert len(result["most_wrong"]) == min(10, wrong) and sum(c["count"] for c in result["most_confused"]) == wrong
    again = run("evaluate", out, photos, "--out", tmp_path / "e")
    assert again.returncode == 2 and "is not empty" in again.stderr
    assert result["num_trained_on"] == finished[2]["num_train_images"] and "were trained on" in done.stderr
    shutil.copytree(photos, tmp_path / "others")
    others = json.loads(run("evaluate", out, tmp_path / "others", "--json").stdout)
    assert others["num_trained_on"] == 0


def test_evaluate_survives_names_that_are_no_text(finished, tmp_path):
    out, photos, _ = finished
    shutil.copytree(photos, tmp_path / "p")
    for number, path in enumerate((tmp_path / "p" / "red").iterdir()):  # red ones in green, so that some are wrong
        os.rename(os.fsencode(path), os.fsencode(tmp_path / "p" / "green") + b"/caf\xe9-%d.png" % number)
    done = run("evaluate", out, tmp_path / "p", "--out", tmp_path / "e", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["most_wrong"]
    assert (tmp_path / "e" / "report.html").exists() and (tmp_path / "e" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("flags\t\t: fpu avx2 avx512_vnni", "AVX-512 VNNI"),
        ("flags\t\t: fpu avx2", "AVX2, without VNNI"),
        ("Features\t: fp asimd asimddp", "dot product"),
        ("Features\t: fp asimd", "NEON, without dot product"),
        ("", None),
    ],
)
def test_what_the_cpu_has_for_integers(text, found, tmp_path):
    (tmp_path / "cpuinfo").write_text(text)
    assert integer_instructions(tmp_path) == found
