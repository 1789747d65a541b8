"""What this machine needs for it: root, tools, and a kernel that hands ARM programs to QEMU."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

# program -> Debian package
TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "arch-test": "arch-test",
    "buildah": "buildah",
    "qemu-aarch64-static": "qemu-user-static",
}
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_ENTRY = "qemu-aarch64"
# the ELF header of a 64-bit little-endian ARM program
_MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
_MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"


class CannotRun(Exception):
    """This machine cannot build or run the image; the message says why and what to do."""


def prepare() -> None:
    """Raise CannotRun, or leave a kernel that runs ARM programs."""
    if platform.system() != "Linux":
        raise CannotRun(f"needs Linux, found {platform.system()}; use docker buildx there")
    if platform.machine() != "x86_64":
        raise CannotRun(
            f"emulates an ARM processor on x86_64, found {platform.machine()}; run the tests themselves there"
        )
    if os.geteuid() != 0:
        raise CannotRun("needs root, for chroot and binfmt_misc: sudo make arm64")
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        raise CannotRun(f"needs: apt-get install --no-install-recommends {' '.join(missing)}")
    _register()


def _register() -> None:
    if not (_BINFMT / "register").exists():
        mounted = subprocess.run(
            ["mount", "-t", "binfmt_misc", "binfmt_misc", str(_BINFMT)], capture_output=True, text=True, check=False
        )
        if mounted.returncode:
            raise CannotRun(f"the kernel has no binfmt_misc ({mounted.stderr.strip()}): load that module first")
    entry = _BINFMT / _ENTRY
    interpreter = shutil.which("qemu-aarch64-static")
    try:
        if entry.exists():
            text = entry.read_text()
            if text.startswith("enabled") and "F" in _flags(text):
                return
            entry.write_text("-1")  # without F the interpreter is looked for inside the image
        (_BINFMT / "register").write_text(f":{_ENTRY}:M::{_MAGIC}:{_MASK}:{interpreter}:F")
    except OSError as error:
        raise CannotRun(f"QEMU could not be registered in {_BINFMT}: {error}") from None


def _flags(text: str) -> str:
    return next((line.removeprefix("flags:") for line in text.splitlines() if line.startswith("flags:")), "")
