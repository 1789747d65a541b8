"""A command inside the image, on a named ARM processor, and the memory it took: its own and the emulator's.

QEMU's user mode is one process with its guest, so what Linux reports for it, and what wasi-edge sees of itself, has the
emulator in it. The mappings tell them apart: QEMU's program file, its heap (the guest's own is an
ordinary mapping to Linux), and the buffer of translated code, the only mapping that is writable and executable.

Not `buildah run`: QEMU shows the guest the /proc/cpuinfo of the machine below, on which ONNX Runtime, which looks for
ARM cores in it, crashes when it is imported. So the command starts in a mount namespace where that file is the ARM
processor's, with the user, environment and folder that the image names.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

_PAUSE_SECONDS = 1.5
_EMULATOR = "qemu-aarch64"
_ARMV8 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
# processor -> part number and features in /proc/cpuinfo
_CORES = {
    "cortex-a76": ("0xd0b", f"{_ARMV8} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"),
    "cortex-a72": ("0xd08", _ARMV8),
}


@dataclass
class Peaks:
    """Bytes resident at most: all of the process, the guest's part and the emulator's, each at its own moment."""

    total: int = 0
    guest: int = 0
    emulator: int = 0

    def add(self, guest: int, emulator: int, peak: int) -> None:
        """Take one sample in; `peak` is the kernel's own, of all of it, which misses nothing between samples."""
        self.total = max(self.total, peak)
        self.guest, self.emulator = max(self.guest, guest), max(self.emulator, emulator)


@dataclass
class Outcome:
    """What a command said, how long it took, and the largest process of it."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    peaks: Peaks = field(default_factory=Peaks)


@dataclass(frozen=True)
class Root:
    """A mounted image: where it is, and what it says about how commands start."""

    path: Path
    user: str
    folder: str
    environment: dict[str, str]

    @classmethod
    def of(cls, path: Path, config: Mapping[str, Any]) -> Root:
        """From the `config` of an OCI image."""
        environment = dict(entry.split("=", 1) for entry in config["Env"])
        return cls(path, config["User"], config["WorkingDir"], environment)


def cpuinfo(cpu: str, cores: int) -> str:
    """/proc/cpuinfo as Linux writes it on such a processor."""
    part, features = _CORES[cpu]
    lines = ("BogoMIPS\t: 108.00", f"Features\t: {features}", "CPU implementer\t: 0x41", "CPU architecture: 8",
             "CPU variant\t: 0x4", f"CPU part\t: {part}", "CPU revision\t: 1")  # fmt: skip
    return "".join("\n".join((f"processor\t: {number}", *lines, "", "")) for number in range(cores))


def run(
    root: Root,
    command: Sequence[str],
    cpu: str,
    seconds: float,
    mounts: Mapping[Path, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run as the image's user. `mounts`: a folder here -> its place below /tmp, read-only where that ends in :ro.

    Raises subprocess.TimeoutExpired after `seconds`.
    """
    began = time.monotonic()
    with tempfile.NamedTemporaryFile("w", suffix=".cpuinfo") as cores:
        cores.write(cpuinfo(cpu, os.cpu_count() or 1))
        cores.flush()
        os.chmod(cores.name, 0o644)
        script = _script(root, Path(cores.name), mounts or {})
        settings = {**root.environment, "QEMU_CPU": cpu, **(environment or {})}
        words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
        words += ["/usr/bin/env", "-i", f"--chdir={root.folder}", *(f"{k}={v}" for k, v in settings.items())]
        return _watched([*words, *command], seconds, began)


def _script(root: Root, cores: Path, mounts: Mapping[Path, str]) -> str:
    """Mounts, and then the command that follows it within the image."""
    place = shlex.quote(str(root.path))
    lines = [
        "set -e",
        f"mount -t proc proc {place}/proc",
        f"mount --bind {shlex.quote(str(cores))} {place}/proc/cpuinfo",
        f"mount --rbind /sys {place}/sys",
        f"mount --rbind /dev {place}/dev",
        f"mount -t tmpfs -o mode=1777 tmpfs {place}/tmp",
    ]
    for folder, inside in mounts.items():
        target = place + inside.removesuffix(":ro")
        lines += [f"mkdir -p {target}", f"mount --bind {shlex.quote(str(folder))} {target}"]
        if inside.endswith(":ro"):
            lines.append(f"mount -o remount,bind,ro {target}")
    lines.append(f'exec chroot --userspec={root.user} {place} "$@"')
    return "\n".join(lines)


def _watched(words: list[str], seconds: float, began: float) -> Outcome:
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    watch = _Watch(process.pid)
    watch.start()
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except BaseException:
        for pid in descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
        raise
    finally:
        watch.stop()
    return Outcome(process.returncode, stdout, stderr, time.monotonic() - began, watch.largest())


class _Watch(threading.Thread):
    """Samples every emulated process below `parent`."""

    def __init__(self, parent: int) -> None:
        super().__init__(daemon=True)
        self._parent, self._over = parent, threading.Event()
        self._peaks: dict[int, Peaks] = {}

    def run(self) -> None:
        while not self._over.wait(_PAUSE_SECONDS):
            for pid in descendants(self._parent):
                try:
                    mappings = Path(f"/proc/{pid}/smaps").read_text()
                    peaks = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
                except OSError:  # it has ended meanwhile
                    continue
                if peaks and _EMULATOR in mappings:
                    self._peaks.setdefault(pid, Peaks()).add(*shares(mappings), 1024 * int(peaks[0]))

    def stop(self) -> None:
        """No more samples."""
        self._over.set()
        self.join()

    def largest(self) -> Peaks:
        """Of the process that held most."""
        return max(self._peaks.values(), key=lambda peaks: peaks.total, default=Peaks())


def shares(smaps: str) -> tuple[int, int]:
    """Resident bytes of the guest and of the emulator, from /proc/PID/smaps."""
    guest = emulator = 0
    is_emulator = False
    for line in smaps.splitlines():
        header = re.match(r"[0-9a-f]+-[0-9a-f]+ (\S+) \S+ \S+ \S+\s*(.*)", line)
        if header:
            rights, name = header.groups()
            is_emulator = _EMULATOR in name or name in ("[heap]", "[stack]") or rights.startswith("rwx")
        elif line.startswith("Rss:"):
            size = int(line.split()[1]) * 1024
            emulator, guest = (emulator + size, guest) if is_emulator else (emulator, guest + size)
    return guest, emulator


def descendants(pid: int) -> list[int]:
    """A process and all below it; nothing once it has ended."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []
