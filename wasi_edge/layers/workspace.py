"""Buffers that are allocated once and handed out by name.

A training step asks for the same shapes again and again. Fresh tensors cost page faults (a GELU over 7 MB takes
0.2 ms into memory that is there and 11 ms into memory that must be mapped first) or, if the allocator keeps freed
memory, a peak that nobody can predict. So every large tensor of a step is a view into a buffer of its own name,
made at the size first asked for and kept. What a run holds is then the sum of its buffers, which the planner counts.

The caller owns the aliasing: two tensors alive at the same time must have different names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wasi_edge.memory.pages import drop_pages


class Workspace:
    """Named buffers; `take` returns an uninitialised contiguous view of one."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor of `shape`, contents undefined; the same memory at every call with this name."""
        count = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < count:
            self._buffers[(name, dtype)] = buffer = torch.empty(count, dtype=dtype)
        return buffer[:count].view(shape)

    def keep(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of `value` in the buffer `name`, converted to `dtype`."""
        return self.take(name, tuple(value.shape), dtype).copy_(value)

    def lend(self, count: int) -> None:
        """Give back the memory of the largest buffers, `count` bytes or a little more, until they are taken again.

        For work between two passes. Their contents are lost and their addresses stay: freed and made anew they would
        end up between what that work leaves behind.
        """
        for buffer in sorted(self._buffers.values(), key=lambda buffer: -buffer.nbytes):
            if count <= 0:
                return
            if drop_pages(buffer.data_ptr(), buffer.nbytes):
                count -= buffer.nbytes

    def held_bytes(self) -> int:
        """Bytes of all buffers together."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    def clear(self) -> None:
        """Forget every buffer; memory returns once no view of it is alive."""
        self._buffers.clear()
