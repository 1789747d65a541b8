"""What this process, and those it starts, hold in memory.

`--budget` bounds resident + swapped memory summed over every process of the command, so
that is what is watched: on a Raspberry Pi with zram, pages that are swapped out leave the
resident set while they still occupy RAM, and a resident peak alone would flatter us.

On Linux everything is read from `/proc`. `VmHWM` is the kernel's own peak of the resident
set and misses nothing between samples; `getrusage` is not used there because a forked
child's `ru_maxrss` starts at its parent's size. Elsewhere psutil and `resource` stand in,
imported only when needed.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from wasi_edge.memory.hardware import hardware as hardware
from wasi_edge.memory.hardware import versions as versions

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
LARGEST_DEFAULT_BUDGET_BYTES = 512 * 2**20
SAMPLE_SECONDS = 0.25
MOST_SAMPLES = 400

_STATUS_LINE = re.compile(rb"^(VmHWM|VmRSS|VmSwap|RssFile):\s+(\d+) kB", re.MULTILINE)
_MEMINFO_LINE = re.compile(rb"^(MemFree|MemAvailable):\s+(\d+) kB", re.MULTILINE)


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process; the peak is of its resident set, over its whole life.

    `file_bytes` is the part of `rss_bytes` that is unchanged pages of files: libraries, mostly. 0 where unknown.
    """

    rss_bytes: int
    peak_rss_bytes: int
    swap_bytes: int
    file_bytes: int = 0


def read_memory(pid: int | str = "self", proc: Path = PROC) -> ProcessMemory:
    """Memory of process `pid`. Raises `ProcessLookupError` where there is no such process."""
    if not (proc / "self").exists():
        return _read_memory_without_proc(pid)
    try:
        status = _read_bytes(f"{proc}/{pid}/status")
    except OSError as error:
        raise ProcessLookupError(f"no process {pid} under {proc}") from error
    found = {name: int(kilobytes) * 1024 for name, kilobytes in _STATUS_LINE.findall(status)}
    rss_bytes = found.get(b"VmRSS", 0)  # a zombie has no Vm lines and holds nothing
    peak_bytes = max(rss_bytes, found.get(b"VmHWM", 0))
    return ProcessMemory(rss_bytes, peak_bytes, found.get(b"VmSwap", 0), found.get(b"RssFile", 0))


def total_memory(proc: Path = PROC) -> int:
    """Bytes resident + swapped, now, of this process and of all its descendants."""
    return sum(_tree_memory(proc))


def available_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes that can be taken without swapping: MemAvailable, or what a cgroup v2 limit leaves if less."""
    meminfo = _meminfo(proc)
    if not meminfo:
        import psutil

        return int(psutil.virtual_memory().available)
    available = meminfo.get(b"MemAvailable", meminfo.get(b"MemFree", 0))
    return max(0, min([available, *_cgroup_headroom(proc, cgroups)]))


def default_budget_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """The budget of a run that names none: the smaller of 512 MB and half of what is available."""
    return min(LARGEST_DEFAULT_BUDGET_BYTES, available_bytes(proc, cgroups) // 2)


class MemoryWatch:
    """Samples the memory of this process tree from a daemon thread until stopped.

    `peak_rss_bytes` is the larger of this process's own VmHWM and the largest sampled
    resident + swapped total of the tree. `samples` is a curve for the report: at most
    `MOST_SAMPLES` points (seconds since the start, bytes of the tree), whatever the length of
    the run. Each time it is full, neighbours are merged keeping the larger, so a spike is
    never thinned away.

    `on_sample(seconds, bytes)` is called in the watching thread and must not raise.
    """

    def __init__(
        self,
        interval_seconds: float = SAMPLE_SECONDS,
        on_sample: Callable[[float, int], None] | None = None,
        proc: Path = PROC,
    ) -> None:
        self._interval_seconds = interval_seconds
        self._on_sample = on_sample
        self._proc = proc
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._started_at = time.monotonic()
        self._samples: list[tuple[float, int]] = []
        self._window: list[tuple[float, int]] = []  # samples that will become one point
        self._window_length = 1
        self._largest_total_bytes = 0
        self._largest_swap_bytes = 0
        self._own_peak_bytes = 0

    def start(self) -> MemoryWatch:
        """Takes the first sample here and the others in the thread."""
        if self._thread is not None:
            raise RuntimeError("this watch has been started before; make a new one")
        self._started_at = time.monotonic()
        self._sample()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Takes a last sample. Harmless when repeated."""
        if self._thread is not None and not self._stopped.is_set():
            self._stopped.set()
            self._thread.join()
            self._sample()

    def __enter__(self) -> MemoryWatch:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def peak_rss_bytes(self) -> int:
        """Largest memory of the process tree so far (see the class)."""
        if not self._stopped.is_set():
            self._note_own_peak()
        with self._lock:
            return max(self._largest_total_bytes, self._own_peak_bytes)

    @property
    def peak_swap_bytes(self) -> int:
        """Largest sampled swap of the process tree so far."""
        with self._lock:
            return self._largest_swap_bytes

    @property
    def samples(self) -> list[tuple[float, int]]:
        """The curve so far, a copy."""
        with self._lock:
            return self._samples + ([max(self._window, key=_bytes_of)] if self._window else [])

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_seconds):
            self._sample()

    def _note_own_peak(self) -> None:
        peak_bytes = read_memory("self", self._proc).peak_rss_bytes
        with self._lock:
            self._own_peak_bytes = max(self._own_peak_bytes, peak_bytes)

    def _sample(self) -> None:
        rss_bytes, swap_bytes = _tree_memory(self._proc)
        self._note_own_peak()
        self._record(time.monotonic() - self._started_at, rss_bytes + swap_bytes, swap_bytes)

    def _record(self, seconds: float, total_bytes: int, swap_bytes: int) -> None:
        with self._lock:
            self._largest_total_bytes = max(self._largest_total_bytes, total_bytes)
            self._largest_swap_bytes = max(self._largest_swap_bytes, swap_bytes)
            self._window.append((seconds, total_bytes))
            if len(self._window) >= self._window_length:
                self._samples.append(max(self._window, key=_bytes_of))
                self._window = []
            if len(self._samples) >= MOST_SAMPLES:
                pairs = zip(self._samples[::2], self._samples[1::2], strict=True)
                self._samples = [max(pair, key=_bytes_of) for pair in pairs]
                self._window_length *= 2
        if self._on_sample is not None:
            self._on_sample(seconds, total_bytes)


