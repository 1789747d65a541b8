"""The aarch64 wheels that a Raspberry Pi needs: which they are, and whether they run on 16 KB pages.

    python -m deploy.wheels --lock FOLDER     resolve setup.cfg anew, write deploy/requirements-arm64.txt
    python -m deploy.wheels FOLDER            fetch what is locked, check it, print one line a wheel

Needs pip and `packaging`, and a package index; nothing is installed. Markers are evaluated for the Pi, not for the
machine this runs on, which pip does not do for a foreign `--platform`.
"""

from __future__ import annotations

import argparse
import configparser
import hashlib
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "deploy" / "requirements-arm64.txt"
# Pi OS Bookworm and Trixie
PYTHONS = ("3.11", "3.13")
# up to the C library of Bookworm
PLATFORMS = [f"manylinux_2_{n}_aarch64" for n in (36, 35, 34, 31, 28, 27, 26, 24, 17)] + ["manylinux2014_aarch64"]
# The newest on the default index that is a CPU build (from 2.11 on they ask for CUDA) and that a Pi 4 can import:
# 2.10.0 ends with an illegal instruction on its Cortex-A72.
TORCH = "torch==2.9.1"
EXTRAS = ("heic", "hub", "onnxruntime")
# A Pi 5 maps memory in pages of this size.
PAGE_BYTES = 16 * 1024
_PT_LOAD = 1
_HEADER = """\
# What Dockerfile.arm64 installs, for CPython 3.11 and 3.13 on Linux aarch64: python -m deploy.wheels --lock FOLDER
"""


@dataclass(frozen=True)
class Locked:
    """One line of the lock."""

    name: str
    version: str
    hashes: tuple[str, ...]

    def __str__(self) -> str:
        return " \\\n    ".join((f"{self.name}=={self.version}", *(f"--hash=sha256:{value}" for value in self.hashes)))


def declared(extras: Iterable[str] = EXTRAS) -> list[str]:
    """Requirements of setup.cfg, those of `extras` with them."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    texts = [settings["options"]["install_requires"], *(settings["options.extras_require"][extra] for extra in extras)]
    return [line.strip() for text in texts for line in text.splitlines() if line.strip()]


def requirements_of(wheel: Path, python: str) -> list[Requirement]:
    """What a wheel asks for on a Pi with this Python, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(entry for entry in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", entry))
        metadata = HeaderParser().parsestr(archive.read(name).decode("utf-8", "replace"))
    target = {
        "platform_machine": "aarch64",
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "python_version": python,
        "python_full_version": f"{python}.0",
        "extra": "",
    }
    found = (Requirement(text) for text in metadata.get_all("Requires-Dist") or [])
    return [wanted for wanted in found if wanted.marker is None or wanted.marker.evaluate(target)]


def fetch(requirements: Iterable[str], python: str, folder: Path) -> list[Path]:
    """Download wheels for a Pi, nothing that they ask for with them. Raises subprocess.CalledProcessError where the
    index has none that fits, or cannot be reached."""
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    subprocess.run([*command, "--dest", str(folder), *requirements], check=True, capture_output=True, text=True)
    return sorted(folder.glob("*.whl"))


def resolve(python: str, pins: dict[str, str], folder: Path) -> dict[str, Path]:
    """Every wheel that `declared` leads to, by canonical name: the version of `pins`, or the newest that fits."""
    found: dict[str, Path] = {}
    queue = [Requirement(TORCH), *(Requirement(text) for text in declared())]
    while queue:
        wanted = queue.pop(0)
        name = canonicalize_name(wanted.name)
        if name in found:
            if parse_wheel_filename(found[name].name)[1] not in wanted.specifier:
                raise SystemExit(f"error: {wanted} does not go with {found[name].name}; pin it")
            continue
        place = folder / f"{python}-{name}"
        pinned = f"{name}=={pins[name]}" if name in pins else f"{name}{wanted.specifier}"
        shutil.rmtree(place, ignore_errors=True)  # another version may be there from an earlier time
        found[name] = fetch([pinned], python, place)[-1]
        queue += requirements_of(found[name], python)
    return found


def read_lock(lock: Path = LOCK) -> list[Locked]:
    """The lines of a lock."""
    text = re.sub(r"^#.*\n", "", lock.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line.strip()]
    found = []
    for requirement, *hashes in lines:
        name, version = requirement.split("==")
        found.append(Locked(name, version, tuple(word.removeprefix("--hash=sha256:") for word in hashes)))
    return found


def load_alignments(data: bytes) -> list[int]:
    """Alignment in bytes of every LOAD segment of a 64-bit little-endian ELF file."""
    offset, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    kinds = [offset + size * number for number in range(count)]
    return [
        struct.unpack_from("<Q", data, start + 48)[0]
        for start in kinds
        if struct.unpack_from("<I", data, start)[0] == _PT_LOAD
    ]


def shared_objects(wheel: Path) -> Iterator[tuple[str, list[int]]]:
    """Name and LOAD alignments of every ELF file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as file:
                if file.read(4) != b"\x7fELF":
                    continue
            with archive.open(entry) as file:
                yield entry.filename, load_alignments(file.read(64 * 1024))


def lock(folder: Path) -> list[Locked]:
    """Resolve for every Python, at the same versions, and hash what was found."""
    wheels: dict[str, set[Path]] = {}
    pins: dict[str, str] = {}
    for python in PYTHONS:
        for name, wheel in resolve(python, pins, folder).items():
            wheels.setdefault(name, set()).add(wheel)
            pins[name] = str(parse_wheel_filename(wheel.name)[1])
    return [Locked(name, pins[name], _hashes(wheels[name])) for name in sorted(wheels)]


def _hashes(wheels: Iterable[Path]) -> tuple[str, ...]:
    return tuple(sorted({hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where wheels are downloaded to")
    parser.add_argument("--lock", action="store_true", help="resolve anew")
    given = parser.parse_args()
    if given.lock:
        LOCK.write_text(_HEADER + "\n".join(map(str, lock(given.folder))) + "\n")
    for python in PYTHONS:
        print(f"CPython {python}")
        for wheel in fetch(["--require-hashes", "-r", str(LOCK)], python, given.folder / f"locked-{python}"):
            objects = list(shared_objects(wheel))
            least = min((alignment for _, found in objects for alignment in found), default=None)
            shared = "pure Python" if least is None else f"{len(objects)} ELF files, pages up to {least // 1024} KB"
            print(f"  {wheel.name}: {shared}")


if __name__ == "__main__":
    main()
