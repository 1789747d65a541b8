"""Sizes and durations as people write them.

`512MB` is 512 * 2**20 bytes, as Docker reads it; `MiB`, `GB`, plain bytes work too.
"""

from __future__ import annotations

import re

from wasi_edge.errors import UsageError

_SIZE_UNITS = {
    "": 1, "b": 1,
    "k": 2**10, "kb": 2**10, "kib": 2**10,
    "m": 2**20, "mb": 2**20, "mib": 2**20,
    "g": 2**30, "gb": 2**30, "gib": 2**30,
}  # fmt: skip
_DURATION_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes meant by `text` ("512MB", "1.5GiB", "400000000"). Raises `UsageError`."""
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2].lower() not in _SIZE_UNITS:
        raise UsageError(f"'{text}' is not a size: write for example 512MB, 1GB or 536870912")
    size_bytes = int(float(match[1]) * _SIZE_UNITS[match[2].lower()])
    if size_bytes <= 0:
        raise UsageError(f"'{text}' is not a size: it must be above zero")
    return size_bytes


def parse_duration(text: str) -> float:
    """Seconds meant by `text` ("20m", "90s", "1.5h", "1h30m", plain seconds). Raises `UsageError`."""
    compact = re.sub(r"\s+", "", text)
    if not re.fullmatch(r"(?:\d+(?:\.\d+)?[a-z]+)+|\d+(?:\.\d+)?", compact, re.IGNORECASE):
        raise UsageError(f"'{text}' is not a duration: write for example 20m, 90s or 1h30m")
    parts = re.findall(r"(\d+(?:\.\d+)?)([a-z]*)", compact, re.IGNORECASE)
    if any(unit.lower() not in _DURATION_UNITS for _, unit in parts):
        raise UsageError(f"'{text}' is not a duration: its units must be h, m (min) or s")
    seconds = sum(float(number) * _DURATION_UNITS[unit.lower()] for number, unit in parts)
    if seconds <= 0:
        raise UsageError(f"'{text}' is not a duration: it must be above zero")
    return seconds


def format_size(size_bytes: float) -> str:
    """`size_bytes` in MB of 2**20 bytes, as `--budget` reads them ("412 MB")."""
    return f"{size_bytes / 2**20:.0f} MB"


def format_duration(seconds: float) -> str:
    """A duration as a person says it ("45 s", "7.5 min", "1 h 20 min")."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
