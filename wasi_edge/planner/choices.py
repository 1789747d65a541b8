"""What the planner is free to decide, and the ways of running that it compares. No torch.

Ways come in tiers. All plans of a tier train the same parameters with gradients of the same rank and differ in memory
and time, up to rounding and to how many augmented views frozen blocks see; a later tier learns less, and is looked at
only where nothing of an earlier one fits: first gradients of smaller rank, then fewer trained blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from wasi_edge.keep import Keep, Rebuild
from wasi_edge.method import Method

MICRO_BATCHES = (16, 12, 8, 6, 4, 3, 2, 1)
# augmented views of each photo that the frozen blocks see where their output is cached on disk
CACHED_VIEWS = 3
# Relative errors of the gradient of all linears, each choice alone against exact training, on real photos with the
# embedded model (`benchmarks/gradient_errors.py`): by rank, of what compact blocks keep, of what they keep where they
# rebuild, of factors in 16 bits.
RANK_ERRORS = {64: 0.25, 32: 0.36, 16: 0.49}
COMPACT_ERROR, REBUILT_ERROR, HALF_WEIGHTS_ERROR = 0.0043, 0.0020, 0.0027
# carried Gram matrices, bits of the factors: rounded factors have other Gram matrices than those carried
_FACTORS = ((True, 32), (False, 32), (False, 16))
_DENSE = ((False, 32),)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How one run is run.

    micro_batch         photos that pass forward and backward together
    trained_blocks      blocks that learn, counted from the end; the others stay as they are
    gradient_rank       r of the compressed inputs of linears
    cached_views        augmented views whose output of the frozen blocks is kept on disk instead of computed anew
    compact             what waits for the backward pass is rounded (`keep.py`)
    rebuilt_attention   blocks, counted from the end, that rebuild their attention in the backward pass
    rebuilt_branches    of those, blocks that rebuild GELU's input too
    recomputed_blocks   of those, blocks that keep their input alone
    carried_grams       hold the Gram matrices of the factors instead of rebuilding them at every step
    weight_bits         32, or 16: factors in float16, rounded stochastically; dense weights stay in float32
    reused_heap         freed blocks stay in the process and are used again: autograd's tape then faults no pages, but
                        its many sizes leave gaps (the explicit engine's few small blocks do not: always on)
    trimmed             the explicit engine hands back all free memory after each update, and works in the pages of
                        buffers while it updates: less memory, and pages that fault in the next step
    """

    micro_batch: int
    trained_blocks: int
    gradient_rank: int
    cached_views: int = 0
    compact: bool = True
    rebuilt_attention: int = 0
    rebuilt_branches: int = 0
    recomputed_blocks: int = 0
    carried_grams: bool = True
    weight_bits: int = 32
    reused_heap: bool = True
    trimmed: bool = True

    def count_keeps(self) -> dict[Keep, int]:
        """How many trained blocks keep what, from the first of them to the last; those that none keeps are left out."""
        ends = (self.trained_blocks, self.rebuilt_attention, self.rebuilt_branches, self.recomputed_blocks, 0)
        counts = {Keep(level, self.compact): ends[level] - ends[level + 1] for level in Rebuild}
        return {keep: count for keep, count in counts.items() if count}

    def keeps(self) -> tuple[Keep, ...]:
        """What each trained block keeps, in the order of the forward pass."""
        return tuple(keep for keep, count in self.count_keeps().items() for _ in range(count))

    def gradient_error(self) -> float | None:
        """About how far these choices move the gradient of the linears, relative to its norm, each as if independent of
        the others; None for a rank that was not measured."""
        if self.gradient_rank not in RANK_ERRORS:
            return None
        rebuilding = self.rebuilt_attention / max(1, self.trained_blocks)
        kept = (1 - rebuilding) * COMPACT_ERROR + rebuilding * REBUILT_ERROR if self.compact else 0.0
        rounded = HALF_WEIGHTS_ERROR if self.weight_bits == 16 else 0.0
        return math.hypot(RANK_ERRORS[self.gradient_rank], kept, rounded)

    def choices(self) -> dict[str, Any]:
        """By name; of a plan, what was chosen alone."""
        return {key.name: getattr(self, key.name) for key in dataclasses.fields(Choices)}


def usual_blocks(method: Method, depth: int, share: float) -> int:
    """How many of so many blocks learn where the count is not given, counted from the end: `share` of them with the
    methods that have a choice."""
    return math.ceil(share * depth) if method.is_explicit else depth


# the ways of a tier with so many photos at once
Ways = Callable[[Sequence[int]], Iterator[Choices]]


def explicit_tiers(
    batch: int, gradient_rank: int, depth: int, blocks: int, named: bool, views: int, has_factors: bool = True
) -> Iterator[Ways]:
    """Tiers of ways to train the last `blocks` of `depth` blocks or, where that does not fit and somebody has not
    `named` just so many, fewer.

    `views`: augmented views of each photo whose pass through frozen blocks may be cached; 0 where the disk is too full.
    Where nobody has named so few blocks, the first tiers run the frozen ones in every epoch, so that each epoch has
    views of its own.
    """
    lower = max(1, gradient_rank // 2)
    first_views = views if named and blocks < depth else 0
    yield partial(_ways, batch, gradient_rank, blocks, first_views, has_factors)
    yield partial(_ways, batch, lower, blocks, first_views, has_factors)
    if named:
        return
    for fewer in range(blocks - 1, 0, -1):
        yield partial(_ways, batch, lower, fewer, views, has_factors)


def _ways(
    batch: int, gradient_rank: int, blocks: int, views: int, has_factors: bool, sizes: Sequence[int]
) -> Iterator[Choices]:
    for size in sizes:
        if size > batch:
            continue
        for cached in {0, views}:
            for carried, bits in _FACTORS if has_factors else _DENSE:
                way = Choices(
                    micro_batch=size,
                    trained_blocks=blocks,
                    gradient_rank=gradient_rank,
                    cached_views=cached,
                    carried_grams=carried,
                    weight_bits=bits,
                )
                if bits == 32:
                    yield dataclasses.replace(way, compact=False, trimmed=False)
                    yield dataclasses.replace(way, compact=False)
                yield from _ladder(way)


def _ladder(way: Choices) -> Iterator[Choices]:
    """From everything kept to everything rebuilt, a block at a time: what saves most for its time comes first."""
    blocks = way.trained_blocks
    for count in range(blocks + 1):
        yield dataclasses.replace(way, rebuilt_attention=count)
    for count in range(1, blocks + 1):
        yield dataclasses.replace(way, rebuilt_attention=blocks, rebuilt_branches=count)
    for count in range(1, blocks + 1):
        yield dataclasses.replace(way, rebuilt_attention=blocks, rebuilt_branches=blocks, recomputed_blocks=count)
