"""Process memory: against fake /proc trees, and against real processes that take known amounts."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from wasi_edge.memory import hardware as hardware_module
from wasi_edge.memory.hardware import physical_cores, power_watts, temperature_celsius, throttled
from wasi_edge.memory.malloc import release_free_memory, tune_malloc
from wasi_edge.memory.process import (
    MOST_SAMPLES,
    MemoryWatch,
    available_bytes,
    default_budget_bytes,
    hardware,
    read_memory,
    total_memory,
    versions,
)

MEBIBYTE = 2**20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def _add_process(proc: Path, pid: int, parent: int, rss: int, peak: int = 0, swap: int = 0) -> None:
    folder = proc / str(pid)
    (folder / "task" / str(pid)).mkdir(parents=True)
    (folder / "stat").write_text(f"{pid} (a) b) c) S {parent} 1 1 0")
    (folder / "status").write_text(
        f"Name:\tVmRSS\nVmHWM:\t{max(peak, rss)} kB\nVmRSS:\t  {rss} kB\nVmSwap:\t {swap} kB\n"
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Process 100 with a child 101, its child 102, and an unrelated 200. Sizes in kB are distinct bits."""
    _add_process(tmp_path, 100, 1, rss=1, peak=50, swap=2)
    _add_process(tmp_path, 101, 100, rss=4, swap=8)
    _add_process(tmp_path, 102, 101, rss=16, swap=32)
    _add_process(tmp_path, 200, 1, rss=64, swap=128)
    (tmp_path / "self").symlink_to("100")
    return tmp_path


def test_reads_resident_peak_and_swap(tree: Path) -> None:
    memory = read_memory("self", tree)
    assert (memory.rss_bytes, memory.peak_rss_bytes, memory.swap_bytes) == (1024, 50 * 1024, 2048)
    assert read_memory(102, tree).swap_bytes == 32 * 1024


def test_a_zombie_holds_nothing_and_a_stranger_is_an_error(tree: Path) -> None:
    (tree / "200" / "status").write_text("Name:\tgone\nState:\tZ (zombie)\n")
    assert read_memory(200, tree).rss_bytes == 0
    with pytest.raises(ProcessLookupError):
        read_memory(999, tree)


def test_total_counts_descendants_by_scan(tree: Path) -> None:
    assert total_memory(tree) == 63 * 1024


def test_total_counts_descendants_of_every_thread(tree: Path) -> None:
    (tree / "100" / "task" / "100" / "children").write_text("")
    (tree / "100" / "task" / "107").mkdir()
    (tree / "100" / "task" / "107" / "children").write_text("101 555 ")  # 555 has ended
    (tree / "101" / "task" / "101" / "children").write_text("102 ")
    assert total_memory(tree) == 63 * 1024


@linux
def test_a_real_child_is_counted_and_then_not() -> None:
    before = total_memory()
    code = "x = bytearray(b'x') * (80 << 20); print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    during = total_memory()
    child.communicate(b"\n")
    assert 80 * MEBIBYTE < during - before < 130 * MEBIBYTE
    assert total_memory() - before < 10 * MEBIBYTE


@linux
def test_a_sample_is_cheap() -> None:
    total_memory()
    started = time.perf_counter()
    for _ in range(20):
        total_memory()
    assert (time.perf_counter() - started) / 20 < 0.02


def _meminfo(proc: Path, available_kilobytes: int) -> None:
    (proc / "meminfo").write_text(f"MemTotal: 8000000 kB\nMemFree: 10 kB\nMemAvailable: {available_kilobytes} kB\n")


