"""What a block keeps for its backward pass, and what a pass is doing.

`Keep` is the planner's decision for one block; the table of what each choice stores stands in `block.py`, the one
place where it is put into effect. `Pass` tells the layers, once per micro-batch, what this pass is for.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import torch

from wasi_edge.layers.workspace import Workspace


class Keep(enum.StrEnum):
    """How a block's intermediate results reach its backward pass."""

    FULL = "full"  # float32; GELU's input
    COMPACT = "compact"  # float16; GELU's derivative in 8 bits
    RECOMPUTE = "recompute"  # the block's input alone, float32; the rest is computed again

    @property
    def dtype(self) -> torch.dtype:
        """Type in which normalised inputs, queries, keys, values and attention outputs wait."""
        return torch.float16 if self is Keep.COMPACT else torch.float32


@dataclass
class Pass:
    """One run through the network.

    `refresh_basis`: this is the first micro-batch of an optimiser step, so every low-rank linear refreshes the
    subspace of its input before it compresses it.
    """

    workspace: Workspace = field(default_factory=Workspace)
    refresh_basis: bool = False
