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
# most photos that pass through the network together while a checkpoint is converted, and numbers of their tokens
CONVERSION_PHOTOS, _CONVERSION_NUMBERS = 8, 800_000
# inputs beyond which a calibration moment is kept in float32
WIDE_INPUT = 1024
# rows of a factor that share one buffer of random bits while they are rounded
ROUNDING_ROWS = 128
# float64 (K, K) alive at once in `subspace.weight`: 6.6 in a step, 8.6 while a pair is made orthonormal
UPDATE_MATRICES = 9
# most photos that pass through the network together where nothing is trained
EVALUATION_BATCH = 8
# groups of linears, of which one moves its weights at each step
TURNS = 2
# ranks are padded to a multiple of this while a network is in memory: kernels of matrix products waste time on the rest
_RANK_MULTIPLE = 8
# tokens together in attention, as far as whole photos allow: work enough for the cores, and what the kernels return
# stays small; more is a little faster where memory is ample
_ATTENTION_TOKENS, _AMPLE_ATTENTION_TOKENS = 128, 800
# windows times heads whose scores are made together: 2 MB of them, at 49 tokens a window
_WINDOW_HEADS = 200
# a gradient's basis is refreshed from a share of the tokens, as long as these are enough for its rank
_SAMPLED_SHARE, _FEWEST_SAMPLED, _MOST_SAMPLED = 8, 256, 512


def padded_rank(rank: int) -> int:
    """Of a weight in factors as it is held: a multiple of eight, with room for the bias as one more column."""
    return (rank // _RANK_MULTIPLE + 1) * _RANK_MULTIPLE


def has_turn(number: int, linears: int, step: int, turns: int = TURNS) -> bool:
    """Whether linear `number` of so many moves at `step`, from 1: the first layers at the first, others at the next."""
    return number * turns // linears == (step - 1) % turns


def attention_photos(tokens: int, ample: bool) -> int:
    """How many photos of so many tokens pass through attention together."""
    return max(1, (_AMPLE_ATTENTION_TOKENS if ample else _ATTENTION_TOKENS) // tokens)


def window_photos(tokens: int, window_tokens: int, heads: int) -> int:
    """How many photos pass through attention within windows together."""
    return max(1, _WINDOW_HEADS // (tokens // window_tokens * heads))


def conversion_photos(numbers: int) -> int:
    """How many photos pass together while a checkpoint is converted, `numbers` N D of a photo's tokens where they are
    most."""
    return max(1, min(CONVERSION_PHOTOS, _CONVERSION_NUMBERS // numbers))


def sampled_tokens(tokens: int) -> int:
    """How many of all tokens of a micro-batch a basis is refreshed from."""
    return min(tokens, _MOST_SAMPLED, max(_FEWEST_SAMPLED, tokens // _SAMPLED_SHARE))
