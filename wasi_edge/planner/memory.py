"""How many bytes a training run holds, by arithmetic over the network's shapes. No torch, nothing allocated.

Every figure is a sum over named items, so that a plan can show where each megabyte goes. What the engine keeps per
block and token is the table in `layers/block.py`; `tests/test_planner.py` compares the two. What cannot be derived
(libraries, thread stacks, packing buffers of the matrix products) is measured by the probe and passed in as the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from wasi_edge.chunks import GELU_ROWS, HEAD_ROWS, NORM_ROWS
from wasi_edge.models.geometry import ViTGeometry

FLOAT = 4
# Rounding of every buffer to pages, Python objects, and what malloc loses between blocks.
HEAP_SLACK_BYTES = 6 * 2**20
HEAP_SLACK_SHARE = 0.03
# float64 (K, K) alive at once in `subspace.weight.update_weight`
UPDATE_MATRICES = 8


@dataclass(frozen=True)
class Workload:
    """What is trained: the network's shape at one input size, and how.

    ranks            rank of each linear, None where dense
    method           'wasi', 'vanilla' or 'head'
    """

    geometry: ViTGeometry
    image_size: int
    ranks: Mapping[str, int | None]
    num_classes: int
    method: str
    gradient_rank: int
    augment_photo_bytes: int

    @property
    def tokens(self) -> int:
        """N, tokens per photo."""
        return self.geometry.tokens(self.image_size)


@dataclass(frozen=True)
class Item:
    """One line of a memory plan."""

    item: str
    bytes: int


def weight_counts(load: Workload) -> tuple[int, int]:
    """Parameters in the blocks' linears, and all others (norms, biases, embeddings, head)."""
    shapes = load.geometry.tensor_shapes(load.ranks, load.num_classes)
    linears = others = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        if name == "position":
            count = load.tokens * load.geometry.width
        if name.endswith((".left", ".right")) or (name.startswith("blocks.") and len(shape) == 2):
            linears += count
        else:
            others += count
    return linears, others


def largest_linear_bytes(load: Workload) -> int:
    """float32 bytes of the largest (O, I) among the linears."""
    return max(out * inner for out, inner in load.geometry.linear_shapes().values()) * FLOAT


def update_state_bytes(load: Workload, carried_grams: bool = True) -> int:
    """State of the rule that updates the factors: momentum (O, r) and its basis (I, r) a linear, and, with
    `carried_grams`, two symmetric float64 (K, K) packed in one."""
    state = 0
    for name, (out, inner) in load.geometry.linear_shapes().items():
        state += (out + inner) * min(load.gradient_rank, inner) * FLOAT
        if carried_grams:
            rank = load.ranks[name] or 0
            state += rank * (rank + 1) * 2 * FLOAT
    return state


def update_scratch_bytes(load: Workload) -> int:
    """What the update of the linear at work needs beside its state: float64 (K, K) matrices."""
    return UPDATE_MATRICES * max((rank or 0) ** 2 for rank in load.ranks.values()) * 2 * FLOAT


def saved_bytes_per_token(load: Workload, compact: bool) -> float:
    """What one block keeps for each token between its forward and its backward pass (see `layers/block.py`)."""
    d, m, heads = load.geometry.width, load.geometry.mlp_width, load.geometry.heads
    size = 2 if compact else FLOAT
    kept = size * (2 * d + 3 * d + d) + FLOAT * (2 + heads)
    kept += m if compact else FLOAT * m
    inputs = {"qkv": d, "proj": d, "fc1": d, "fc2": m}
    return kept + FLOAT * sum(min(load.gradient_rank, width) for width in inputs.values())


def forward_bytes_per_token(load: Workload) -> int:
    """What a forward pass holds per token beside the weights, whether or not anything is kept."""
    d, m = load.geometry.width, load.geometry.mlp_width
    hidden = max((rank or 0) for rank in load.ranks.values())
    patches = load.geometry.channels * load.geometry.patch_size**2
    # hidden, qkv, (branch, middle, out, norm's and attention's output), inner, patches
    return FLOAT * (hidden + 3 * d + 5 * d + m + patches)


def shared_bytes_per_token(load: Workload) -> int:
    """What forward and backward passes hold per token beside the weights and what the blocks keep."""
    d = load.geometry.width
    # of the backward pass alone: gradient of the residual stream, the last norm's x_hat
    return forward_bytes_per_token(load) + FLOAT * 2 * d


def scratch_bytes(load: Workload, micro_batch: int, compact: bool) -> int:
    """What goes through the tokens a few at a time, GELU's derivative (where it is kept) and the norms, and the
    attention photo by photo: q, k, v and their gradients, the output and its."""
    d, m = load.geometry.width, load.geometry.mlp_width
    rows = micro_batch * load.tokens
    largest = max((rank or 0) * out for (out, _), rank in _with_rank(load))  # a factor times LayerScale
    few = (2 * m * min(rows, GELU_ROWS) if compact else 0) + 2 * d * min(rows, NORM_ROWS) + load.tokens * 8 * d
    return FLOAT * (few + (largest if load.geometry.layer_scale else 0))


