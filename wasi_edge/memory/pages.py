"""Pages that leave the process while the address range stays: madvise(2), MADV_DONTNEED."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

_MADV_DONTNEED = 4


def drop_pages(address: int, count: int) -> bool:
    """Let the whole pages within [address, address + count) go; False where that is not possible.

    Anonymous memory reads as zero afterwards, a mapped file as what is on disk: only for contents that nobody needs, or
    that are the file's own.
    """
    libc = _libc()
    page = mmap.PAGESIZE
    first, last = -(-address // page) * page, (address + count) // page * page
    # fails on locked memory, which then stays
    return libc is not None and last > first and libc.madvise(first, last - first, _MADV_DONTNEED) == 0


def can_drop_pages() -> bool:
    """Whether dropped pages really leave: not so on other systems than Linux, or where memory is locked."""
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page[0] = 1
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        return drop_pages(address, mmap.PAGESIZE) and page[0] == 0


@cache
def _libc() -> Any:
    """The C library with madvise declared, None where there is none (or it is not Linux's)."""
    try:
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    except (OSError, AttributeError, TypeError):
        return None
    return libc
