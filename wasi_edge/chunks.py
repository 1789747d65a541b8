"""How much is worked on at a time, or held more coarsely, where the whole would be too large.

The engine obeys these and the planners count with them.
"""

from __future__ import annotations

# tokens, in GELU's derivative: its float scratch stays in the cache
GELU_ROWS = 256
# tokens, in LayerNorm
NORM_ROWS = 512
# photos whose features the ridge fit of the head holds in float64
HEAD_ROWS = 128
# photos that pass through the network together while a checkpoint is converted
CONVERSION_PHOTOS = 8
# inputs beyond which a calibration moment is kept in float32
WIDE_INPUT = 1024
# rows of a factor that share one buffer of random bits while they are rounded
ROUNDING_ROWS = 128
# float64 (K, K) alive at once in `subspace.weight`: 6.6 in a step, 8.6 while a pair is made orthonormal
UPDATE_MATRICES = 9
# most photos that pass through the network together where nothing is trained
EVALUATION_BATCH = 8
# ranks are padded to a multiple of this while a network is in memory: kernels of matrix products waste time on the rest
RANK_MULTIPLE = 8
# photos together in attention: their tokens are work enough for the cores, and what the kernels return stays small
ATTENTION_ROWS = 128
# a gradient's basis is refreshed from a share of the tokens, as long as these are enough for its rank
_SAMPLED_SHARE, _FEWEST_SAMPLED, _MOST_SAMPLED = 4, 256, 512


def padded_rank(rank: int) -> int:
    """The next multiple of RANK_MULTIPLE."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def attention_photos(tokens: int) -> int:
    """How many photos of so many tokens pass through attention together."""
    return max(1, ATTENTION_ROWS // tokens)


def sampled_tokens(tokens: int) -> int:
    """How many of all tokens of a micro-batch a basis is refreshed from."""
    return min(tokens, _MOST_SAMPLED, max(_FEWEST_SAMPLED, tokens // _SAMPLED_SHARE))
