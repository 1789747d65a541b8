"""A command inside the image, on a named ARM processor, and the memory it took: its own and the emulator's.

QEMU's user mode is one process with its guest, so what Linux reports for it, and what wasi-edge sees of itself, has the
emulator in it. The mappings tell them apart: QEMU's program file, its heap (the guest's own is an
ordinary mapping to Linux), and the buffer of translated code, the only mapping that is writable and executable.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PAUSE_SECONDS = 0.5
_EMULATOR = "qemu-aarch64"


@dataclass
class Peaks:
    """Bytes resident at most: all of the process, the guest's part and the emulator's, each at its own moment."""

    total: int = 0
    guest: int = 0
    emulator: int = 0

    def add(self, guest: int, emulator: int) -> None:
        """Take one sample in."""
        self.total = max(self.total, guest + emulator)
        self.guest, self.emulator = max(self.guest, guest), max(self.emulator, emulator)


@dataclass
class Outcome:
    """What a command said, how long it took, and the largest process of it."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    peaks: Peaks = field(default_factory=Peaks)


def run(
    container: str,
    command: Sequence[str],
    cpu: str,
    seconds: float,
    mounts: Mapping[Path, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run as the image's user. `mounts`: a folder here -> its place, read-only where that ends in :ro.

    Raises subprocess.TimeoutExpired after `seconds`.
    """
    words = ["buildah", "run", "--isolation", "chroot"]
    for name, value in {"QEMU_CPU": cpu, **(environment or {})}.items():
        words += ["--env", f"{name}={value}"]
    for folder, place in (mounts or {}).items():
        words += ["-v", f"{folder}:{place}"]
    began = time.monotonic()
    process = subprocess.Popen(
        [*words, container, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    watch = _Watch(process.pid)
    watch.start()
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for pid in descendants(process.pid):
            subprocess.run(["kill", "-9", str(pid)], check=False, capture_output=True)
        process.kill()
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
                except OSError:
                    continue
                if _EMULATOR in mappings:
                    self._peaks.setdefault(pid, Peaks()).add(*shares(mappings))

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
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, queue = [], [pid]
    while queue:
        found.append(queue.pop())
        queue += children.get(found[-1], [])
    return found
