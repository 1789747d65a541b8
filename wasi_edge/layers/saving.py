"""What a pass through the network is doing; the layers are told once per micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from wasi_edge.layers.workspace import Workspace


@dataclass
class Pass:
    """One run through the network.

    `ample`: memory is, so more is worked on at a time.
    `refresh_basis`: this is the first micro-batch of an optimiser step, so every low-rank linear refreshes the
    subspace of its input before it compresses it. `refresh_seconds`: what that has taken so far, all passes together;
    `gather_seconds`: what bringing tokens to the order of other windows has.
    """

    workspace: Workspace = field(default_factory=Workspace)
    ample: bool = False
    refresh_basis: bool = False
    refresh_seconds: float = 0.0
    gather_seconds: float = 0.0
