"""Pages of shared libraries that importing touched and nothing needs any more.

Importing torch runs start-up code spread over 60 MB of its libraries. Those pages are clean copies of files, yet each
counts as resident memory until the kernel is short of it, which is when a Pi is already in trouble.
`release_library_pages` takes them out of the process at once: the data stays in the page cache, and what the run does
use returns by a fault of microseconds. Measured: 73 MB leave after the import, 35-40 MB are back after a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wasi_edge.memory.pages import drop_pages

SMAPS = Path("/proc/self/smaps")
_LEAST_BYTES = 64 * 2**10


@dataclass
class _Mapping:
    """A mapped file: addresses [first, last), resident bytes, and those of them that are not the file's own."""

    first: int
    last: int
    resident: int = 0
    private: int = 0


def release_library_pages() -> int:
    """Drop the resident pages of read-only file mappings; returns the bytes that left.

    Only mappings that cannot be written and hold nothing but the file's own bytes are touched (relocated data does not
    qualify), so nothing can be lost. Does nothing where the system does not tell (no /proc/self/smaps).
    """
    released = 0
    for mapping in list(_read_only_files()):
        if mapping.private or mapping.resident < _LEAST_BYTES:
            continue
        if drop_pages(mapping.first, mapping.last - mapping.first):
            released += mapping.resident
    return released


def _read_only_files() -> Iterator[_Mapping]:
    """The mappings of files without write permission (proc(5), /proc/pid/smaps)."""
    current: _Mapping | None = None
    try:
        with SMAPS.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, *rest = line.split()
                if not key.endswith(":"):
                    if current is not None:
                        yield current
                    # address, permissions, offset, device, inode, path
                    first, _, last = key.partition("-")
                    is_file = len(rest) > 3 and rest[3] != "0" and "w" not in rest[0]
                    current = _Mapping(int(first, 16), int(last, 16)) if is_file else None
                elif current is not None and key == "Rss:":
                    current.resident = int(rest[0]) * 2**10
                elif current is not None and key in ("Anonymous:", "Private_Dirty:", "Shared_Dirty:"):
                    current.private += int(rest[0]) * 2**10
    except (OSError, ValueError, IndexError):
        return
    if current is not None:
        yield current
