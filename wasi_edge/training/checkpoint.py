"""Checkpoints that survive a power cut.

    checkpoint/step-00000042/state.safetensors    every tensor of the trainer
    checkpoint/step-00000042/manifest.json        progress, and the SHA-256 of the tensors; written last

A checkpoint counts when its manifest exists and the hash agrees; the newest that does is resumed from. The one before
is kept until the next is complete. Free disk space is checked before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wasi_edge.atomic import sweep_orphans, write_json_atomic
from wasi_edge.errors import WasiEdgeError
from wasi_edge.tensorfile import TensorFile, TensorWriter
from wasi_edge.units import format_size

_STATE, _MANIFEST = "state.safetensors", "manifest.json"
_KEPT = 2
_SPARE_DISK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified. `progress` is the dictionary given to `save_checkpoint`."""

    folder: Path
    step: int
    progress: dict[str, Any]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by name, read one at a time."""
        with TensorFile(self.folder / _STATE) as file:
            for name in file:
                yield name, torch.from_numpy(file.read(name))


def save_checkpoint(root: Path, step: int, tensors: Mapping[str, Tensor], progress: dict[str, Any]) -> Path:
    """Write checkpoint `step` below `root` and drop all but the newest two. One of this step that verifies stays.

    Raises WasiEdgeError where the disk is full; the older checkpoints are then still there.
    """
    folder = root / f"step-{step:08d}"
    if (stored := _verified(folder)) is not None and stored.progress == progress:
        return folder
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    # the writer stages the data beside the target: twice the size for a moment
    if free < 2 * needed + _SPARE_DISK_BYTES:
        raise WasiEdgeError(
            f"a checkpoint needs {format_size(2 * needed + _SPARE_DISK_BYTES)} of free disk, {root} has "
            f"{format_size(free)}: free some space and go on with --resume"
        )
    # a checkpoint of this step from before a crash: its manifest must not vouch for the new tensors
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with TensorWriter(folder / _STATE) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor.contiguous().numpy())
    manifest = {"step": step, "sha256": _sha256(folder / _STATE), "progress": progress}
    write_json_atomic(folder / _MANIFEST, manifest)
    for old in sorted(root.glob("step-*"))[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def latest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest checkpoint below `root` whose hash agrees, None if there is none."""
    for folder in sorted(root.glob("step-*"), reverse=True):
        sweep_orphans(folder)
        if (checkpoint := _verified(folder)) is not None:
            return checkpoint
    return None


def drop_checkpoints(root: Path) -> None:
    """Remove every checkpoint below `root`: the run is complete."""
    for folder in root.glob("step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _verified(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, None where its manifest is missing or its hash does not agree."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["sha256"] == _sha256(folder / _STATE):
            return Checkpoint(folder, int(manifest["step"]), manifest["progress"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
