"""`wasi-edge doctor` on machines made of files: a Pi 5, a Pi 4, a Zero 2 W, a throttled Pi, and no Pi at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_finetune import run

from wasi_edge.cli.progress import Heat
from wasi_edge.doctor import software
from wasi_edge.doctor.finding import Status
from wasi_edge.doctor.machine import Machine, examine_machine
from wasi_edge.doctor.software import examine_software

A76 = "Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\n"
A72 = "Features\t: fp asimd evtstrm crc32 cpuid\n"
QUIET = {"raw": "0x0", "now": [], "since_boot": []}
NEW_CGROUPS = {"fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids"}
NO_MEMORY_CGROUP = {"fs/cgroup/cgroup.controllers": "cpuset cpu io pids"}


def cpuinfo(features: str, part: str, cores: int = 4) -> str:
    return "".join(f"processor\t: {n}\n{features}CPU part\t: {part}\n\n" for n in range(cores))


def meminfo(total_mb: int, free_mb: int) -> str:
    return f"MemTotal:       {total_mb * 1024} kB\nMemFree:        1 kB\nMemAvailable:   {free_mb * 1024} kB\n"


def machine(root: Path, proc: dict[str, str], system: dict[str, str], **more) -> Machine:
    for base, files in (("proc", proc), ("sys", system)):
        (root / base).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            path = root / base / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    settings = {"page_bytes": 4096, "architecture": "aarch64", "pointer_bits": 64, "firmware": lambda: QUIET}
    return Machine(proc=root / "proc", system=root / "sys", root=root, **(settings | more))


def temperature(degrees: float) -> dict[str, str]:
    zone = "class/thermal/thermal_zone0"
    return {f"{zone}/type": "cpu-thermal\n", f"{zone}/temp": f"{int(1000 * degrees)}\n"}


def pi5(root: Path, degrees: float = 51.2, **more) -> Machine:
    proc = {
        "device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "cpuinfo": cpuinfo(A76, "0xd0b"),
        "meminfo": meminfo(8063, 6900),
        "swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 2097148 0 100\n",
    }
    system = {
        **NEW_CGROUPS,
        **temperature(degrees),
        "devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    }
    return machine(root, proc, system, page_bytes=16384, **more)


def pi4(root: Path) -> Machine:
    proc = {
        "device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
        "cpuinfo": cpuinfo(A72, "0xd08"),
        "meminfo": meminfo(1900, 1500),
        "swaps": "Filename Type Size Used Priority\n/var/swap file 524284 0 -2\n",
    }
    governor = {"devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n"}
    return machine(root, proc, {**NO_MEMORY_CGROUP, **temperature(77), **governor})


def zero2(root: Path) -> Machine:
    proc = {
        "device-tree/model": "Raspberry Pi Zero 2 W Rev 1.0\0",
        "cpuinfo": cpuinfo(A72, "0xd03"),
        "meminfo": meminfo(416, 260),
        "swaps": "Filename Type Size Used Priority\n",
    }
    return machine(root, proc, {**NO_MEMORY_CGROUP, **temperature(45)})


def desk(root: Path, container: bool = False) -> Machine:
    proc = {
        "cpuinfo": "model name\t: AMD EPYC\nflags\t: fpu sse4_2 avx2 avx512_vnni\n",
        "meminfo": meminfo(24000, 20000),
        "cgroups": "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t1\t1\t1\nmemory\t5\t91\t1\n",
    }
    system = {"fs/cgroup/memory/memory.limit_in_bytes": f"{400 * 2**20}\n"} if container else {}
    made = machine(root, proc, system, architecture="x86_64", firmware=lambda: None)
    if container:
        (root / ".dockerenv").touch()
    return made


def emulated(root: Path) -> Machine:
    """What QEMU's user mode shows: ARM, and the /proc/cpuinfo of the machine below."""
    made = desk(root, container=True)
    return Machine(**{**vars(made), "architecture": "aarch64"})


