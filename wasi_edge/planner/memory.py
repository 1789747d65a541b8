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
# What autograd's tape may take more where the heap serves it. Measured: nothing at micro-batch 16 (2,224 MB, 2,236
# counted without gaps); under glibc's own rules it was as much again.
HEAP_GAP_SHARE = 0.25
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


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the planner is free to decide about a run of `wasi`.

    micro_batch         photos that pass forward and backward together
    recomputed_blocks   blocks, counted from the end, that keep their input alone
    carried_grams       hold the Gram matrices of the factors instead of rebuilding them at every step
    weight_bits         32, or 16: factors in float16, rounded stochastically
    reused_heap         freed blocks stay in the process and are used again: autograd's tape then faults no pages, but
                        its many sizes leave gaps (the explicit engine's few small blocks do not: always on)
    """

    micro_batch: int
    recomputed_blocks: int = 0
    carried_grams: bool = True
    weight_bits: int = 32
    reused_heap: bool = True


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


def subspace_bytes(load: Workload) -> int:
    """(O, r) and (I, r) of every linear: a gradient P with its basis U, or a momentum with its own."""
    shapes = load.geometry.linear_shapes().values()
    return sum((out + inner) * min(load.gradient_rank, inner) for out, inner in shapes) * FLOAT


def gram_bytes(load: Workload) -> int:
    """The Gram matrices of all factors, two symmetric float64 (K, K) packed in one."""
    return sum((rank or 0) * ((rank or 0) + 1) for rank in load.ranks.values()) * 2 * FLOAT


def update_state_bytes(load: Workload, carried_grams: bool = True) -> int:
    """State of the rule that updates the factors: momentum and its basis, and Gram matrices if they are carried."""
    return subspace_bytes(load) + (gram_bytes(load) if carried_grams else 0)


def update_scratch_bytes(load: Workload, weight_bits: int) -> int:
    """What the update of the linear at work needs beside its state: float64 (K, K) matrices, widened factors."""
    matrices = UPDATE_MATRICES * max((rank or 0) ** 2 for rank in load.ranks.values()) * 2 * FLOAT
    if weight_bits == 32:
        return matrices
    return matrices + max((out + inner) * (rank or 0) for (out, inner), rank in _with_rank(load)) * FLOAT


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


def widened_bytes(load: Workload, weight_bits: int) -> int:
    """The two buffers in which 16-bit factors of the layer at work are widened."""
    if weight_bits == 32:
        return 0
    shapes = _with_rank(load)
    left = max(out * (rank or 0) for (out, _), rank in shapes)
    right = max(inner * (rank or 0) for (_, inner), rank in shapes)
    return (left + right) * FLOAT


def training_items(load: Workload, choices: Choices) -> list[Item]:
    """Memory of a run of `wasi` beyond the base, item by item."""
    geometry, micro_batch, recomputed_blocks = load.geometry, choices.micro_batch, choices.recomputed_blocks
    linears, others = weight_counts(load)
    tokens = micro_batch * load.tokens
    kept_blocks = geometry.depth - recomputed_blocks
    kept = kept_blocks * saved_bytes_per_token(load, compact=True)
    if recomputed_blocks:
        kept += recomputed_blocks * FLOAT * geometry.width + saved_bytes_per_token(load, compact=False)
    at_work = tokens * shared_bytes_per_token(load) + scratch_bytes(load, micro_batch, compact=kept_blocks > 0)
    at_work += widened_bytes(load, choices.weight_bits)
    photos = micro_batch * (load.augment_photo_bytes * 2 + 3 * load.image_size**2 * (FLOAT + 1))
    items = [
        Item(f"weights (factors, {choices.weight_bits} bits)", linears * choices.weight_bits // 8),
        Item("weights (norms, biases, embeddings, head)", others * FLOAT),
        Item("gradients (P, U, dense parameters)", subspace_bytes(load) + others * FLOAT),
        Item(
            "optimiser state (momentum, Gram matrices, moments)",
            update_state_bytes(load, choices.carried_grams)
            + update_scratch_bytes(load, choices.weight_bits)
            + others * 2 * FLOAT,
        ),
        Item("kept for the backward pass", int(tokens * kept)),
        Item("buffers of the layer at work", at_work),
        Item("photos of a micro-batch", photos),
    ]
    return _with_slack(items)


def vanilla_items(load: Workload, choices: Choices) -> list[Item]:
    """Memory of a run of `vanilla` beyond the base: dense weights, gradients, two moments, autograd's tape."""
    geometry = load.geometry
    d, m, heads = geometry.width, geometry.mlp_width, geometry.heads
    linears, others = weight_counts(load)
    per_block = 2 * (d + 2) + 3 * d + d + heads + 2 * d + m + m + (2 * d if geometry.layer_scale else 0) + 2 * d
    transient = 2 * m + 6 * d
    micro_batch = choices.micro_batch
    tokens = micro_batch * load.tokens
    kept = tokens * per_block * geometry.depth * FLOAT
    at_work = tokens * transient * FLOAT
    items = [
        Item("weights (dense)", (linears + others) * FLOAT),
        Item("gradients", (linears + others) * FLOAT),
        Item("optimiser state", (linears + others) * 2 * FLOAT),
        Item("kept for the backward pass", kept),
        Item("tensors of the layer at work", at_work),
        Item("gaps in the heap", int(HEAP_GAP_SHARE * (kept + at_work)) if choices.reused_heap else 0),
        Item("photos of a micro-batch", micro_batch * (2 * load.augment_photo_bytes + 15 * load.image_size**2)),
    ]
    return _with_slack(items)


def head_items(load: Workload, micro_batch: int, num_photos: int, trained: Choices | None = None) -> list[Item]:
    """Memory of a run of `head` beyond the base: weights, one forward pass, and the features' statistics.

    `trained`: how the network will be trained afterwards, for what exists by then.
    """
    linears, others = weight_counts(load)
    tokens = micro_batch * load.tokens
    grams = gram_bytes(load) if trained is not None and trained.carried_grams else 0
    bits = 32 if trained is None else trained.weight_bits
    items = [
        Item("weights", linears * bits // 8 + others * FLOAT),
        Item("buffers of the layer at work", tokens * forward_bytes_per_token(load) + widened_bytes(load, bits)),
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
