"""The image: base roots of Debian's packages, the Dockerfile, and what ended up in it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.arm64.emulated import Root

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "localhost/wasi-edge:arm64"
# Trixie's Python is the one that Dockerfile.arm64 names.
_SUITE, _PYTHON = "trixie", "3.13"
_PACKAGES = ["base-files", "dash", "coreutils", "python3", "libstdc++6", "zlib1g"]
_BUILD_PACKAGES = ["python3-pip", "findutils"]
_BASE_DOCKERFILE = "FROM scratch\nARG ROOT\nADD ${ROOT} /\n"
# What pip needs of this machine to reach the package index.
_PIP_SETTINGS = ("/etc/ssl/certs", "/etc/pip.conf", "/etc/resolv.conf", "/usr/local/share/ca-certificates")
_COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "ld", "as", "nvcc", "rustc", "go")
_CUDA = ("libcud", "libcublas", "libnv", "libtorch_cuda", "libc10_cuda")


def build(folder: Path) -> None:
    """Make both bases and the image; `folder` is scratch."""
    here = "amd64"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Dockerfile").write_text(_BASE_DOCKERFILE)
    _base(folder, "arm64", "base", _PACKAGES)
    _base(folder, here, "build-base", [*_PACKAGES, *_BUILD_PACKAGES])
    settings = [word for path in _PIP_SETTINGS if os.path.exists(path) for word in ("-v", f"{path}:{path}:ro")]
    _build(
        ["--platform", "linux/arm64", *settings, "-f", str(ROOT / "Dockerfile.arm64"), "-t", IMAGE],
        {
            "PYTHON_VERSION": _PYTHON,
            "BASE": "localhost/wasi-edge-base:arm64",
            "BUILD_BASE": f"localhost/wasi-edge-build-base:{here}",
            "BUILD_ON": f"linux/{here}",
            "RUN_ON": "linux/arm64",
        },
        ROOT,
    )


def _base(folder: Path, architecture: str, name: str, packages: list[str]) -> None:
    """An image of packages, unpacked and not configured: configuring them takes eight minutes under emulation."""
    tar = folder / f"{name}-{architecture}.tar"
    command = ["mmdebstrap", f"--architectures={architecture}", "--variant=extract", "--quiet"]
    subprocess.run([*command, f"--include={','.join(packages)}", _SUITE, str(tar)], check=True)
    tag = f"localhost/wasi-edge-{name}:{architecture}"
    _build(["--platform", f"linux/{architecture}", "-t", tag], {"ROOT": tar.name}, folder)
    tar.unlink()


def _build(options: list[str], arguments: dict[str, str], context: Path) -> None:
    named = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    command = ["buildah", "bud", "--isolation", "chroot", "--format", "docker", "--pull-never", *options, *named]
    done = subprocess.run([*command, str(context)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError("buildah: " + "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:]))


@contextmanager
def mounted() -> Iterator[Root]:
    """The image's files, in a container that is gone afterwards."""
    name = _said(["buildah", "from", "--pull-never", IMAGE])
    try:
        config = json.loads(_said(["buildah", "inspect", "--type", "container", name]))["OCIv1"]["config"]
        yield Root.of(Path(_said(["buildah", "mount", name])), config)
    finally:
        subprocess.run(["buildah", "rm", name], check=False, capture_output=True)


def _said(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def contents(root: Path) -> tuple[int, list[str]]:
    """Bytes of all files of an image, and those that should not be there: compilers and CUDA libraries."""
    size, unwanted, seen = 0, [], set()
    for folder, _, files in os.walk(root):
        for file in files:
            path = Path(folder, file)
            status = path.lstat()
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                size += status.st_size
            if is_unwanted(path.relative_to(root)):
                unwanted.append(str(path.relative_to(root)))
    return size, unwanted


def is_unwanted(path: Path) -> bool:
    """Whether a file of the image is a compiler or a CUDA library."""
    is_program = path.parent.name in ("bin", "sbin") or "libexec" in path.parts
    # x86_64-linux-gnu-gcc-14, cc1plus
    compiler = path.name in ("cc1", "cc1plus") or any(part in _COMPILERS for part in path.name.split("-"))
    return (is_program and compiler) or (path.name.startswith(_CUDA) and ".so" in path.name)