def found(made: Machine) -> dict[str, tuple[str, str]]:
    return {f.check: (str(f.status), f.found) for f in examine_machine(made)}


def test_a_pi_5_is_fine(tmp_path):
    lines = found(pi5(tmp_path))
    assert {status for status, _ in lines.values()} == {"good"}
    assert lines["board"][1] == "Raspberry Pi 5 Model B Rev 1.0, 8063 MB"
    assert "Cortex-A76" in lines["processor"][1] and "dot product" in lines["processor"][1]
    assert lines["memory pages"][1] == "16 KB"
    assert lines["temperature"][1] == "51 °C" and lines["clock"][1] == "governed by ondemand"
    assert "zram" in lines["swap"][1] and lines["throttling"][1] == "none since it was switched on"


def test_a_pi_4_is_told_what_slows_it(tmp_path):
    lines = {f.check: f for f in examine_machine(pi4(tmp_path))}
    assert {name for name, f in lines.items() if f.status is Status.WARNING} == {
        "processor",
        "swap",
        "memory limits",
        "clock",
        "temperature",
    }
    assert "NEON, without dot product" in lines["processor"].found
    assert "cgroup_enable=memory" in lines["memory limits"].remedy and "zram" in lines["swap"].remedy
    assert "ondemand" in lines["clock"].remedy and "--max-temp" in lines["temperature"].remedy


def test_a_zero_2_w_has_too_little_memory(tmp_path):
    lines = {f.check: f for f in examine_machine(zero2(tmp_path))}
    assert lines["board"].status is Status.WARNING and "--method head" in lines["board"].remedy
    assert lines["memory"].status is Status.BAD and "close other programs" in lines["memory"].remedy
    assert lines["swap"].status is Status.WARNING and "zram" in lines["swap"].remedy


@pytest.mark.parametrize(
    ("now", "before", "status", "remedy"),
    [
        (["under-voltage"], ["under-voltage"], Status.BAD, "power supply"),
        (["throttled"], ["throttled"], Status.BAD, "cool it"),
        ([], ["under-voltage"], Status.WARNING, "power supply"),
        ([], ["frequency capped"], Status.WARNING, "fan"),
    ],
)
def test_a_throttled_pi_says_why(tmp_path, now, before, status, remedy):
    state = {"raw": "0x1", "now": now, "since_boot": before}
    lines = {f.check: f for f in examine_machine(pi5(tmp_path, degrees=84, firmware=lambda: state))}
    assert lines["throttling"].status is status and remedy in lines["throttling"].remedy
    assert lines["temperature"].status is Status.BAD


def test_no_pi_and_a_container_differ(tmp_path):
    plain, boxed = found(desk(tmp_path / "a")), found(desk(tmp_path / "b", container=True))
    assert plain["board"] == ("good", "no Raspberry Pi: x86_64")
    assert boxed["board"] == ("good", "no Raspberry Pi: x86_64, in a container")
    assert plain["memory"][0] == "good" and boxed["memory"][0] == "warning"
    assert "400 MB allowed" in boxed["memory"][1]
    assert "AVX-512 VNNI" in plain["processor"][1] and plain["memory limits"][0] == "good"
    assert "temperature" not in plain and "throttling" not in plain and "clock" not in plain


def test_32_bit_programs_and_a_preloaded_jemalloc_are_bad(tmp_path):
    assert found(pi5(tmp_path / "a", pointer_bits=32))["processor"][0] == "bad"
    made = pi5(tmp_path / "b")
    (made.proc / "self").mkdir()
    (made.proc / "self" / "environ").write_text("HOME=/root\0LD_PRELOAD=/usr/lib/libjemalloc.so.2\0")
    assert found(made)["memory pages"][0] == "bad"


def test_an_empty_machine_is_no_crash(tmp_path):
    lines = found(Machine(tmp_path, tmp_path, tmp_path, 4096, "riscv64", 64, lambda: None))
    assert lines["memory"][0] == "warning"


