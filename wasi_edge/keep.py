"""What a transformer block keeps between its forward and its backward pass: the choices, and their bytes. No torch.

Bytes per token, width D, MLP width M, heads H, gradient rank r, all linears low-rank; `compact` is float16 and, for
GELU, its derivative in 8 bits, the other column float32 and GELU's input:

    kept                        compact          exact           by levels
    norm1 x_hat, rstd           2 D + 4          4 D + 4         all (BLOCK: 4 more, the mean)
    norm2 x_hat, rstd           2 D + 4          4 D + 4         below BLOCK
    z of fc2                    4 r              4 r             below BLOCK
    gelu                        M                4 M             NOTHING, ATTENTION
    qkv                         6 D              12 D            NOTHING
    attention out, lse          2 D + 4 H        4 D + 4 H       NOTHING

The inputs of qkv, proj and fc1 are what the norms and the attention keep anyway. What a level rebuilds it rebuilds from
what it keeps: q, k, v and the attention from norm1's x_hat, GELU's input from norm2's, the whole block from norm1's
x_hat, rstd and mean, which are its input. `layers/block.py` puts that into effect, `planner/` adds it up, a test
compares the two.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Rebuild(enum.IntEnum):
    """What the backward pass computes again; each level includes those before it."""

    NOTHING = 0
    ATTENTION = 1  # product of qkv, attention
    BRANCHES = 2  # and the product of fc1
    BLOCK = 3  # and the product of proj, norm2, the compressed input of fc2


@dataclass(frozen=True)
class Keep:
    """The decision for one block."""

    rebuild: Rebuild = Rebuild.NOTHING
    compact: bool = True


EXACT = Keep(Rebuild.NOTHING, compact=False)
COMPACT = Keep(Rebuild.NOTHING)
RECOMPUTE = Keep(Rebuild.BLOCK)
ALL_KEEPS = tuple(Keep(rebuild, compact) for rebuild in Rebuild for compact in (True, False))


def kept_bytes_per_token(
    keep: Keep, width: int, mlp_width: int, heads: int, gradient_rank: int, read: float = 1.0
) -> float:
    """Bytes that a block keeps for each token until its own backward pass, where a share `read` of them is read."""
    size = 2 if keep.compact else 4
    kept: float = size * width + 4
    if keep.rebuild is Rebuild.BLOCK:
        return kept + 4
    kept += read * (size * width + 4 + _compressed_input(mlp_width, gradient_rank))
    if keep.rebuild < Rebuild.BRANCHES:
        kept += read * (mlp_width if keep.compact else 4 * mlp_width)
    if keep.rebuild < Rebuild.ATTENTION:
        kept += size * 3 * width + read * (size * width + 4 * heads)
    return kept


def rebuilt_bytes_per_token(keep: Keep, width: int, mlp_width: int, heads: int, gradient_rank: int) -> int:
    """Bytes that hold for each token what the block at work has rebuilt, in buffers that all blocks share."""
    rebuilt = 0
    if keep.rebuild >= Rebuild.ATTENTION:
        rebuilt += 4 * heads  # q, k, v and the output stay in the buffers of the layer at work
    if keep.rebuild >= Rebuild.BRANCHES:
        rebuilt += mlp_width if keep.compact else 4 * mlp_width
    if keep.rebuild is Rebuild.BLOCK:
        rebuilt += (2 if keep.compact else 4) * width + 4
        rebuilt += _compressed_input(mlp_width, gradient_rank)
    return rebuilt


def _compressed_input(mlp_width: int, gradient_rank: int) -> int:
    """z (r,) of fc2 in float32."""
    return 4 * min(gradient_rank, mlp_width)
