"""The machine: board, processor, memory, heat. Everything is read from /proc and /sys, whose roots may be others."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wasi_edge.doctor.finding import Finding, bad, good, warning
from wasi_edge.memory import hardware
from wasi_edge.units import format_size

_MB = 2**20
# the least that the embedded model trains in, beside a system that needs some itself
_LITTLE_BYTES, _ENOUGH_BYTES = 320 * _MB, 640 * _MB
_SMALL_BOARD_BYTES = 1100 * _MB
_HOT, _TOO_HOT = 75.0, 82.0  # a Pi 5 slows down from 80 °C on, and more from 85
_CMDLINE = "add 'cgroup_enable=memory cgroup_memory=1' to the line in /boot/firmware/cmdline.txt and reboot"


@dataclass(frozen=True)
class Machine:
    """Where to look; tests look at other roots."""

    proc: Path = Path("/proc")
    system: Path = Path("/sys")
    root: Path = Path("/")
    page_bytes: int = field(default_factory=lambda: os.sysconf("SC_PAGE_SIZE"))
    architecture: str = field(default_factory=platform.machine)
    pointer_bits: int = field(default_factory=lambda: 64 if platform.architecture()[0] == "64bit" else 32)
    firmware: Callable[[], dict[str, Any] | None] = hardware.throttled

    def text(self, *names: str) -> str:
        """What a file below /proc holds, '' where there is none."""
        return hardware.read_text(self.proc.joinpath(*names)) or ""

    def meminfo(self, key: str) -> int | None:
        """Bytes of a line of /proc/meminfo."""
        match = re.search(rf"^{key}:\s+(\d+) kB", self.text("meminfo"), re.MULTILINE)
        return int(match[1]) * 1024 if match else None


def examine_machine(machine: Machine) -> Iterator[Finding]:
    """All findings, in the order they are shown."""
    yield _board(machine)
    yield _processor(machine)
    yield _pages(machine)
    yield _memory(machine)
    yield _swap(machine)
    yield _cgroup(machine)
    yield from _governor(machine)
    yield from _temperature(machine)
    yield from _throttling(machine)


def _board(machine: Machine) -> Finding:
    board = machine.text("device-tree", "model")
    if not board:
        place = ", in a container" if _in_container(machine) else ""
        return good("board", f"no Raspberry Pi: {machine.architecture}{place}")
    memory = machine.meminfo("MemTotal")
    size = "" if memory is None else f", {format_size(memory)}"
    if memory is not None and memory < _SMALL_BOARD_BYTES:
        return warning(
            "board",
            f"{board}{size}",
            "predict here; train with --method head or --train-blocks 1, in zram, or on a board with more memory",
        )
    if re.search(r"Pi [1-3]\b|Zero", board):
        return warning("board", f"{board}{size}", "it works, and takes several times as long as a Pi 5")
    return good("board", f"{board}{size}")


def _in_container(machine: Machine) -> bool:
    markers = (machine.root / ".dockerenv", machine.root / "run" / ".containerenv")
    return any(marker.exists() for marker in markers) or "docker" in machine.text("1", "cgroup")


def _processor(machine: Machine) -> Finding:
    if machine.pointer_bits < 64:
        return bad("processor", f"{machine.architecture}, 32-bit programs", "install the 64-bit Raspberry Pi OS")
    name = hardware.cpu_name(machine.proc) or machine.architecture
    count = hardware.physical_cores(machine.system)
    cores = f"{count} core{'s' if count != 1 else ''}"
    if machine.architecture in ("aarch64", "arm64") and re.search(r"^flags\s*:", machine.text("cpuinfo"), re.MULTILINE):
        # an ARM processor lists "Features"; QEMU's user mode shows the file of the machine below
        return warning(
            "processor",
            f"{machine.architecture} emulated on {name}, {cores}",
            "fit for trying things; times and peaks of memory say nothing about a Raspberry Pi",
        )
    integers = hardware.integer_instructions(machine.proc)
    found = f"{name}, {cores}; integers: {integers or 'nothing named'}"
    if integers is None or "without" in integers:
        return warning("processor", found, "nothing to do; models in 8 bits may be no faster here")
    return good("processor", found)


def _pages(machine: Machine) -> Finding:
    preload = machine.text("self", "environ")
    if "jemalloc" in preload and machine.page_bytes > 4096:
        return bad(
            "memory pages",
            f"{machine.page_bytes // 1024} KB, and jemalloc is preloaded",
            "unset LD_PRELOAD: jemalloc is built for pages of 4 KB and aborts",
        )
    return good("memory pages", f"{machine.page_bytes // 1024} KB")


def _memory(machine: Machine) -> Finding:
    total, free = machine.meminfo("MemTotal"), machine.meminfo("MemAvailable")
    if total is None or free is None:
        return warning("memory", "not known", "name --budget yourself")
    limit = _limit(machine)
    found = f"{format_size(free)} of {format_size(total)} free"
    if limit is not None and limit < total:
        found, free = f"{found}, {format_size(limit)} allowed to this container or service", min(free, limit)
    if free < _LITTLE_BYTES:
        return bad("memory", found, "close other programs; the embedded model trains in 300 MB and more")
    if free < _ENOUGH_BYTES:
        return warning("memory", found, "take a --budget that leaves the system 100 MB")
    return good("memory", found)


def _limit(machine: Machine) -> int | None:
    """What the control group allows, None without a limit."""
    for path in ("fs/cgroup/memory.max", "fs/cgroup/memory/memory.limit_in_bytes"):
        text = hardware.read_text(machine.system / path)
        if text is not None and text.isdecimal() and int(text) < 2**60:
            return int(text)
    return None


def _swap(machine: Machine) -> Finding:
    lines = machine.text("swaps").splitlines()[1:]
    places = [line.split() for line in lines if line.split()]
    total = sum(int(words[2]) for words in places) * 1024
    memory = machine.meminfo("MemTotal") or 0
    if any("zram" in words[0] for words in places):
        return good("swap", f"{format_size(total)}, compressed memory (zram)")
    if places:
        return warning(
            "swap",
            f"{format_size(total)} on {places[0][0]}",
            "the budget counts what is swapped, and a card wears out: use zram instead (apt install zram-tools)",
        )
    if memory < _SMALL_BOARD_BYTES:
        return warning("swap", "none", "with so little memory, use zram: apt install zram-tools")
    return good("swap", "none; it is not needed")


def _cgroup(machine: Machine) -> Finding:
    controllers = hardware.read_text(machine.system / "fs" / "cgroup" / "cgroup.controllers")
    if controllers is not None:
        has_memory = "memory" in controllers.split()
    else:
        lines = [line.split() for line in machine.text("cgroups").splitlines()]
        has_memory = any(words[0] == "memory" and words[-1] == "1" for words in lines if words)
    if has_memory:
        return good("memory limits", "the kernel can enforce them (docker --memory, systemd MemoryMax)")
    remedy = _CMDLINE if machine.text("device-tree", "model") else "ask whoever runs this machine for the memory cgroup"
    return warning(
        "memory limits", "the kernel ignores docker --memory and MemoryMax", f"{remedy}; --budget holds without it"
    )


def _governor(machine: Machine) -> Iterator[Finding]:
    found = hardware.governor(machine.system)
    if found == "powersave":
        yield warning(
            "clock",
            "governed to save power",
            "echo ondemand | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
        )
    elif found is not None:
        yield good("clock", f"governed by {found}")


def _temperature(machine: Machine) -> Iterator[Finding]:
    degrees = hardware.temperature_celsius(machine.system)
    if degrees is None:
        return
    found = f"{degrees:.0f} °C"
    if degrees >= _TOO_HOT:
        yield bad("temperature", found, "cool it: a fan or a heat sink, or pause while training with --max-temp 75")
    elif degrees >= _HOT:
        yield warning("temperature", found, "a fan or a heat sink keeps it fast; --max-temp 75 pauses while training")
    else:
        yield good("temperature", found)


def _throttling(machine: Machine) -> Iterator[Finding]:
    state = machine.firmware()
    if state is None:
        return
    power = "use the official power supply and a short cable"
    if state["now"]:
        now = ", ".join(state["now"])
        yield bad("throttling", f"now: {now}", power if "under-voltage" in state["now"] else "cool it: a fan")
    elif state["since_boot"]:
        before = ", ".join(state["since_boot"])
        remedy = power if "under-voltage" in state["since_boot"] else "a fan or a heat sink keeps it fast"
        yield warning("throttling", f"since it was switched on: {before}", remedy)
    else:
        yield good("throttling", "none since it was switched on")