def training_items(load: Workload, micro_batch: int, recomputed_blocks: int, carried_grams: bool = True) -> list[Item]:
    """Memory of a run of `wasi` beyond the base, item by item."""
    geometry = load.geometry
    linears, others = weight_counts(load)
    tokens = micro_batch * load.tokens
    small_gradients = sum(
        out * min(load.gradient_rank, inner) + inner * min(load.gradient_rank, inner)
        for out, inner in geometry.linear_shapes().values()
    )
    kept_blocks = geometry.depth - recomputed_blocks
    kept = kept_blocks * saved_bytes_per_token(load, compact=True)
    if recomputed_blocks:
        kept += recomputed_blocks * FLOAT * geometry.width + saved_bytes_per_token(load, compact=False)
    at_work = tokens * shared_bytes_per_token(load) + scratch_bytes(load, micro_batch, compact=kept_blocks > 0)
    photos = micro_batch * (load.augment_photo_bytes * 2 + 3 * load.image_size**2 * (FLOAT + 1))
    items = [
        Item("weights (factors)", linears * FLOAT),
        Item("weights (norms, biases, embeddings, head)", others * FLOAT),
        Item("gradients (P, U, dense parameters)", (small_gradients + others) * FLOAT),
        Item(
            "optimiser state (momentum, Gram matrices, moments)",
            update_state_bytes(load, carried_grams) + update_scratch_bytes(load) + others * 2 * FLOAT,
        ),
        Item("kept for the backward pass", int(tokens * kept)),
        Item("buffers of the layer at work", at_work),
        Item("photos of a micro-batch", photos),
    ]
    return _with_slack(items)


def vanilla_items(load: Workload, micro_batch: int) -> list[Item]:
    """Memory of a run of `vanilla` beyond the base: dense weights, gradients, two moments, autograd's tape."""
    geometry = load.geometry
    d, m, heads = geometry.width, geometry.mlp_width, geometry.heads
    linears, others = weight_counts(load)
    tokens = micro_batch * load.tokens
    per_block = 2 * (d + 2) + 3 * d + d + heads + 2 * d + m + m + (2 * d if geometry.layer_scale else 0) + 2 * d
    transient = 2 * m + 6 * d
    items = [
        Item("weights (dense)", (linears + others) * FLOAT),
        Item("gradients", (linears + others) * FLOAT),
        Item("optimiser state", (linears + others) * 2 * FLOAT),
        Item("kept for the backward pass", tokens * per_block * geometry.depth * FLOAT),
        Item("tensors of the layer at work", tokens * transient * FLOAT),
        Item("photos of a micro-batch", micro_batch * (2 * load.augment_photo_bytes + 15 * load.image_size**2)),
    ]
    return _with_slack(items)


def head_items(load: Workload, micro_batch: int, num_photos: int, carried_grams: bool = False) -> list[Item]:
    """Memory of a run of `head` beyond the base: weights, one forward pass, and the features' statistics."""
    linears, others = weight_counts(load)
    tokens = micro_batch * load.tokens
    # the trainer exists by then
    grams = update_state_bytes(load, True) - update_state_bytes(load, False) if carried_grams else 0
    items = [
        Item("weights", (linears + others) * FLOAT),
        Item("buffers of the layer at work", tokens * forward_bytes_per_token(load)),
        Item("Gram matrices of the factors, if carried", grams),
        Item("features and the closed-form fit", head_fit_bytes(load, num_photos)),
        Item("photos of a micro-batch", micro_batch * (2 * load.augment_photo_bytes + 15 * load.image_size**2)),
    ]
    return _with_slack(items)


def head_fit_bytes(load: Workload, num_photos: int) -> int:
    """Features of all photos and the float64 matrices of the ridge fit, which takes a few photos at a time."""
    width = load.geometry.feature_width
    kept = num_photos * (width * FLOAT + load.num_classes * 12 * 8)
    return kept + HEAD_ROWS * width * 3 * 8 + 6 * width * width * 8


def _with_rank(load: Workload) -> list[tuple[tuple[int, int], int | None]]:
    """((O, I), rank) of every linear."""
    return [(shape, load.ranks[name]) for name, shape in load.geometry.linear_shapes().items()]


def total(items: list[Item]) -> int:
    """Sum of all items, bytes."""
    return sum(item.bytes for item in items)


def _with_slack(items: list[Item]) -> list[Item]:
    slack = HEAP_SLACK_BYTES + int(HEAP_SLACK_SHARE * total(items))
    return [*items, Item("heap rounding and headroom", slack)]