def _bytes_of(sample: tuple[float, int]) -> int:
    return sample[1]


def _read_bytes(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _meminfo(proc: Path) -> dict[bytes, int]:
    """Bytes by field of /proc/meminfo, empty where there is none."""
    try:
        text = _read_bytes(proc / "meminfo")
    except OSError:
        return {}
    return {name: int(kilobytes) * 1024 for name, kilobytes in _MEMINFO_LINE.findall(text)}


def _tree_memory(proc: Path) -> tuple[int, int]:
    """(resident, swapped) bytes of this process and its descendants."""
    if not (proc / "self").exists():
        return _tree_memory_without_proc()
    rss_bytes = swap_bytes = 0
    for pid in _process_tree(proc):
        try:
            memory = read_memory(pid, proc)
        except ProcessLookupError:  # it ended meanwhile
            continue
        rss_bytes += memory.rss_bytes
        swap_bytes += memory.swap_bytes
    return rss_bytes, swap_bytes


def _process_tree(proc: Path) -> Iterator[str]:
    """Pids of this process and its descendants.

    Every thread lists the children it started in `task/<tid>/children`: a few short reads.
    A kernel built without that file costs a scan of all processes instead.
    """
    own = os.readlink(proc / "self")
    children_of = _children_by_thread if (proc / own / "task" / own / "children").exists() else None
    by_parent = {} if children_of else _children_by_scan(proc)
    waiting, seen = [own], set()
    while waiting:
        pid = waiting.pop()
        if pid not in seen:
            seen.add(pid)
            yield pid
            waiting += children_of(pid, proc) if children_of else by_parent.get(pid, [])


def _children_by_thread(pid: str, proc: Path) -> list[str]:
    children: list[str] = []
    try:
        threads = os.listdir(f"{proc}/{pid}/task")
    except OSError:
        return children
    for thread in threads:
        try:
            children += _read_bytes(f"{proc}/{pid}/task/{thread}/children").decode().split()
        except OSError:  # the thread ended meanwhile
            continue
    return children


def _children_by_scan(proc: Path) -> dict[str, list[str]]:
    by_parent: dict[str, list[str]] = {}
    for pid in filter(str.isdigit, os.listdir(proc)):
        try:
            fields = _read_bytes(f"{proc}/{pid}/stat").rpartition(b")")[2].split()
        except OSError:
            continue
        if len(fields) > 1:  # after the name: state, parent, ...
            by_parent.setdefault(fields[1].decode(), []).append(pid)
    return by_parent


def _cgroup_headroom(proc: Path, cgroups: Path) -> Iterator[int]:
    """What each limited cgroup (v2) above this process has left, its reclaimable file cache included."""
    try:
        lines = _read_bytes(proc / "self" / "cgroup").decode().splitlines()
    except OSError:
        return
    path = next((line[3:].strip("/") for line in lines if line.startswith("0::")), None)
    if path is None:
        return
    parts = path.split("/") if path else []
    for depth in range(len(parts), -1, -1):
        folder = cgroups.joinpath(*parts[:depth])
        try:
            limit = _read_bytes(folder / "memory.max").strip()
            if not limit.isdigit():  # "max"
                continue
            used = int(_read_bytes(folder / "memory.current"))
            cache = re.search(rb"^inactive_file (\d+)", _read_bytes(folder / "memory.stat"), re.MULTILINE)
        except OSError:
            continue
        yield int(limit) - used + (int(cache[1]) if cache else 0)


def _read_memory_without_proc(pid: int | str) -> ProcessMemory:
    import psutil

    try:
        process = psutil.Process(None if pid == "self" else int(pid))
        memory = process.memory_info()
    except psutil.NoSuchProcess as error:
        raise ProcessLookupError(f"no process {pid}") from error
    peak_bytes = getattr(memory, "peak_wset", memory.rss)  # Windows keeps a peak per process
    if pid == "self" and sys.platform != "win32":
        import resource

        unit_bytes = 1 if sys.platform == "darwin" else 1024
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
    return ProcessMemory(memory.rss, max(memory.rss, peak_bytes), getattr(memory, "swap", 0))


def _tree_memory_without_proc() -> tuple[int, int]:
    import psutil

    own = psutil.Process()
    rss_bytes = 0
    for process in [own, *own.children(recursive=True)]:
        try:
            rss_bytes += process.memory_info().rss
        except psutil.Error:
            continue
    return rss_bytes, 0
