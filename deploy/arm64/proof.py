"""What is run in the image, and compared with the same on this machine's own processor."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deploy.arm64 import emulated, image
from deploy.arm64.emulated import Outcome, Root

PI_5, PI_4 = "cortex-a76", "cortex-a72"
MB = 2**20
BUDGET_BYTES = 512 * MB
LOSS_TOLERANCE, LABELS_EQUAL = 1e-4, 0.98
# One step an epoch, so that the history holds the loss of every step.
_FINETUNE = ["--image-size", "42", "--epochs", "2", "--batch", "16", "--train-blocks", "4", "--threads", "1"]
_FINETUNE += ["--seed", "1", "--budget", str(BUDGET_BYTES), "--json"]
_TRAIN_PER_CLASS, _NEW_PER_CLASS = 5, 26
# The numerical core; without what takes minutes under emulation.
_TESTS = ["test_weight.py", "test_orthonormal.py", "test_tucker.py", "test_layers.py", "test_subspace_linears.py"]
_LONG_TESTS = "hundreds or no_dense_weight"
_PYTEST = ["pytest", "pluggy", "iniconfig"]


class Failed(Exception):
    """Something in the image is not as it has to be."""


@dataclass
class Report:
    """build/arm64/report.json. `steps`: seconds of each command."""

    uname_m: str = ""
    qemu_cpu: str = PI_5
    image_bytes: int = 0
    unwanted_files: list[str] = field(default_factory=list)
    budget_bytes: int = BUDGET_BYTES
    peak_rss_bytes: int = 0  # of the process, the emulator included: what wasi-edge sees and keeps to its budget
    guest_peak_rss_bytes: int = 0
    emulator_peak_rss_bytes: int = 0
    planned_peak_rss_bytes: int = 0
    optimizer_steps: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)  # by machine, of every step
    first_loss_difference: float = 1.0
    labels_compared: int = 0
    labels_equal: int = 0
    tests_passed: int = 0
    exported_bytes: int = 0
    versions: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    def defects(self) -> list[str]:
        """What does not hold."""
        claims = {
            f"the machine is {self.uname_m}, not aarch64": self.uname_m == "aarch64",
            f"the image has {self.image_bytes / 1e6:.0f} MB, 900 are allowed": self.image_bytes < 900e6,
            f"the image holds {', '.join(self.unwanted_files[:5])}": not self.unwanted_files,
            f"training held {self.peak_rss_bytes / MB:.0f} MB, over the budget": 0
            < self.peak_rss_bytes
            <= self.budget_bytes,
            "no optimiser step was made": self.optimizer_steps > 0,
            f"losses of the first step differ by {self.first_loss_difference:.1e}": self.first_loss_difference
            <= LOSS_TOLERANCE,
            f"{self.labels_equal} of {self.labels_compared} labels are those of this machine": self.labels_compared
            >= 100
            and self.labels_equal >= LABELS_EQUAL * self.labels_compared,
            "no test passed": self.tests_passed > 0,
            "nothing was exported": self.exported_bytes > 0,
        }
        return [words for words, holds in claims.items() if not holds]


class Proof:
    """One image, one report, one clock. `folder` is written to and has to be open to the image's user."""

    def __init__(self, root: Root, folder: Path, seconds: float, say: Callable[[str], None]) -> None:
        self._root, self._folder, self._say = root, folder, say
        self._end = time.monotonic() + seconds
        self.report = Report()

    def run(self) -> None:
        """Training and predicting, and everything else beside them. Raises Failed, subprocess.TimeoutExpired."""
        self._prepare()
        native = self._native()
        with ThreadPoolExecutor(2) as pool:
            others = pool.submit(self._everything_else)
            self._compare_training(self._finetune(), native)
            self._compare_labels(self._predict(), native["labels"])
            others.result()

    def _prepare(self) -> None:
        photos = [("photos", _TRAIN_PER_CLASS, 0), ("new", _NEW_PER_CLASS, 1)]
        for name, per_class, seed in photos:
            arguments = [str(self._folder / name), "--per-class", str(per_class), "--seed", str(seed)]
            subprocess.run([sys.executable, "-m", "wasi_edge.data.demo", *arguments], check=True, capture_output=True)
        (self._folder / "out").mkdir()
        (self._folder / "out").chmod(0o777)
        target = ["--target", str(self._folder / "pytest"), "--no-deps", "--no-compile"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *target, *_PYTEST], check=True, capture_output=True)

    def _emulate(self, name: str, command: Sequence[str], cpu: str = PI_5, **environment: str) -> Outcome:
        self._say(f"{name} ({cpu})")
        left = self._end - time.monotonic()
        mounts = {
            self._folder / "photos": "/tmp/proof/photos:ro",
            self._folder / "new": "/tmp/proof/new:ro",
            self._folder / "out": "/tmp/proof/out",
            self._folder / "native": "/tmp/proof/native:ro",
            self._folder / "pytest": "/tmp/proof/pytest:ro",
            image.ROOT / "tests": "/tmp/proof/tests:ro",
        }
        # a core for each of the two lanes: threads that wait for one another cost more than they bring here
        done = emulated.run(self._root, command, cpu, max(1.0, left), mounts, {"OMP_NUM_THREADS": "1", **environment})
        self.report.steps[f"{name} ({cpu})"] = round(done.seconds, 1)
        if done.code:
            last = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[-12:])
            raise Failed(f"{name} on {cpu} ended with {done.code}:\n  {last}")
        return done

    def _finetune(self) -> dict[str, Any]:
        command = ["wasi-edge", "finetune", "/tmp/proof/photos", *_FINETUNE, "--out", "/tmp/proof/out/run"]
        done = self._emulate("finetune", command)
        self.report.guest_peak_rss_bytes = done.peaks.guest
        self.report.emulator_peak_rss_bytes = done.peaks.emulator
        found: dict[str, Any] = json.loads(done.stdout)
        # its own figure sums over all its processes and counts what is swapped out
        self.report.peak_rss_bytes = max(done.peaks.total, found["peak_rss_bytes"] + found["peak_swap_bytes"])
        return found

    def _everything_else(self) -> None:
        self._look()
        self._test()
        self._export()
        self._smoke()

    def _look(self) -> None:
        self.report.uname_m = self._emulate("uname -m", ["uname", "-m"]).stdout.strip()
        version = self._emulate("--version", ["wasi-edge", "--version"]).stdout
        if not version.startswith("wasi-edge "):
            raise Failed(f"--version said {version!r}")
        # a full disk of this machine is not the image's fault, so its exit status is not asked
        found = self._emulate("doctor", ["sh", "-c", "wasi-edge doctor --json || true"]).stdout
        findings = {entry["check"]: entry for entry in json.loads(found)["findings"]}
        for check in ("board", "processor", "torch", "extra onnxruntime"):
            self._say(f"doctor: {check}: {findings[check]['status']}, {findings[check]['found']}")
        if "aarch64" not in findings["board"]["found"] or findings["torch"]["status"] != "good":
            raise Failed(f"doctor says {findings['board']['found']}; {findings['torch']['found']}")
        self._emulate("import for --int8", ["python3", "-c", "import onnxruntime.quantization"])

    def _test(self) -> None:
        tests = [f"/tmp/proof/tests/{name}" for name in _TESTS]
        options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", "/tmp/proof/tests"]
        path = "/opt/wasi-edge:/tmp/proof/pytest:/tmp/proof/tests"
        command = ["python3", "-m", "pytest", *options, "-k", f"not ({_LONG_TESTS})", *tests]
        closing = self._emulate("tests", command, PYTHONPATH=path).stdout.strip().splitlines()[-1]
        self._say(f"tests: {closing}")
        words = closing.replace(",", "").split()
        self.report.tests_passed = int(words[words.index("passed") - 1]) if "passed" in words else 0

    def _native(self) -> dict[str, Any]:
        """The same run and its labels on this machine's processor."""
        self._say("the same on this machine's processor")
        out, command = self._folder / "native", [sys.executable, "-m", "wasi_edge"]
        train = [*command, "finetune", str(self._folder / "photos"), *_FINETUNE, "--out", str(out)]
        predict = [*command, "predict", str(out), str(self._folder / "new"), "--json"]
        found: dict[str, Any] = json.loads(_checked(train))
        return found | {"labels": _labels(_checked(predict))}

    def _compare_training(self, here: dict[str, Any], native: dict[str, Any]) -> None:
        report = self.report
        report.optimizer_steps, report.versions = here["optimizer_steps"], here["versions"]
        report.planned_peak_rss_bytes = here["planned_peak_rss_bytes"]
        for machine, found in (("aarch64", here), ("native", native)):
            report.losses[machine] = [entry["train_loss"] for entry in found["history"] if entry["epoch"] > 0]
        first, other = (report.losses[machine][0] for machine in ("aarch64", "native"))
        report.first_loss_difference = abs(first - other) / abs(other)

    def _predict(self) -> dict[str, str]:
        done = self._emulate("predict", ["wasi-edge", "predict", "/tmp/proof/out/run", "/tmp/proof/new", "--json"])
        return _labels(done.stdout)

    def _compare_labels(self, here: dict[str, str], native: dict[str, str]) -> None:
        self.report.labels_compared = len(native)
        self.report.labels_equal = sum(here.get(photo) == label for photo, label in native.items())

    def _export(self) -> None:
        """Of the run that was trained here: the one in the image is not there yet, and writes a model.onnx itself."""
        self._emulate("export", ["wasi-edge", "export", "/tmp/proof/native", "/tmp/proof/out/exported.onnx"])
        self.report.exported_bytes = (self._folder / "out" / "exported.onnx").stat().st_size

    def _smoke(self) -> None:
        """On the Pi 4's processor: the command starts, and predicts by ONNX Runtime and by torch."""
        photo = next(path for path in sorted((self._folder / "new").rglob("*.jpg")))
        place = f"/tmp/proof/new/{photo.relative_to(self._folder / 'new')}"
        self._emulate("--version", ["wasi-edge", "--version"], PI_4)
        found: dict[str, dict[str, str]] = {}
        for backend in ("onnx", "torch"):
            command = ["wasi-edge", "predict", "/tmp/proof/native", place, "--backend", backend, "--json"]
            found |= {backend: _labels(self._emulate(f"predict by {backend}", command, PI_4).stdout)}
        if found["onnx"] != found["torch"]:
            raise Failed(f"on {PI_4}, ONNX Runtime says {found['onnx']} and torch {found['torch']}")


def _checked(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=image.ROOT)
    if done.returncode:
        raise Failed(f"{' '.join(command[1:5])} failed on this machine: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def _labels(answer: str) -> dict[str, str]:
    """class/file -> label; an unreadable photo has its error in place of it."""
    entries = json.loads(answer)
    return {"/".join(Path(entry["path"]).parts[-2:]): entry.get("label", entry.get("error")) for entry in entries}
