"""Named buffers, and memory that they lend between two passes."""

from __future__ import annotations

from mmap import PAGESIZE

import torch

from wasi_edge.layers.workspace import Workspace
from wasi_edge.memory import pages
from wasi_edge.memory.pages import can_drop_pages, drop_pages
from wasi_edge.memory.process import read_memory

MB = 2**20


def test_a_buffer_keeps_its_memory_and_grows_when_it_must():
    workspace = Workspace()
    first = workspace.take("a", (10, 4)).fill_(1.0)
    assert workspace.take("a", (5, 4)).data_ptr() == first.data_ptr()
    assert workspace.take("a", (5, 4), torch.float16).data_ptr() != first.data_ptr()
    assert workspace.take("a", (20, 4)).shape == (20, 4)
    assert workspace.held_bytes() == 20 * 4 * 4 + 5 * 4 * 2
    workspace.clear()
    assert workspace.held_bytes() == 0


def test_lent_memory_leaves_the_process_while_the_buffers_stay_where_they_are():
    workspace = Workspace()
    large, small = workspace.take("large", (24 * MB // 4,)).fill_(1.0), workspace.take("small", (10,)).fill_(2.0)
    held, before = workspace.held_bytes(), read_memory().rss_bytes
    workspace.lend(8 * MB)
    assert before - read_memory().rss_bytes > 20 * MB  # the largest buffer, as a whole
    assert workspace.held_bytes() == held and workspace.take("large", (24 * MB // 4,)).data_ptr() == large.data_ptr()
    assert bool((small == 2.0).all())  # enough was lent before its turn came
    large.fill_(3.0)
    assert bool((large == 3.0).all())
    workspace.lend(0)
    assert bool((large == 3.0).all())


def test_only_whole_pages_are_dropped():
    values = torch.ones(4 * MB, dtype=torch.uint8)
    assert drop_pages(values.data_ptr() + 1, 3 * PAGESIZE)
    assert values[0] == 1 and values[-1] == 1
    dropped = int((values == 0).sum())
    assert dropped % PAGESIZE == 0 and 2 * PAGESIZE <= dropped <= 3 * PAGESIZE
    assert not drop_pages(values.data_ptr() + 1, 100)


def test_without_madvise_nothing_is_lent(monkeypatch):
    assert can_drop_pages()
    monkeypatch.setattr(pages, "_libc", lambda: None)
    workspace = Workspace()
    buffer = workspace.take("a", (MB,)).fill_(1.0)
    workspace.lend(MB)
    assert bool((buffer == 1.0).all())
    assert not can_drop_pages()