def test_a_running_pi_shows_its_heat_and_asks_the_firmware_rarely(monkeypatch):
    asked, now = [], [0.0]
    monkeypatch.setattr("wasi_edge.cli.progress.time.monotonic", lambda: now[0])

    def firmware():
        asked.append(now[0])
        return {"raw": "0x4", "now": ["throttled"] if len(asked) > 2 else [], "since_boot": []}

    heat = Heat(lambda: 61.4, firmware)
    assert heat.text() == "61 °C"
    now[0] = 5.0
    assert heat.text() == "61 °C" and len(asked) == 2
    now[0] = 10.5
    assert heat.text() == "61 °C, throttled"
    assert Heat(lambda: 61.4, lambda: None).text() == ""  # no Raspberry Pi


def test_an_emulated_processor_is_called_one(tmp_path):
    status, words = found(emulated(tmp_path))["processor"]
    assert status == "warning" and words.startswith("aarch64 emulated on AMD EPYC, ")


# ---- software ----------------------------------------------------------------------------------

TORCH = {"version": "2.13.0+cpu", "cuda": None, "blas": "open", "onednn": True}


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (TORCH, "good", "BLAS: open, oneDNN: yes, for the CPU"),
        ({**TORCH, "version": "2.13.0", "cuda": "13.0"}, "warning", "built for CUDA 13.0"),
        ({**TORCH, "version": "2.5.1"}, "bad", "2.5.1"),
        ({**TORCH, "onednn": False}, "warning", "oneDNN: no"),
        ({**TORCH, "blas": None}, "warning", "BLAS: not named"),
        ("ImportError: libgomp.so.1", "bad", "cannot be imported: ImportError: libgomp.so.1"),
    ],
)
def test_how_torch_was_built(tmp_path, answer, status, words):
    finding = next(iter(examine_software(tmp_path, lambda: answer)))
    assert (str(finding.status), finding.check) == (status, "torch") and words in finding.found
    assert (finding.remedy is None) == (status == "good")


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "needs a newer processor"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory ran out"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it crashed (SIGSEGV)"),
        ("raise ImportError('libgomp.so.1')", "ImportError: libgomp.so.1"),
    ],
)
def test_how_importing_torch_ends(tmp_path, monkeypatch, ending, words):
    """As on a Pi 4 with a torch that was built for newer processors."""
    monkeypatch.setattr(software, "_QUESTION", ending)
    finding = next(iter(examine_software(tmp_path)))
    assert finding.status is Status.BAD and words in finding.found


@pytest.mark.parametrize(
    ("given", "status"), [(None, "good"), ("4", "good"), ("8", "warning"), ("1", "warning"), ("all", "warning")]
)
def test_threads(given, status):
    environment = {} if given is None else {"OMP_NUM_THREADS": given}
    assert str(software._threads(environment, 4).status) == status


def test_the_disk_is_tried_and_left_clean(tmp_path, monkeypatch):
    assert "a second written" in software._speed(tmp_path).found and list(tmp_path.iterdir()) == []
    assert software._speed(tmp_path / "nowhere").status is Status.BAD
    for free, status in ((100, "bad"), (500, "warning"), (5000, "good")):
        monkeypatch.setattr(
            software.shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free * 2**20})
        )
        assert str(software._space(tmp_path).status) == status


def test_the_command_says_it_in_words_and_in_json(tmp_path):
    done = run("doctor", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == (1 if result["status"] == "bad" else 0)
    names = [finding["check"] for finding in result["findings"]]
    for name in ("board", "processor", "memory", "torch", "threads", "disk space", "extra onnxruntime"):
        assert name in names
    assert all(finding["remedy"] for finding in result["findings"] if finding["status"] != "good")
    shown = run("doctor").stdout
    assert "torch" in shown and "processor" in shown
