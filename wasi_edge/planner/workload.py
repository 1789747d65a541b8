"""What is to be trained, as the planner sees it: shapes, ranks and parameters counted by where they are. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from wasi_edge.chunks import padded_rank
from wasi_edge.method import Method, Optimizer
from wasi_edge.models.geometry import BlockShape
from wasi_edge.models.geometry_swin import Geometry


@dataclass(frozen=True)
class Workload:
    """What is trained: the network's shape at one input size, and how.

    ranks            rank of each linear, None where dense
    lora_rank        of the updates of `lora`, 0 for other methods
    lends            whether buffers can lend their pages to the update (`memory/pages.py`)
    optimizer        by which the explicit engine moves the weights
    """

    geometry: Geometry
    image_size: int
    ranks: Mapping[str, int | None]
    num_classes: int
    method: Method
    augment_photo_bytes: int
    lora_rank: int = 0
    lends: bool = True
    optimizer: Optimizer = Optimizer.POLAR

    @cached_property
    def tokens(self) -> int:
        """N, tokens per photo, where they come to the first block."""
        return self.geometry.tokens(self.image_size)

    @cached_property
    def blocks(self) -> list[BlockShape]:
        """Shapes of all blocks."""
        return self.geometry.block_shapes(self.image_size)

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return self.geometry.depth

    @property
    def has_entries(self) -> bool:
        """Whether tokens change their order between blocks."""
        return self.geometry.has_windows

    @cached_property
    def most_numbers(self) -> int:
        """N D of the block for which that is largest."""
        return max(shape.tokens * shape.width for shape in self.blocks)

    @cached_property
    def has_factors(self) -> bool:
        """Whether any linear is in factors."""
        return any(rank is not None for rank in self.ranks.values())

    @cached_property
    def has_dense(self) -> bool:
        """Whether any linear is dense."""
        return any(rank is None for rank in self.ranks.values())

    @cached_property
    def most_hidden(self) -> int:
        """N K, of the linear in factors and as held, for which that is largest; of one photo."""
        pairs = zip(self.blocks, self.linears, strict=True)
        return max(shape.tokens * _held_rank(rank) for shape, linears in pairs for _, _, rank in linears)

    @cached_property
    def linears(self) -> list[list[tuple[int, int, int]]]:
        """(O, I, K) of the linears of each block, K 0 where dense."""
        shapes = self.geometry.linear_shapes()
        named = [(name, out, inner, self.ranks[name] or 0) for name, (out, inner) in shapes.items()]
        return [
            [(out, inner, rank) for name, out, inner, rank in named if name.startswith(f"blocks.{block}.")]
            for block in range(self.geometry.depth)
        ]

    @cached_property
    def linear_counts(self) -> list[tuple[int, int]]:
        """Of each block, parameters of its dense linears and of its factors, as they are held in memory."""
        counts = []
        for linears in self.linears:
            dense = sum(out * inner for out, inner, rank in linears if not rank)
            counts.append((dense, sum((out + inner) * _held_rank(rank) for out, inner, rank in linears)))
        return counts

    @cached_property
    def largest_left(self) -> int:
        """O K of the largest left factor, 0 where all linears are dense."""
        return max(out * _held_rank(rank) for block in self.linears for out, _, rank in block)

    @cached_property
    def largest_right(self) -> int:
        """K I of the largest right factor, 0 where all linears are dense."""
        return max(inner * _held_rank(rank) for block in self.linears for _, inner, rank in block)

    @cached_property
    def memo(self) -> dict[tuple[int, int], Any]:
        """What follows from (trained blocks, gradient rank), kept by whoever works it out."""
        return {}

    @cached_property
    def counts(self) -> Counts:
        """Parameters by where they are."""
        depth = self.geometry.depth
        linears, others, stem, top = [0] * depth, [0] * depth, 0, 0
        for name, shape in self.geometry.tensor_shapes(self.ranks, self.num_classes).items():
            count = math.prod(shape)
            if name.startswith("blocks."):
                block = int(name.split(".")[1])
                if len(shape) == 2 and not name.endswith("bias_table"):
                    linears[block] += count
                else:
                    others[block] += count
            elif name == "position":
                stem += self.tokens * self.geometry.width
            elif name.startswith(("patch_embed", "patch_norm", "class_token", "registers")):
                stem += count
            else:
                top += count
        return Counts(tuple(linears), tuple(others), stem, top)


@dataclass(frozen=True)
class Counts:
    """Parameters: of each block's linears, of the rest of each block, before the blocks, after them."""

    linears: tuple[int, ...]
    others: tuple[int, ...]
    stem: int
    top: int


def _held_rank(rank: int) -> int:
    """Columns of a left factor as it is held, 0 where there is none."""
    return padded_rank(rank) if rank else 0
