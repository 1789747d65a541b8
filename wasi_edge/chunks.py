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
