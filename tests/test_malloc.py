"""Settings made before torch: what they change is measured in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from wasi_edge.errors import UsageError
from wasi_edge.memory import malloc

needs_glibc = pytest.mark.skipif(malloc._glibc() is None, reason="only glibc has mallopt")

# A freed 30 MB block teaches glibc to serve such sizes from the heap, where the last block of
# many pins all those freed below it.
PINNED_HEAP = """
from wasi_edge.memory.malloc import release_free_memory, tune_malloc
from wasi_edge.memory.process import read_memory
if {tune}:
    assert tune_malloc()
bytearray(30 << 20)
before = read_memory().rss_bytes
blocks = [bytearray(b"x") * (1 << 20) for _ in range(64)]
blocks[:-1] = []
kept = read_memory().rss_bytes - before
release_free_memory()
print(kept, read_memory().rss_bytes - before)
"""


def _kept_megabytes(tune: bool) -> tuple[float, float]:
    code = PINNED_HEAP.format(tune=tune)
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    kept, after_release = (int(word) / 2**20 for word in answer.stdout.split())
    return kept, after_release


@needs_glibc
def test_freed_blocks_leave_the_process_only_when_tuned() -> None:
    tuned, _ = _kept_megabytes(tune=True)
    untuned, released = _kept_megabytes(tune=False)
    assert tuned < 4
    assert untuned > 40, "glibc no longer keeps freed blocks: is the setting still worth its page faults?"
    assert released < 4


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Musl:
        """A C library without glibc's functions."""

    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: Musl())
    assert malloc.tune_malloc() is False
    assert malloc.release_free_memory() is False


@pytest.fixture
def no_torch_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for variable in malloc._THREAD_VARIABLES:
        monkeypatch.setenv(variable, "x")  # so that it is put back afterwards
        monkeypatch.delenv(variable)


@pytest.mark.usefixtures("no_torch_yet")
@pytest.mark.parametrize(
    ("environment", "asked", "expected"),
    [
        (None, None, "cores"),
        ("3", None, 3),
        ("4,2", None, 4),
        ("many", None, "cores"),
        ("0", None, "cores"),
        ("3", 1, 1),
        (None, 64, 64),
    ],
)
def test_threads(
    environment: str | None, asked: int | None, expected: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(malloc, "physical_cores", lambda: 7)
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    count = malloc.settle_threads(asked)
    assert count == (7 if expected == "cores" else expected)
    assert {os.environ[variable] for variable in malloc._THREAD_VARIABLES} == {str(count)}


@pytest.mark.usefixtures("no_torch_yet")
def test_no_threads_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="the least is 1"):
        malloc.settle_threads(0)


def test_too_late_after_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    with pytest.raises(RuntimeError, match="before torch"):
        malloc.settle_threads(2)


REUSE = """
from wasi_edge.memory.malloc import reuse_freed_memory, tune_malloc
from wasi_edge.memory.process import read_memory
tune_malloc()
assert reuse_freed_memory(any_size={any_size})
before = read_memory().rss_bytes
block = bytearray(b"x") * ({megabytes} << 20)
del block
kept = read_memory().rss_bytes - before
tune_malloc()
block = bytearray(b"x") * ({megabytes} << 20)
del block
print(kept, read_memory().rss_bytes - before)
"""


@needs_glibc
@pytest.mark.parametrize(
    ("any_size", "megabytes", "stays"), [(False, 1, True), (False, 24, False), (True, 24, True), (True, 100, True)]
)
def test_reused_memory_stays_until_malloc_is_tuned_again(any_size: bool, megabytes: int, stays: bool) -> None:
    code = REUSE.format(any_size=any_size, megabytes=megabytes)
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    kept, afterwards = (int(word) / 2**20 for word in answer.stdout.split())
    assert (kept > 0.5 * megabytes) == stays
    assert afterwards < 0.5 * megabytes
