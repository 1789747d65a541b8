"""Dropping clean library pages: they leave, come back when used, and nothing that can change is touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wasi_edge.memory import libraries, pages

needs_smaps = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system has no /proc/self/smaps")

TRAIN_BEFORE_AND_AFTER = """
import torch
from wasi_edge.memory.libraries import release_library_pages
from wasi_edge.memory.process import read_memory

def work():
    torch.manual_seed(0)
    x = torch.randn(64, 64, requires_grad=True)
    (torch.nn.functional.gelu(x @ x).softmax(-1).square().sum()).backward()
    return float(x.grad.double().square().sum())

first = work()
before = read_memory()
released = release_library_pages()
after = read_memory()
assert work() == first
print(released, before.rss_bytes - after.rss_bytes, before.file_bytes, after.file_bytes)
"""


@needs_smaps
def test_torch_works_as_before_without_the_pages_it_was_loaded_with() -> None:
    answer = subprocess.run([sys.executable, "-c", TRAIN_BEFORE_AND_AFTER], check=True, capture_output=True, text=True)
    released, left, file_before, file_after = (int(word) for word in answer.stdout.split())
    assert released > 20 * 2**20
    assert left > 0.8 * released
    assert file_after < file_before - 0.8 * released


SMAPS = """\
00400000-00500000 r-xp 00000000 08:02 173521 /usr/lib/clean.so
Rss:                 512 kB
Anonymous:             0 kB
Private_Dirty:         0 kB
VmFlags: rd ex mr mw me
00600000-00700000 r--p 00000000 08:02 173521 /usr/lib/relocated.so
Rss:                 512 kB
Private_Dirty:         8 kB
Anonymous:             8 kB
00800000-00900000 rw-p 00000000 08:02 173521 /usr/lib/data.so
Rss:                 512 kB
00a00000-00b00000 r--p 00000000 00:00 0
Rss:                 512 kB
00c00000-00d00000 r--p 00000000 08:02 99 /usr/lib/small page.so
Rss:                   4 kB
"""


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, int, int]]:
    """The calls of madvise that a process with the mappings above would make."""
    calls: list[tuple[int, int, int]] = []

    class Madvise:
        argtypes: tuple[type, ...] = ()

        def __call__(self, *call: int) -> int:
            calls.append(call)  # type: ignore[arg-type]
            return 0

    class Libc:
        madvise = Madvise()

    (tmp_path / "smaps").write_text(SMAPS)
    monkeypatch.setattr(libraries, "SMAPS", tmp_path / "smaps")
    monkeypatch.setattr(pages, "_libc", lambda: Libc())
    return calls


def test_only_clean_read_only_file_pages_are_dropped(dropped: list[tuple[int, int, int]]) -> None:
    assert libraries.release_library_pages() == 512 * 1024
    assert dropped == [(0x400000, 0x100000, 4)]


def test_a_system_that_does_not_tell_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(libraries, "SMAPS", tmp_path / "absent")
    assert libraries.release_library_pages() == 0