def _cgroup(folder: Path, limit: str, used: int, inactive_file: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\n")


def test_budget_defaults_to_half_of_little_and_512_of_much(tree: Path) -> None:
    nowhere = tree / "no-cgroups"
    _meminfo(tree, 4_000_000)
    assert available_bytes(tree, nowhere) == 4_000_000 * 1024
    assert default_budget_bytes(tree, nowhere) == 512 * MEBIBYTE
    _meminfo(tree, 600 * 1024)
    assert default_budget_bytes(tree, nowhere) == 300 * MEBIBYTE


def test_the_tightest_cgroup_on_the_way_up_counts(tree: Path) -> None:
    cgroups = tree / "cgroups"
    _meminfo(tree, 4_000_000)
    (tree / "100" / "cgroup").write_text("1:name=systemd:/x\n0::/box/inner\n")
    _cgroup(cgroups / "box" / "inner", "max", 5 * MEBIBYTE)
    _cgroup(cgroups / "box", str(900 * MEBIBYTE), 400 * MEBIBYTE, inactive_file=100 * MEBIBYTE)
    assert available_bytes(tree, cgroups) == 600 * MEBIBYTE
    assert default_budget_bytes(tree, cgroups) == 300 * MEBIBYTE
    (tree / "100" / "cgroup").write_text("0::/\n")  # as seen inside a container
    _cgroup(cgroups, str(64 * MEBIBYTE), 80 * MEBIBYTE)
    assert available_bytes(tree, cgroups) == 0


def test_watch_sees_a_peak_between_two_samples() -> None:
    # the spike in memory of its own, whatever ran in this process before and left free memory in the heap
    tune_malloc()
    release_free_memory()
    with MemoryWatch(interval_seconds=30) as watch:
        before = watch.peak_rss_bytes
        spike = bytearray(b"x") * (before + 64 * MEBIBYTE - read_memory().rss_bytes)
        del spike
    assert 60 * MEBIBYTE < watch.peak_rss_bytes - before < 80 * MEBIBYTE


def test_watch_counts_swap_and_children(tree: Path) -> None:
    with MemoryWatch(interval_seconds=30, proc=tree) as watch:
        (tree / "102" / "status").write_text("VmRSS:\t0 kB\nVmSwap:\t 0 kB\n")
    assert watch.peak_rss_bytes == 63 * 1024
    assert watch.peak_swap_bytes == 42 * 1024
    assert [size for _, size in watch.samples] == [63 * 1024, 15 * 1024]


def test_watch_prefers_the_kernels_peak_where_it_is_larger(tree: Path) -> None:
    (tree / "100" / "status").write_text("VmHWM:\t 900 kB\nVmRSS:\t 1 kB\nVmSwap:\t 2 kB\n")
    with MemoryWatch(interval_seconds=30, proc=tree) as watch:
        pass
    assert watch.peak_rss_bytes == 900 * 1024


def test_the_curve_stays_short_and_keeps_its_spikes() -> None:
    watch = MemoryWatch()
    for second in range(100_000):
        watch._record(float(second), 10**9 if second == 77_777 else second % 100, swap_bytes=0)
        if second % 1000 == 0:
            assert len(watch.samples) <= MOST_SAMPLES
    seconds = [moment for moment, _ in watch.samples]
    assert MOST_SAMPLES / 2 <= len(seconds) <= MOST_SAMPLES
    assert seconds == sorted(seconds) and seconds[-1] > 99_000
    assert (77_777.0, 10**9) in watch.samples


def test_watch_reports_as_it_goes_and_leaves_no_thread() -> None:
    seen: list[tuple[float, int]] = []
    watch = MemoryWatch(interval_seconds=0.02, on_sample=lambda seconds, size: seen.append((seconds, size)))
    with watch:
        time.sleep(0.2)
    count = len(seen)
    assert count >= 4 and seen == watch.samples
    time.sleep(0.06)
    assert len(seen) == count
    watch.stop()
    with pytest.raises(RuntimeError, match="started before"):
        watch.start()


def test_hardware_and_versions_are_plain_and_anonymous() -> None:
    found = hardware()
    assert list(found) == [
        "machine",
        "cpu",
        "cores",
        "memory_bytes",
        "board",
        "temperature_celsius",
        "throttled",
    ]
    assert found["cores"] >= 1 and found["memory_bytes"] > 2**28
    assert list(versions()) == ["python", "wasi-edge", "torch", "numpy", "pillow", "onnx", "onnxruntime"]


def test_nothing_heavy_is_imported_to_learn_a_version() -> None:
    code = (
        "import sys; from wasi_edge.memory.process import hardware, total_memory, versions;"
        "hardware(), versions(), total_memory();"
        "assert not {'torch', 'numpy', 'PIL', 'psutil'} & set(sys.modules), sys.modules.keys()"
    )
    if sys.platform.startswith("linux"):
        subprocess.run([sys.executable, "-c", code], check=True)


def test_a_raspberry_pi_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "device-tree").mkdir()
    (tmp_path / "device-tree" / "model").write_bytes(b"Raspberry Pi 5 Model B Rev 1.0\0")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nCPU part\t: 0xd0b\nCPU part\t: 0xd0b\n")
    found = hardware(proc=tmp_path, system=tmp_path)
    assert (found["board"], found["cpu"]) == ("Raspberry Pi 5 Model B Rev 1.0", "Cortex-A76")


def test_the_cpu_sensor_is_preferred(tmp_path: Path) -> None:
    assert temperature_celsius(tmp_path) is None
    for zone, (kind, text) in enumerate({"nvme": "91000", "cpu-thermal": "61250", "odd": "?"}.items()):
        folder = tmp_path / "class" / "thermal" / f"thermal_zone{zone}"
        folder.mkdir(parents=True)
        (folder / "type").write_text(f"{kind}\n")
        (folder / "temp").write_text(f"{text}\n")
    assert temperature_celsius(tmp_path) == 61.25


def test_hardware_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware_module.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    for cpu in range(8):  # 0 and 4 share a core, and so on
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    assert physical_cores(tmp_path) == 4
    monkeypatch.setattr(hardware_module.os, "sched_getaffinity", lambda _: {0, 4}, raising=False)
    assert physical_cores(tmp_path) == 1
    assert physical_cores(tmp_path / "nowhere") == 2


def test_power_is_the_sum_over_the_rails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert power_watts() is None
    command = tmp_path / "vcgencmd"
    readings = ("3V3_SYS_A current(1)=0.5A", "VDD_CORE_A current(7)=2.0A", "3V3_SYS_V volt(9)=3.3V")
    rest = ("VDD_CORE_V volt(15)=0.75V", "EXT5V_V volt(24)=5.1V")
    command.write_text("#!/bin/sh\n" + "".join(f"echo '  {line}'\n" for line in (*readings, *rest)))
    command.chmod(0o755)
    assert power_watts() == pytest.approx(0.5 * 3.3 + 2.0 * 0.75)


def test_throttling_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert throttled() is None
    command = tmp_path / "vcgencmd"
    command.write_text("#!/bin/sh\necho throttled=0x50001\n")
    command.chmod(0o755)
    assert throttled() == {
        "raw": "0x50001",
        "now": ["under-voltage"],
        "since_boot": ["under-voltage", "throttled"],
    }
