"""What machine this is and which versions run on it: the context of every measured figure.

Nothing here identifies the owner: no host name, no user, no serial number. Nothing is
imported to learn its version, torch least of all.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

SYSTEM = Path("/sys")
_PACKAGES = ("wasi-edge", "torch", "numpy", "pillow", "onnx", "onnxruntime")
_CPU_SENSORS = ("cpu-thermal", "cpu_thermal", "soc-thermal", "x86_pkg_temp")
_ARM_PARTS = {
    "0xd03": "Cortex-A53", "0xd05": "Cortex-A55", "0xd07": "Cortex-A57", "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76", "0xd0c": "Neoverse-N1", "0xd40": "Neoverse-V1", "0xd49": "Neoverse-N2",
}  # fmt: skip
# of the CPU's flags, those that multiply integers in one step; the others, from best to worst
_INTEGER_FLAGS = {"avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX VNNI", "i8mm": "i8mm", "asimddp": "dot product",
                  "avx2": "AVX2, without VNNI", "asimd": "NEON, without dot product"}  # fmt: skip
_THROTTLE_BITS = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")


def hardware(proc: Path = Path("/proc"), system: Path = SYSTEM) -> dict[str, Any]:
    """Machine, CPU, memory and how hot it is now; what cannot be read is None.

    Keys: `machine`, `cpu`, `cores` (physical, that this process may use), `memory_bytes`,
    `board` (a Raspberry Pi's model), `temperature_celsius`, `throttled` (see `throttled`).
    """
    return {
        "machine": platform.machine(),
        "cpu": cpu_name(proc),
        "cores": physical_cores(system),
        "memory_bytes": _memory_bytes(),
        "board": read_text(proc / "device-tree" / "model"),
        "temperature_celsius": temperature_celsius(system),
        "throttled": throttled(),
    }


def integer_instructions(proc: Path = Path("/proc")) -> str | None:
    """The best that the CPU has for products of 8-bit integers; None where it does not say."""
    text = read_text(proc / "cpuinfo") or ""
    line = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    flags = set(line.partition(":")[2].split())
    return next((name for flag, name in _INTEGER_FLAGS.items() if flag in flags), None)


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of what it computes with; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def physical_cores(system: Path = SYSTEM) -> int:
    """Cores this process may run on, two hardware threads of one core counted once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    topology = (system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in cpus)
    siblings = [read_text(path) or path.parts[-3] for path in topology]
    return max(1, len(set(siblings)))


def temperature_celsius(system: Path = SYSTEM) -> float | None:
    """Temperature of the CPU; of the hottest sensor where none is known as the CPU's."""
    readings: dict[str, float] = {}
    for zone in sorted((system / "class" / "thermal").glob("thermal_zone*")):
        text = read_text(zone / "temp")
        if text is not None and re.fullmatch(r"-?\d+", text):
            readings.setdefault(read_text(zone / "type") or zone.name, int(text) / 1000)
    of_cpu = [readings[name] for name in _CPU_SENSORS if name in readings]
    return of_cpu[0] if of_cpu else max(readings.values(), default=None)


def throttled() -> dict[str, Any] | None:
    """What the Raspberry Pi's firmware says of throttling; None on other machines.

    `{"raw": "0x50000", "now": [...], "since_boot": [...]}`: bits 0-3 hold now, 16-19 since boot.
    """
    answer = _firmware("get_throttled")
    match = re.search(r"throttled=(0x[0-9a-fA-F]+)", answer or "")
    if match is None:
        return None
    bits = int(match[1], 16)
    return {
        "raw": match[1],
        "now": [name for bit, name in enumerate(_THROTTLE_BITS) if bits >> bit & 1],
        "since_boot": [name for bit, name in enumerate(_THROTTLE_BITS) if bits >> (bit + 16) & 1],
    }


def governor(system: Path = SYSTEM) -> str | None:
    """What governs the clock of the first CPU, such as 'ondemand' or 'performance'; None where nothing says so."""
    return read_text(system / "devices/system/cpu/cpu0/cpufreq/scaling_governor")


def power_watts() -> float | None:
    """Power drawn through the rails of a Raspberry Pi 5's PMIC now; None on other machines."""
    answer = _firmware("pmic_read_adc")
    if answer is None:
        return None
    readings = dict(re.findall(r"(\w+_[AV]) \w+\(\d+\)=([\d.]+)[AV]", answer))
    rails = {name[:-2] for name in readings if name.endswith("_A")}
    pairs = [(readings[f"{rail}_A"], readings.get(f"{rail}_V")) for rail in rails]
    powers = [float(current) * float(voltage) for current, voltage in pairs if voltage is not None]
    return sum(powers) if powers else None


def _firmware(question: str) -> str | None:
    """What the Raspberry Pi's firmware answers; None where there is none."""
    command = shutil.which("vcgencmd")
    if command is None:
        return None
    try:
        return subprocess.run([command, question], capture_output=True, text=True, timeout=2, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None


def cpu_name(proc: Path = Path("/proc")) -> str | None:
    """The processor's name; of ARM cores, what their part numbers mean."""
    text = read_text(proc / "cpuinfo") or ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    if match:
        return match[1].strip()
    parts = dict.fromkeys(re.findall(r"^CPU part\s*:\s*(\w+)$", text, re.MULTILINE))
    if parts:
        return ", ".join(_ARM_PARTS.get(part, f"ARM part {part}") for part in parts)
    return platform.processor() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def read_text(path: Path) -> str | None:
    """The file's text without the blanks and NULs around it; None where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip("\0 \n\t") or None
    except OSError:
        return None
