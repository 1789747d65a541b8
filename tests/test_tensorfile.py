"""Safetensors files: interoperable, bounded, atomic."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from wasi_edge import tensorfile
from wasi_edge.atomic import sweep_orphans, write_bytes_atomic, write_json_atomic
from wasi_edge.errors import ArtefactError
from wasi_edge.tensorfile import TensorFile, TensorWriter

RNG = np.random.default_rng(0)
TENSORS: dict[str, np.ndarray] = {
    "weight": RNG.standard_normal((5, 7)).astype(np.float32),
    "half": RNG.standard_normal((3, 2, 2)).astype(np.float16),
    "wide": RNG.standard_normal(4),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "ids": np.arange(6, dtype=np.int64).reshape(2, 3),
    "mask": np.array([True, False, True]),
    "bytes": np.arange(256, dtype=np.uint8),
    "größe": np.ones(2, np.float32),
}


def write(path: Path, tensors: dict, metadata: dict | None = None) -> Path:
    with TensorWriter(path, metadata) as writer:
        for name, array in tensors.items():
            writer.add(name, array)
    return path


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_official_library_reads_what_we_write(tmp_path):
    path = write(tmp_path / "a.safetensors", TENSORS, {"format": "pt"})
    loaded = safetensors.numpy.load_file(path)
    assert set(loaded) == set(TENSORS)
    for name, array in TENSORS.items():
        assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
        np.testing.assert_array_equal(loaded[name], array)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_official_library_writes(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "a.safetensors", {"by": "them"})
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"by": "them"}
        assert set(file.keys()) == set(file) == set(TENSORS)
        for name, array in TENSORS.items():
            assert file.shape(name) == array.shape and file.dtype(name) == array.dtype
            found = file.read(name)
            np.testing.assert_array_equal(found, array)
            assert found.flags.writeable and found.flags.c_contiguous and found.dtype == array.dtype


def test_bfloat16_is_widened_exactly_and_float16_kept_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "CHUNK_BYTES", 64)  # several chunks
    values = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    values[0, 0], values[0, 1] = float("inf"), -0.0
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"b": values.bfloat16(), "h": values.half()}, path)
    with TensorFile(path) as file:
        assert file.stored_dtype("b") == "BF16" and file.dtype("b") == np.float32
        np.testing.assert_array_equal(file.read("b"), values.bfloat16().float().numpy())
        assert file.read("h").dtype == np.float16
        wide = file.read("h", np.float32)
        assert wide.dtype == np.float32
        np.testing.assert_array_equal(wide, values.half().float().numpy())
        np.testing.assert_array_equal(file.read_rows("b", 20, 31), values.bfloat16().float().numpy()[20:31])
        np.testing.assert_array_equal(file.read_rows("h", 7, 9), values.half().numpy()[7:9])
        assert file.read_rows("h", 50, 50).shape == (0, 3)
        for start, stop in ((-1, 2), (3, 2), (0, 51)):
            with pytest.raises(IndexError):
                file.read_rows("h", start, stop)
        with pytest.raises(ArtefactError, match="no tensor named 'x'"):
            file.read("x")


@pytest.mark.parametrize(
    "array", [np.arange(12, dtype=np.float32).reshape(3, 4).T, np.arange(4, dtype=">f4"), np.ones(6)[::2]]
)
def test_strided_and_foreign_byte_orders_are_written_as_values(tmp_path, array):
    path = write(tmp_path / "a.safetensors", {"x": array})
    np.testing.assert_array_equal(safetensors.numpy.load_file(path)["x"], array)


HOSTILE = {
    "terabyte header": (b"{}", b"", 2**40, "cut short"),
    "huge header length": (b"{}", b"", 2**64 - 1, "cut short"),
    "not json": (b"{nonsense", b"", None, "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", None, "not valid JSON"),
    "deeply nested": (b"[" * 100_000, b"", None, "not valid JSON"),
    "a list": ([], b"", None, "JSON object"),
    "terabyte tensor": ({"x": entry("F32", [2**38], [0, 2**40])}, b"12345678", None, "cut short"),
    "shape beyond offsets": ({"x": entry("F32", [2**40], [0, 8])}, b"12345678", None, "needs"),
    "product overflows": ({"x": entry("F32", [2**32, 2**32, 0], [0, 0])}, b"", None, "impossible shape"),
    "endless digits": (b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}", b"", None, "too large"),
    "truncated data": ({"x": entry()}, b"1234", None, "cut short"),
    "trailing data": ({"x": entry()}, b"123456789", None, "damaged"),
    "overlap": (
        {"x": entry(offsets=[0, 8]), "y": entry(offsets=[4, 12])},
        b"123456789012",
        None,
        "overlaps",
    ),
    "gap": ({"x": entry(offsets=[4, 12])}, b"123456789012", None, "gap"),
    "negative offset": ({"x": entry(offsets=[-8, 0])}, b"", None, "data_offsets"),
    "reversed offsets": ({"x": entry(offsets=[8, 0])}, b"12345678", None, "needs"),
    "three offsets": ({"x": entry(offsets=[0, 8, 8])}, b"12345678", None, "data_offsets"),
    "negative shape": ({"x": entry(shape=[-2])}, b"12345678", None, "impossible shape"),
    "fractional shape": ({"x": entry(shape=[2.0])}, b"12345678", None, "impossible shape"),
    "boolean shape": ({"x": entry(shape=[True, 2])}, b"12345678", None, "impossible shape"),
    "too many dimensions": ({"x": entry(shape=[1] * 80 + [2])}, b"12345678", None, "impossible shape"),
    "unknown dtype": ({"x": entry("F8_E4M3", [8])}, b"12345678", None, "dtype 'F8_E4M3'"),
    "dtype no text": ({"x": entry(["F32"])}, b"12345678", None, "dtype"),
    "missing key": ({"x": {"dtype": "F32", "shape": [2]}}, b"12345678", None, "exactly"),
    "entry no object": ({"x": 5}, b"", None, "exactly"),
    "repeated name": (
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b"12345678",
        None,
        "twice",
    ),
    "metadata no text": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_in_one_sentence(tmp_path, case):
    header, data, length, expected = HOSTILE[case]
    path = raw_file(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(ArtefactError, match=expected) as caught:
        TensorFile(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 + len(str(path)) and str(path) in message


def test_a_header_beyond_the_bound_is_not_even_read(tmp_path):
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as file:
        file.write((20 * 2**20).to_bytes(8, "little"))
        file.truncate(64 * 2**20)  # sparse
    with pytest.raises(ArtefactError, match="header of"):
        TensorFile(path)


def test_missing_files_folders_and_pipes(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").write_bytes(b"")
    for name, expected in (("none", "cannot be read"), ("pipe", "folder or device"), ("empty", "cut short")):
        with pytest.raises(ArtefactError, match=expected):
            TensorFile(tmp_path / name)
    with pytest.raises(ArtefactError, match="folder or device"):
        TensorFile(tmp_path)


def test_a_file_cut_after_opening_is_noticed(tmp_path):
    path = write(tmp_path / "a.safetensors", TENSORS)
    with TensorFile(path) as file:
        os.truncate(path, 600)
        with pytest.raises(ArtefactError, match="ended while being read"):
            for name in file:
                file.read(name)


def test_no_descriptor_is_left_open(tmp_path):
    good, bad = write(tmp_path / "a", TENSORS), raw_file(tmp_path / "b", [])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        TensorFile(good).close()
        with pytest.raises(ArtefactError):
            TensorFile(bad)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write(tmp_path / "a.safetensors", {"x": np.ones(3)})
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), TensorWriter(path) as writer:
        writer.add("y", np.ones(5))
        raise KeyboardInterrupt
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_a_failing_rename_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ArtefactError, match="free some space"), TensorWriter(tmp_path / "a") as writer:
        writer.add("x", np.ones(2))
    with pytest.raises(ArtefactError, match="free some space"):
        write_bytes_atomic(tmp_path / "b", b"1")
    assert os.listdir(tmp_path) == []


def test_wrong_use_of_the_writer(tmp_path):
    with TensorWriter(tmp_path / "a") as writer:
        writer.add("x", np.ones(2))
        for name, array in (("x", np.ones(2)), ("__metadata__", np.ones(2)), ("c", np.ones(2, complex))):
            with pytest.raises(ValueError):
                writer.add(name, array)
    with pytest.raises(ValueError, match="outside"):
        writer.add("y", np.ones(2))
    with TensorFile(tmp_path / "a") as file:
        assert file.keys() == ["x"]


def test_killed_writer_leaves_no_target_and_its_orphans_are_swept(tmp_path):
    code = (
        "import sys, time, numpy as np\n"
        "from wasi_edge.tensorfile import TensorWriter\n"
        "with TensorWriter(sys.argv[1]) as writer:\n"
        "    writer.add('x', np.ones(100_000))\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    target = tmp_path / "model.safetensors"
    child = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    assert sweep_orphans(tmp_path) == []  # alive
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    (tmp_path / ".notes.tmp").write_text("not ours")
    left = sorted(os.listdir(tmp_path))
    assert left == [f".model.safetensors.{child.pid}.data.tmp", ".notes.tmp"]
    assert [path.name for path in sweep_orphans(tmp_path)] == left[:1]
    assert os.listdir(tmp_path) == [".notes.tmp"]
    assert sweep_orphans(tmp_path / "none") == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_mode_follows_the_umask(tmp_path, mask, mode):
    old = os.umask(mask)
    try:
        paths = [write(tmp_path / "a", {"x": np.ones(2)}), tmp_path / "b"]
        write_json_atomic(paths[1], {"a": 1})
    finally:
        os.umask(old)
    assert [path.stat().st_mode & 0o777 for path in paths] == [mode, mode]


def test_file_and_folder_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(fd: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_bytes_atomic(tmp_path / "b", b"1")
    assert calls == [str(tmp_path / f".b.{os.getpid()}.tmp"), "rename", str(tmp_path)]


def test_json_is_readable_and_refuses_nan(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"größe": [1, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"größe": [1, None]} and "größe" in text and text.endswith("\n")
    with pytest.raises(ValueError):
        write_json_atomic(tmp_path / "a.json", {"a": float("nan")})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == text


def test_writing_where_one_may_not_names_the_remedy(tmp_path):
    with pytest.raises(ArtefactError, match="choose a folder"), TensorWriter(tmp_path / "no" / "a"):
        pass
