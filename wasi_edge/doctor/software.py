"""What is installed: torch and how it was built, threads, the disk, extras. Torch is asked in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from wasi_edge.atomic import scratch
from wasi_edge.children import python_command
from wasi_edge.doctor.finding import Finding, bad, good, warning
from wasi_edge.errors import reason_of_end
from wasi_edge.memory.hardware import physical_cores
from wasi_edge.units import format_size

_MB = 2**20
_TRIAL_BYTES = 32 * _MB
_SLOW_BYTES_PER_SECOND = 10 * _MB
_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_INSTALL = f'pip install "torch==2.13.0+cpu" --extra-index-url {_CPU_INDEX}'
# extra -> (distribution, what it is for, whether its absence is worth a word)
_EXTRAS = {
    "onnxruntime": ("onnxruntime", "predicts without torch: faster, in less memory", True),
    "heic": ("pillow-heif", "reads HEIC photos", False),
    "hub": ("huggingface_hub", "fetches models of the Hugging Face hub", False),
}
_QUESTION = """
import json, torch
config = torch.__config__.show()
blas = next((part.split("=")[1] for part in config.replace(",", " ").split() if part.startswith("BLAS_INFO=")), None)
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "blas": blas,
                  "onednn": torch.backends.mkldnn.is_available()}))
"""


def examine_software(folder: Path, ask_torch: Callable[[], Mapping[str, Any] | str] | None = None) -> Iterator[Finding]:
    """All findings; `folder` is where a run would be written."""
    yield _torch((ask_torch or _asked_torch)())
    yield _threads(os.environ, physical_cores())
    yield _space(folder)
    yield _speed(folder)
    yield from _extras()


def _asked_torch() -> Mapping[str, Any] | str:
    """What torch says of itself, or the last line of why it does not."""
    done = subprocess.run(python_command("-c", _QUESTION), capture_output=True, text=True, check=False)
    try:
        found: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        if done.returncode < 0:
            return reason_of_end(done.returncode)
        return next(reversed(done.stderr.strip().splitlines()), f"exit status {done.returncode}")
    return found


def _torch(found: Mapping[str, Any] | str) -> Finding:
    if isinstance(found, str):
        return bad("torch", f"it cannot be imported: {found}", f"install it again: {_INSTALL}")
    numbers = tuple(int(part) for part in str(found["version"]).split("+")[0].split(".")[:2] if part.isdecimal())
    built = f"{found['version']}, BLAS: {found['blas'] or 'not named'}, oneDNN: {'yes' if found['onednn'] else 'no'}"
    if numbers < (2, 6):
        return bad("torch", built, f"torch 2.6 is the least: {_INSTALL}")
    if found["cuda"]:
        return warning(
            "torch", f"{built}, built for CUDA {found['cuda']}", f"gigabytes that nothing here uses: {_INSTALL}"
        )
    if not found["onednn"] or found["blas"] in (None, "generic"):
        return warning("torch", built, f"its matrix products may be slow; take the usual wheels: {_INSTALL}")
    return good("torch", f"{built}, for the CPU")


def _threads(environment: Mapping[str, str], cores: int) -> Finding:
    given = environment.get("OMP_NUM_THREADS", "").split(",")[0]
    if not given:
        return good("threads", f"{cores}, one a core")
    if not given.isdecimal() or int(given) > cores:
        return warning("threads", f"OMP_NUM_THREADS={given}, {cores} cores", "unset OMP_NUM_THREADS, or name --threads")
    if int(given) < cores:
        return warning("threads", f"{given} of {cores} cores, by OMP_NUM_THREADS", "unset it to use all of them")
    return good("threads", f"{given}, by OMP_NUM_THREADS")


def _space(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    found = f"{format_size(free)} free in {folder}"
    if free < 300 * _MB:
        return bad("disk space", found, "free some: a run needs its model three times and 150 KB a photo")
    if free < 1024 * _MB:
        return warning("disk space", found, "enough for a small run; larger networks need several hundred MB")
    return good("disk space", found)


def _speed(folder: Path) -> Finding:
    try:
        with scratch(folder / "wasi-edge-doctor") as path:
            began = time.perf_counter()
            with open(path, "wb") as file:
                for _ in range(_TRIAL_BYTES // _MB):
                    file.write(os.urandom(_MB))
                file.flush()
                os.fsync(file.fileno())
            seconds = time.perf_counter() - began
    except OSError as error:
        return bad("disk speed", f"{folder} cannot be written to ({error.strerror})", "run this where you will train")
    rate = _TRIAL_BYTES / max(seconds, 1e-6)
    found = f"{format_size(rate)} a second written"
    if rate < _SLOW_BYTES_PER_SECOND:
        return warning("disk speed", found, "checkpoints will take long; an SSD or a faster card (A2) helps")
    return good("disk speed", found)


def _extras() -> Iterator[Finding]:
    for extra, (package, purpose, matters) in _EXTRAS.items():
        version = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
        check, remedy = f"extra {extra}", f'pip install "wasi-edge[{extra}]"'
        if version is not None:
            yield good(check, f"{version}, {purpose}")
        elif matters:
            yield warning(check, f"not installed; it {purpose}", remedy)
        else:
            yield good(check, f"not installed; it {purpose}: {remedy}")
