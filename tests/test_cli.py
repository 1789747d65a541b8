"""The command line: exit codes, one JSON value on stdout whatever happens, nothing heavy before it is needed.

`run` is the console script without `sys.exit`; what only a process can show is asked of a process.
"""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys

import pytest
import torch  # noqa: F401  settings that come before torch must not change this process
from photos import class_folders, save_jpeg, scene, truncated_jpeg
from rich.console import Console
from tiny_artefact import LABELS, write_tiny

import wasi_edge
import wasi_edge.training.run as training_run
from wasi_edge.cli.app import run
from wasi_edge.cli.progress import RemainingTime, RichEvents, epoch_line
from wasi_edge.errors import BudgetInfeasible, Interrupted, NoUsableData
from wasi_edge.method import Method, Optimizer

REPORT = {
    "status": "completed", "model": "tiny", "method": "wasi", "classes": ["a", "b"], "num_val_images": 10,
    "best_val_accuracy": 0.9, "budget_bytes": 512 * 2**20, "peak_rss_bytes": 400 * 2**20, "epochs_run": 2,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    return str(write_tiny(tmp_path / "model"))


@pytest.fixture
def photos(tmp_path):
    return class_folders(tmp_path / "photos", {"cat": 2, "dog": 1})


@pytest.fixture
def finetuned(tmp_path, monkeypatch):
    """Requests that reach training, whose run is replaced by `REPORT`; the current folder is empty."""
    requests = []

    def pretend(request, events):
        requests.append(request)
        events.message("pretending")
        events.planned({"epochs": 2}, request.budget_bytes, 400 * 2**20, 60.0)
        events.stage("epoch 1 of 2", 4)
        events.advance(4, "loss 0.5")
        events.epoch({"epoch": 1, "val_accuracy": 0.9, "train_loss": 0.5, "seconds": 30.0})
        return dict(REPORT)

    monkeypatch.setattr(training_run, "finetune", pretend)
    monkeypatch.setattr(
        training_run, "plan_run", lambda request, events: {**pretend(request, events), "status": "planned"}
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return requests


def in_process(*arguments, **options):
    code = "import sys; from wasi_edge.cli.app import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, **options
    )


# ---- the frame ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 0, "finetune"),
        (["--help"], 0, "evaluate"),
        (["finetune", "--help"], 0, "--checkpoint-every"),
        (["--version"], 0, wasi_edge.__version__),
        (["fine"], 2, "No such command"),
        (["finetune"], 2, "PHOTOS"),
        (["finetune", ".", "--no-such-flag"], 2, "--no-such-flag"),
        (["finetune", ".", "--method", "qlora"], 2, "--method"),
        (["finetune", ".", "--budget", "lots"], 2, "'lots' is not a size"),
        (["finetune", ".", "--max-time", "soon"], 2, "'soon' is not a duration"),
        (["finetune", ".", "--epsilon", "1.5"], 2, "--epsilon must be above 0"),
        (["finetune", ".", "--val-split", "1"], 2, "--val-split must be at least 0"),
        (["finetune", ".", "--lr", "0"], 2, "--lr must be above 0"),
        (["finetune", ".", "--epochs", "0"], 2, "--epochs"),
        (["finetune", ".", "--nice", "40"], 2, "--nice"),
        (["predict", "nowhere", "a.jpg"], 1, "no such model"),
        (["predict", "{model}"], 2, "PATH"),
        (["predict", "{model}", "none.jpg"], 4, "none of the 1 photos"),
        (["predict", "{model}", "{empty}"], 4, "no photos found"),
        (["predict", "{model}", "a.jpg", "--csv", "--json"], 2, "choose one"),
        (["predict", "{model}", "a.jpg", "--threshold", "2"], 2, "--threshold must be between"),
        (["predict", "{model}", "a.jpg", "--backend", "onnx"], 2, "wasi-edge export"),
        (["predict", "{model}", "a.jpg", "--backend", "tpu"], 2, "--backend"),
        (["evaluate", "{model}", "{empty}"], 4, "no usable photos"),
        (["evaluate", "{model}", "nowhere"], 4, "no such folder"),
        (["info", "{empty}"], 1, "holds no config.json"),
    ],
)  # fmt: skip
def test_exit_codes_and_messages(arguments, code, message, model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    words = [word.format(model=model, empty=tmp_path / "empty") for word in arguments]
    assert run(words) == code
    out, err = capsys.readouterr()
    assert message in (err if code else out)
    if code and "--json" not in words:
        assert err.startswith("error: ")
        assert run([*words, "--json"]) == code  # the same with --json: one value, on stdout
        failed = json.loads(capsys.readouterr().out)
        assert failed["status"] == "failed" and message in failed["error"]


def test_json_after_a_double_dash_is_a_file_name(model, capsys):
    assert run(["predict", model, "--", "--json"]) == 4
    out, err = capsys.readouterr()
    assert "could not be read" in out and "none of the 1 photos" in err


def test_help_imports_nothing_heavy():
    heavy = ("torch", "numpy", "PIL", "rich", "psutil")
    code = (
        "import sys\nfrom wasi_edge.cli.app import run\nassert run(['--help']) == 0\n"
        "assert run(['predict', '--help']) == 0\n"
        f"sys.exit(str([name for name in {heavy!r} if name in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "\n") and "finetune" in done.stdout


def test_the_entry_point_from_outside(model):
    done = in_process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"wasi-edge {wasi_edge.__version__}\n", "")
    done = in_process("predict", "--json", "--nonsense")
    assert done.returncode == 2 and json.loads(done.stdout)["status"] == "failed"
    assert "try: wasi-edge predict --help" in done.stderr


def test_info_needs_no_torch(model):
    code = (
        "import sys; from wasi_edge.cli.app import run\n"
        f"assert run(['info', {model!r}, '--json']) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_nothing_but_plain_text_where_there_is_no_terminal(model, photos):
    environment = {**os.environ, "FORCE_COLOR": "1"}
    environment.pop("NO_COLOR", None)
    done = in_process("predict", model, str(photos), env=environment)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr


def test_a_reader_that_leaves_early_is_no_error(model, photos):
    code = "from wasi_edge.cli.app import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "info", model, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1


def test_a_bug_is_one_line_and_a_traceback_only_on_request(monkeypatch, finetuned, capsys):
    def broken(request, events):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(training_run, "finetune", broken)
    monkeypatch.delenv("WASI_EDGE_DEBUG", raising=False)
    assert run(["finetune", "."]) == 1
    err = capsys.readouterr().err
    assert "this is a bug in wasi-edge (ZeroDivisionError: division by zero)" in err
    assert "WASI_EDGE_DEBUG=1" in err and "Traceback" not in err
    monkeypatch.setenv("WASI_EDGE_DEBUG", "1")
    assert run(["finetune", ".", "--json"]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" in err and json.loads(out)["status"] == "failed"


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (KeyboardInterrupt(), 130, {"status": "interrupted", "error": "interrupted"}),
        (Interrupted("stopped and saved"), 130, {"status": "interrupted", "error": "stopped and saved"}),
        (NoUsableData("no photos"), 4, {"status": "failed", "error": "no photos"}),
        (OSError(28, "No space left on device", "/x"), 1,
         {"status": "failed", "error": "/x: No space left on device"}),
        (BudgetInfeasible("needs 300 MB", 300 * 2**20), 3,
         {"status": "failed", "error": "needs 300 MB", "smallest_feasible_budget_bytes": 300 * 2**20}),
    ],
)  # fmt: skip
def test_what_a_run_raises(error, code, expected, monkeypatch, finetuned, capsys):
    def raising(request, events):
        raise error

    monkeypatch.setattr(training_run, "finetune", raising)
    assert run(["finetune", ".", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == expected


# ---- finetune ----------------------------------------------------------------------------------


def test_every_flag_reaches_the_request(finetuned, monkeypatch, capsys):
    niceness = []
    monkeypatch.setattr(os, "nice", niceness.append)
    flags = (
        "--model m --budget 384MB --out o --quality best --epochs 3 --max-time 20m --epsilon 0.7 --method vanilla "
        "--val-split 0.3 --seed 5 --image-size 168 --batch 8 --lr 1e-4 --train-blocks 7 --rank 64 --max-temp 75 "
        "--optimizer sgd --nice 10 --threads 2 --checkpoint-every 2m --resume"
    )
    assert run(["finetune", "p", *flags.split()]) == 0
    (request,) = finetuned
    given = {key: value for key, value in vars(request).items()}
    assert {key: str(given.pop(key)) for key in ("photos", "out")} == {"photos": "p", "out": "o"}
    assert given == {
        "model": "m", "budget_bytes": 384 * 2**20, "quality": "best", "epochs": 3, "max_seconds": 1200.0,
        "epsilon": 0.7,
        "method": Method.VANILLA, "val_split": 0.3, "seed": 5, "image_size": 168, "batch": 8,
        "learning_rate": 1e-4, "train_blocks": 7, "gradient_rank": 64, "optimizer": Optimizer.SGD,
        "max_temperature": 75.0, "nice": 10,
        "threads": 2, "resume": True, "checkpoint_seconds": 120.0,
    }  # fmt: skip
    assert niceness == [10]
    out, err = capsys.readouterr()
    assert out == "" and "Recognises your 2 classes" in err and "epoch 1: 90 %" in err


def test_the_default_budget_is_at_most_512_mb(finetuned):
    assert run(["finetune", "p"]) == 0
    assert 0 < finetuned[0].budget_bytes <= 512 * 2**20


def test_json_is_the_report_and_progress_stays_on_stderr(finetuned, capsys):
    assert run(["finetune", "p", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == REPORT
    assert "pretending" in err and "epoch 1 of 2 (4)" in err
    assert run(["finetune", "p", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "planned"


@pytest.mark.parametrize(
    ("status", "code"),
    [("completed", 0), ("early_stopped", 0), ("time_limit", 0), ("interrupted", 130), ("failed", 1)],
)
def test_the_status_decides_the_exit_code(status, code, monkeypatch, finetuned, capsys):
    monkeypatch.setattr(training_run, "finetune", lambda request, events: {**REPORT, "status": status})
    assert run(["finetune", "p", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["status"] == status


def test_the_result_goes_to_the_first_free_run(finetuned, tmp_path):
    for name in ("wasi-run-1", "wasi-run-3", "wasi-run-x"):
        (tmp_path / "here" / name).mkdir()
    assert run(["finetune", "p"]) == 0
    assert str(finetuned[0].out) == "wasi-run-2"


def test_a_folder_that_holds_something_is_not_written_to(finetuned, tmp_path, capsys):
    out = tmp_path / "here" / "o"
    out.mkdir()
    assert run(["finetune", "p", "--out", "o"]) == 0
    (out / "file").write_text("mine")
    assert run(["finetune", "p", "--out", "o"]) == 2
    assert "o is not empty" in capsys.readouterr().err
    assert run(["finetune", "p", "--out", "o", "--resume"]) == 0
    assert run(["finetune", "p", "--out", "o", "--dry-run"]) == 0
    assert run(["finetune", "p", "--out", "o/file", "--resume"]) == 2
    assert len(finetuned) == 3


def test_resume_without_out_finds_the_run_that_stopped(finetuned, tmp_path):
    here = tmp_path / "here"

    def resumed():
        assert run(["finetune", "p", "--resume"]) == 0
        return str(finetuned[-1].out)

    assert resumed() == "wasi-run-1"
    for number, status in ((1, "interrupted"), (2, "completed")):
        (here / f"wasi-run-{number}" / "checkpoint").mkdir(parents=True)
        (here / f"wasi-run-{number}" / "report.json").write_text(json.dumps({"status": status}))
    assert resumed() == "wasi-run-1"
    (here / "wasi-run-10" / "checkpoint").mkdir(parents=True)  # killed: there is no report
    assert resumed() == "wasi-run-10"
    for number in (1, 10):
        (here / f"wasi-run-{number}" / "report.json").write_text('{"status": "early_stopped"}')
    assert resumed() == "wasi-run-10"


# ---- progress ----------------------------------------------------------------------------------


def show(events):
    events.stage("reading photos", 5)
    for done in range(1, 6):
        events.advance(done)
    for epoch in range(1, 4):
        events.stage(f"epoch {epoch} of 3", 10)
        events.advance(10, "loss 0.4")
        events.stage("validating", 4)
        events.epoch({"epoch": epoch, "val_accuracy": 0.8, "seconds": 10.0 * epoch})
    events.message("odd \x1b[31m[red]name")


def test_a_log_file_gets_one_line_for_each_stage_and_epoch():
    screen = Console(file=io.StringIO(), force_terminal=False)
    with RichEvents(screen, 512 * 2**20) as events:
        show(events)
    assert screen.file.getvalue().splitlines() == [
        "reading photos (5)", "epoch 1 of 3 (10)", "validating (4)",
        "epoch 1: 80 % on held-out photos; 10 s", "epoch 2: 80 % on held-out photos; 20 s",
        "epoch 3: 80 % on held-out photos; 30 s", "odd \ufffd[31m[red]name",
    ]  # fmt: skip


def test_a_terminal_gets_a_bar_with_memory_beside_the_budget(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    with RichEvents(screen, 512 * 2**20) as events:
        events.planned({"epochs": 3}, 512 * 2**20, 400 * 2**20, 600.0)
        show(events)
    shown = screen.file.getvalue()
    assert "/512 MB" in shown and "epoch 3 of 3" in shown and "left" in shown
    assert "[red]name" in shown


def test_time_left_follows_the_plan_and_then_the_run():
    remaining = RemainingTime()
    assert remaining.text() == ""
    remaining.planned(10, 600.0)
    assert remaining.text() == "about 10.0 min left"
    remaining.epoch({"epoch": 0, "seconds": 20.0})
    assert remaining.text() == "about 10.0 min left"
    remaining.epoch({"epoch": 2, "seconds": 60.0})  # 20 s an epoch, 8 to go
    assert remaining.text() == "about 2.7 min left"


def test_an_epoch_in_one_line():
    entry = {"epoch": 0, "val_accuracy": 0.72, "train_loss": None, "peak_rss_bytes": 400 * 2**20}
    assert epoch_line(entry) == "the head alone: 72 % on held-out photos; 400 MB at most"
    assert epoch_line({"epoch": 2.5}) == "epoch 2.5"


# ---- predict, evaluate, info -------------------------------------------------------------------


def test_predict_json_lists_every_file(model, photos, capsys):
    truncated_jpeg(photos / "dog" / "cut.jpg")
    assert run(["predict", model, str(photos), "--json", "--top-k", "9"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [os.path.relpath(row["path"], photos) for row in rows] == [
        "cat/000.jpg", "cat/001.jpg", "dog/000.jpg", "dog/cut.jpg",
    ]  # fmt: skip
    assert set(rows[0]) == {"path", "label", "probability", "top"}
    assert sorted(label for label, _ in rows[0]["top"]) == sorted(LABELS)
    assert sum(p for _, p in rows[0]["top"]) == pytest.approx(1, abs=1e-5)
    assert set(rows[3]) == {"path", "error"}
    assert err == ""


def test_if_no_file_can_be_read_the_reasons_are_in_the_failure(model, tmp_path, capsys):
    bad = truncated_jpeg(tmp_path / "bad.jpg")
    assert run(["predict", model, str(bad), str(tmp_path / "none.jpg"), "--json"]) == 4
    failed = json.loads(capsys.readouterr().out)
    assert failed["status"] == "failed" and "none of the 2 photos" in failed["error"]
    assert [set(row) for row in failed["results"]] == [{"path", "error"}] * 2


def test_predict_as_csv_and_as_a_table(model, photos, capsys):
    odd = save_jpeg(photos / "cat" / 'a, "b".jpg', scene(7))
    assert run(["predict", model, str(photos), "--csv", "--top-k", "2"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ["path", "label", "probability", "error", "label_2", "probability_2"]
    assert str(odd) in [row["path"] for row in rows] and len(rows) == 4
    assert run(["predict", model, str(photos), "--threshold", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.count("unsure") == 4 and err == ""


def test_predict_sorts_copies_into_folders(model, photos, tmp_path, capsys):
    out = photos / "sorted"  # below the photos: copies must not be classified in their turn
    for _ in range(2):
        assert run(["predict", model, str(photos), "--sort-into", str(out), "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert len(rows) == 3
        assert len([path for path in out.rglob("*") if path.is_file()]) == 3
    for row in rows:
        assert os.path.dirname(row["copied_to"]) == str(out / row["label"])
        assert os.path.exists(row["path"])


def test_evaluate_prints_the_contracts_keys(model, photos, capsys):
    class_folders(photos, {"horse": 1})
    assert run(["evaluate", model, str(photos), "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert {"accuracy", "balanced_accuracy", "num_images", "per_class", "confusion"} < set(result)
    assert result["num_images"] == 3 and result["labels"] == list(LABELS)
    assert [entry["path"] for entry in result["skipped_files"]] == ["horse/000.jpg"]
    assert "does not know their class" in err
    assert run(["evaluate", model, str(photos)]) == 0
    assert "Accuracy" in capsys.readouterr().out


def test_info_describes_the_model(model, capsys):
    assert run(["info", model, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["labels"] == list(LABELS) and result["ranks"]["blocks.0.qkv"] == 6
    assert result["stored_parameters"] < result["dense_parameters"]
    assert result["file_bytes"] == os.path.getsize(f"{model}/model.safetensors")
    assert result["preprocessing"]["image_size"] == 16 and result["geometry"]["depth"] == 2
    assert any(row.get("trained_blocks") == 1 for row in result["training_memory"])
    assert run(["info", model]) == 0
    out = capsys.readouterr().out
    assert "rank by block" in out and "drawn at random" in out and "training in 512 MB" in out
