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
    stored_ranks     of each linear as it is on disk, which is how frozen blocks stay; None: as `ranks`
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
    stored_ranks: Mapping[str, int | None] | None = None
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
    def most_hidden(self) -> int:
        """N K, of the linear and as held, for which that is largest; of one photo."""
        pairs = zip(self.blocks, self.linears, strict=True)
        return max(shape.tokens * padded_rank(rank) for shape, linears in pairs for _, _, rank in linears)

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
    def trained_counts(self) -> list[tuple[int, int]]:
        """Of each block, parameters of its dense linears and of its factors, as they are held in memory."""
        return self._linear_counts(self.ranks)

    @cached_property
    def stored_counts(self) -> list[tuple[int, int]]:
        """The same, of the ranks on disk."""
        return self._linear_counts(self.stored_ranks or self.ranks)

    def _linear_counts(self, ranks: Mapping[str, int | None]) -> list[tuple[int, int]]:
        counts = [[0, 0] for _ in range(self.geometry.depth)]
        for name, (out, inner) in self.geometry.linear_shapes().items():
            rank, block = ranks[name], counts[int(name.split(".")[1])]
            if rank is None:
                block[0] += out * inner
            else:
                block[1] += (out + inner) * padded_rank(rank)
        return [(dense, factored) for dense, factored in counts]

    @cached_property
    def truncated(self) -> list[tuple[int, int, int]]:
        """Block and (O, I) of the linears that are dense on disk and are put into factors where they learn."""
        stored, shapes = self.stored_ranks or {}, self.geometry.linear_shapes()
        dense = [name for name, rank in stored.items() if rank is None and self.ranks[name] is not None]
        return [(int(name.split(".")[1]), *shapes[name]) for name in dense]

    @cached_property
    def largest_rank(self) -> int:
        """The largest K, as it is held."""
        return max(padded_rank(rank) for block in self.linears for _, _, rank in block)

    @cached_property
    def largest_left(self) -> int:
        """O K of the largest left factor."""
        return max(out * padded_rank(rank) for block in self.linears for out, _, rank in block)

    @cached_property
    def largest_right(self) -> int:
        """K I of the largest right factor."""
        return max(inner * padded_rank(rank) for block in self.linears for _, inner, rank in block)

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
