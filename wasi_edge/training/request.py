"""What the owner asked for, and how a run reports what it is doing. No torch.

`FinetuneRequest` is the command line after parsing; `Events` is the run's only way to speak: the command line shows
them with Rich, tests record them, and nothing in `training/` prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from wasi_edge.method import Method, Optimizer, Quality


@dataclass(frozen=True)
class FinetuneRequest:
    """One `wasi-edge finetune` command. None means: choose for me.

    photos          folder of photos
    model           'default', a model folder, a Hugging Face folder, or an earlier run
    budget_bytes    resident and swapped memory of all processes of the command
    out             folder of the result; the command line has already chosen one
    quality         how thoroughly: decides `epochs` where they are not given
    max_seconds     stop in time to be done by then
    train_blocks    blocks that learn, counted from the end
    gradient_rank   directions of each linear's inputs that its gradient keeps
    optimizer       by which wasi, wsi and asi move the weights
    checkpoint_seconds  time between checkpoints
    """

    photos: Path
    out: Path
    budget_bytes: int
    model: str = "default"
    method: Method = Method.WASI
    quality: Quality = Quality.DEFAULT
    epochs: int | None = None
    max_seconds: float | None = None
    epsilon: float | None = None
    val_split: float = 0.2
    seed: int = 0
    image_size: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    train_blocks: int | None = None
    gradient_rank: int | None = None
    optimizer: Optimizer | None = None
    max_temperature: float | None = None
    nice: int | None = None
    threads: int | None = None
    resume: bool = False
    checkpoint_seconds: float = 60.0


class Events(Protocol):
    """What a run tells whoever watches. Called from the main thread only."""

    def message(self, text: str) -> None:
        """One sentence worth keeping on the screen."""

    def planned(self, plan: dict[str, Any], budget_bytes: int, peak_bytes: int, seconds: float) -> None:
        """The plan was chosen; nothing has been started or written."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` units begins (decoding, calibrating, features, training, validating)."""

    def advance(self, done: int, note: str = "") -> None:
        """`done` units of the current stage are finished; `note` is a short live figure such as the loss."""

    def epoch(self, entry: dict[str, Any]) -> None:
        """An epoch was validated; `entry` is its line of `history`."""
