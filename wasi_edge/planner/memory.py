"""How many bytes a training run holds, by arithmetic over the network's shapes. No torch, nothing allocated.

Every figure is a sum over named items, so that a plan can show where each megabyte goes. What the engine keeps per
block and token is the table in `keep.py`; tests compare it with the engine. What cannot be derived
(libraries, thread stacks, packing buffers of the matrix products) is measured by the probe and passed in as the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from wasi_edge.chunks import (
    EVALUATION_BATCH,
    GELU_ROWS,
    HEAD_ROWS,
    NORM_ROWS,
    UPDATE_MATRICES,
    attention_photos,
    window_photos,
)
from wasi_edge.keep import kept_bytes_per_token, rebuilt_bytes_per_token
from wasi_edge.method import Method, Optimizer
from wasi_edge.planner.choices import Choices
from wasi_edge.planner.workload import Workload

FLOAT = 4
# Rounding of every buffer to pages, Python objects, and what malloc loses between blocks.
HEAP_SLACK_BYTES = 4 * 2**20
HEAP_SLACK_SHARE = 0.03
# (O + I, r) alive at once while momentum takes in a gradient and its polar factor is made: 3.3 to 4.1 measured, with
# the small matrices beside them
MOMENTUM_COPIES = 4
# What autograd's tape may take more where the heap serves it. Measured: nothing at micro-batch 16 (2,224 MB, 2,236
# counted without gaps); under glibc's own rules it was as much again.
HEAP_GAP_SHARE = 0.25
# What stays in the heap of the explicit engine where nothing is handed back, of the buffers of the layer at work.
UNTRIMMED_SHARE = 0.25


@dataclass(frozen=True)
class Item:
    """One line of a memory plan."""

    item: str
    bytes: int


def weight_counts(load: Workload) -> tuple[int, int]:
    """Parameters in the blocks' linears, and all others (norms, biases, embeddings, head)."""
    counts = load.counts
    return sum(counts.linears), sum(counts.others) + counts.stem + counts.top


def largest_linear_bytes(load: Workload) -> int:
    """float32 bytes of the largest (O, I) among the linears."""
    return max(out * inner for block in load.linears for out, inner, _ in block) * FLOAT


def subspace_bytes(load: Workload, choices: Choices) -> int:
    """(O, r) and (I, r) of every trained linear: a gradient P with its basis U, or a momentum with its own."""
    return _trained_sizes(load, choices).subspaces


def gram_bytes(load: Workload, choices: Choices) -> int:
    """What is carried with the trained factors, float32: two inverse Gram matrices (K, K) and three vectors (K,)."""
    return _trained_sizes(load, choices).grams


def update_state_bytes(load: Workload, choices: Choices) -> int:
    """State of the rule that updates the factors: momentum and its basis, where it has one, and Gram matrices if they
    are carried."""
    momentum = 0 if load.optimizer is Optimizer.SGD else subspace_bytes(load, choices)
    return momentum + (gram_bytes(load, choices) if choices.carried_grams else 0)


def update_scratch_bytes(linears: Iterable[tuple[int, int, int]], gradient_rank: int) -> int:
    """What the update of the linear at work needs beside its state, of those (O, I, K) that there are, K 0 where dense:
    of factors float64 (K, K) matrices and widened factors, of momentum a few more of its size and float64 (2 r, 2 r)
    matrices, whichever is more; and as much again for the gaps that blocks of many sizes leave."""
    shapes = list(linears)
    matrices = UPDATE_MATRICES * max((rank for _, _, rank in shapes), default=0) ** 2 * 2 * FLOAT
    factors = matrices + max(((out + inner) * rank for out, inner, rank in shapes), default=0) * FLOAT
    momenta = ((out + inner, min(gradient_rank, inner)) for out, inner, _ in shapes)
    momentum = max((MOMENTUM_COPIES * size * r + 3 * (2 * r) ** 2 * 2 for size, r in momenta), default=0) * FLOAT
    return 2 * max(factors, momentum)


def kept_bytes(load: Workload, choices: Choices) -> int:
    """Of a photo: what all trained blocks keep, what the one at work rebuilds, and the z of its linear at work."""
    queries, keeps = load.geometry.queries, choices.keeps()
    kept, rebuilt = 0.0, 0.0
    for number, (shape, keep) in enumerate(zip(load.blocks[load.depth - len(keeps) :], keeps, strict=True), 1):
        # whole inputs are as many numbers as those compressed to their own width
        rank = shape.mlp_width if load.method is Method.WSI else choices.gradient_rank
        sizes = shape.width, shape.mlp_width, shape.heads, rank
        read = queries / shape.tokens if queries and number == len(keeps) else 1.0
        kept += shape.tokens * kept_bytes_per_token(keep, *sizes, read)
        rebuilt = max(rebuilt, shape.tokens * rebuilt_bytes_per_token(keep, *sizes))
        if shape.merged:  # the norm of four tokens of half the width
            kept += shape.tokens * ((2 if keep.compact else 4) * 2 * shape.width + 4)
    most = max((shape.tokens for shape in load.blocks[load.depth - len(keeps) :]), default=0)
    return math.ceil(kept + rebuilt) + FLOAT * choices.gradient_rank * most


def forward_bytes(load: Workload) -> int:
    """Of a photo: what a forward pass holds beside the weights, whether or not anything is kept."""
    geometry = load.geometry
    patches = load.tokens * geometry.channels * geometry.patch_size**2
    # (branch, middle, out, norm's and attention's output), and what reordered or merged tokens are read from
    wide = 5 * load.most_numbers + (load.most_numbers if load.has_entries else 0)
    qkv, inner = 3 * load.most_numbers, max(shape.tokens * shape.mlp_width for shape in load.blocks)
    # a dense weight that learns has no hidden layer, but its output gradient times LayerScale
    scaled = load.most_numbers if load.method.is_explicit and load.has_dense and geometry.layer_scale else 0
    return FLOAT * (max(load.most_hidden, scaled) + qkv + wide + inner + patches)


def shared_bytes(load: Workload) -> int:
    """Of a photo: what forward and backward passes hold beside the weights and what the blocks keep."""
    # of the backward pass alone: gradient of the residual stream, the last norm's x_hat; gradients on their way back to
    # another order
    return forward_bytes(load) + FLOAT * (4 if load.has_entries else 2) * load.most_numbers


def fresh_bytes(load: Workload, micro_batch: int, ample: bool = False) -> int:
    """What is made anew each time: norms, a few tokens at a time, and attention, a few photos at a time (q, k, v and
    their gradients, the output and its; the scores of windows, four times). Norms and one photo are counted twice, for
    the gaps it leaves in the heap."""
    norms, attention = 0, 0
    for shape in set(load.blocks):
        rows = min(micro_batch * shape.tokens, NORM_ROWS)
        norms = max(norms, 2 * 2 * (2 if shape.merged else 1) * shape.width * rows)
        numbers = shape.tokens * 8 * shape.width
        if shape.attended < shape.tokens or load.has_entries:
            photos = min(micro_batch, window_photos(shape.tokens, shape.attended, shape.heads))
            numbers += 4 * shape.tokens * shape.heads * shape.attended
        else:
            photos = min(micro_batch, attention_photos(shape.tokens, ample))
        attention = max(attention, (1 + photos) * numbers)
    return FLOAT * (norms + attention)


def scratch_bytes(load: Workload, micro_batch: int, compact: bool, ample: bool = False) -> int:
    """What is made anew, and the buffers of GELU's derivative (where it is kept), a few tokens at a time, and of a
    factor times LayerScale."""
    few = 0
    if compact:
        few = 2 * max(shape.mlp_width * min(micro_batch * shape.tokens, GELU_ROWS) for shape in load.blocks)
    if load.geometry.layer_scale:
        few += load.largest_left
    return FLOAT * few + fresh_bytes(load, micro_batch, ample)


def widened_bytes(load: Workload, weight_bits: int) -> int:
    """The two buffers in which 16-bit factors of the layer at work are widened."""
    if weight_bits == 32:
        return 0
    return (load.largest_left + load.largest_right) * FLOAT


def token_bytes(tokens: int, width: int) -> int:
    """Disk for one view of a photo after the frozen blocks: float16 and a float32 scale per token."""
    return tokens * (2 * width + 4)


def cached_bytes_per_photo(load: Workload) -> int:
    """`token_bytes` of this workload, wherever the frozen blocks end."""
    return max(token_bytes(shape.tokens, shape.width) for shape in load.blocks)


def training_items(load: Workload, choices: Choices) -> list[Item]:
    """Memory of a run on the explicit engine (`wasi`, `wsi`, `asi`) beyond the base, item by item."""
    counts, micro_batch = load.counts, choices.micro_batch
    first = load.depth - choices.trained_blocks
    linear_bytes, other_bytes = _held_weights(load, choices)
    learning = sum(counts.others[first:]) + counts.top + (0 if first else counts.stem)
    # the patch embedding's gradient is made anew by each micro-batch and then added
    made = 0 if first else load.geometry.width * load.geometry.channels * load.geometry.patch_size**2
    at_work = micro_batch * shared_bytes(load)
    at_work += scratch_bytes(load, micro_batch, choices.compact, ample=not choices.trimmed)
    at_work += widened_bytes(load, choices.weight_bits)
    kept = micro_batch * kept_bytes(load, choices)
    updating = _trained_sizes(load, choices).scratch
    if load.lends and choices.trimmed:  # it works in the memory of the two, as far as it goes
        updating = max(0, updating - kept - at_work)
    items = [
        Item(f"weights ({_how_held(load, choices)})", linear_bytes),
        Item("weights (norms, biases, embeddings, head)", other_bytes),
        Item(
            "gradients (P, U, dense parameters)",
            # and the bases of the step before, until this one is done
            subspace_bytes(load, choices) + _trained_sizes(load, choices).bases + (learning + made) * FLOAT,
        ),
        Item(
            "optimiser state (momentum, Gram matrices, moments)",
            update_state_bytes(load, choices) + learning * 2 * FLOAT + updating,
        ),
        Item("kept for the backward pass", kept),
        Item("buffers of the layer at work", at_work),
        _photos(load, micro_batch),
    ]
    if not choices.trimmed:
        items.append(Item("free memory that stays in the heap", int(UNTRIMMED_SHARE * at_work)))
    return _with_slack(items)


def frozen_items(load: Workload, choices: Choices) -> list[Item]:
    """Memory beyond the base while the output of the frozen blocks is cached, before anything is trained."""
    counts, micro_batch = load.counts, min(choices.micro_batch, EVALUATION_BATCH)
    frozen = slice(0, load.depth - choices.trained_blocks)
    others = sum(counts.others[frozen]) + counts.stem
    items = [
        Item(
            "weights of the frozen blocks",
            _linear_bytes(load, choices, range(load.depth)[frozen]) + others * FLOAT,
        ),
        Item(
            "buffers of the layer at work",
            micro_batch * (forward_bytes(load) + cached_bytes_per_photo(load))
            + widened_bytes(load, choices.weight_bits),
        ),
        _photos(load, micro_batch),
    ]
    return _with_slack(items)


def vanilla_items(load: Workload, choices: Choices) -> list[Item]:
    """Memory of a run of `vanilla` beyond the base: dense weights, gradients, two moments, autograd's tape."""
    geometry, micro_batch = load.geometry, choices.micro_batch
    linears, others = weight_counts(load)
    kept = at_work = 0
    for shape in load.blocks:
        d, m, heads = shape.width, shape.mlp_width, shape.heads
        per_token = 2 * (d + 2) + 3 * d + d + heads + 2 * d + m + m + (2 * d if geometry.layer_scale else 0) + 2 * d
        if load.has_entries:  # rolled and partitioned twice; scores whose bias learns are kept, and their softmax
            per_token += 4 * d + 3 * heads * shape.attended
        kept += micro_batch * shape.tokens * per_token * FLOAT
        at_work = max(at_work, micro_batch * shape.tokens * (2 * m + 6 * d) * FLOAT)
    if geometry.queries:  # of the last block, those of the MLP and of the attention's output
        kept -= micro_batch * shape.tokens * (2 * m + 3 * d) * FLOAT
    items = [
        Item("weights (dense)", (linears + others) * FLOAT),
        Item("gradients", (linears + others) * FLOAT),
        Item("optimiser state", (linears + others) * 2 * FLOAT),
        Item("kept for the backward pass", kept),
        Item("tensors of the layer at work", at_work),
        Item("gaps in the heap", int(HEAP_GAP_SHARE * (kept + at_work)) if choices.reused_heap else 0),
        _photos(load, micro_batch),
    ]
    return _with_slack(items)


def lora_items(load: Workload, choices: Choices) -> list[Item]:
    """Memory of a run of `lora` beyond the base: dense weights, and autograd's tape, in which the inputs of weights
    that stay are missing and all else is as large as ever."""
    rank = load.lora_rank
    linears, others = weight_counts(load)
    learning = load.num_classes * (load.geometry.feature_width + 1)
    kept = at_work = 0
    for shape in load.blocks:
        d, m, heads = shape.width, shape.mlp_width, shape.heads
        learning += 4 * d * rank
        # two norms with their inputs, norm1's output, qkv with queries and values made anew, attention, GELU's input
        per_token = 2 * (d + 2) + d + 5 * d + d + heads + m + 2 * rank + d
        if load.has_entries:
            per_token += 4 * d + 3 * heads * shape.attended
        kept += choices.micro_batch * shape.tokens * per_token * FLOAT
        at_work = max(at_work, choices.micro_batch * shape.tokens * (2 * m + 6 * d) * FLOAT)
    items = [
        Item("weights (dense)", (linears + others) * FLOAT),
        Item(
            "updates, their gradients and moments, one weight with its update",
            (4 * learning + 3 * load.blocks[-1].width ** 2) * FLOAT,
        ),
        Item("kept for the backward pass", kept),
        Item("tensors of the layer at work", at_work),
        Item("gaps in the heap", int(HEAP_GAP_SHARE * (kept + at_work)) if choices.reused_heap else 0),
        _photos(load, choices.micro_batch),
    ]
    return _with_slack(items)


def head_items(load: Workload, choices: Choices, num_photos: int) -> list[Item]:
    """Memory beyond the base while the closed-form head is fitted: weights, one forward pass, and the features'
    statistics; of what training needs later, what exists by then."""
    micro_batch = min(choices.micro_batch, EVALUATION_BATCH)
    buffers = micro_batch * forward_bytes(load) + widened_bytes(load, choices.weight_bits)
    items = [
        Item("weights", sum(_held_weights(load, choices))),
        Item("buffers of the layer at work", buffers),
        Item("Gram matrices of the factors, if carried", gram_bytes(load, choices) if choices.carried_grams else 0),
        Item("bases of the gradients", _trained_sizes(load, choices).bases),
        Item("features and the closed-form fit", head_fit_bytes(load, num_photos)),
        _photos(load, micro_batch),
    ]
    return _with_slack(items)


def head_fit_bytes(load: Workload, num_photos: int) -> int:
    """Features of all photos and the float64 matrices of the ridge fit, which takes a few photos at a time: three, and
    what blocks of the fit before (there are two, of all photos and of half of them) leave between others."""
    width = load.geometry.feature_width
    kept = num_photos * (width * FLOAT + load.num_classes * 12 * 8)
    return kept + HEAD_ROWS * width * 3 * 8 + 4 * width * width * 8


def _held_weights(load: Workload, choices: Choices) -> tuple[int, int]:
    """Bytes of the linears and of all else that is in memory while blocks learn: without frozen blocks and stem where
    what those make of the photos waits on disk."""
    counts, depth = load.counts, load.depth
    held = range(depth - choices.trained_blocks if choices.cached_views else 0, depth)
    others = sum(counts.others[block] for block in held) + counts.top + (0 if choices.cached_views else counts.stem)
    return _linear_bytes(load, choices, held), others * FLOAT


def _linear_bytes(load: Workload, choices: Choices, blocks: range) -> int:
    """The weights of the linears in `blocks`: factors in the bits that were chosen, dense ones in float32 always."""
    counts = [load.linear_counts[block] for block in blocks]
    return sum(dense * FLOAT + factored * choices.weight_bits // 8 for dense, factored in counts)


def _how_held(load: Workload, choices: Choices) -> str:
    """The linears in words: factors in the bits that were chosen, dense weights in 32."""
    factors, dense = f"factors, {choices.weight_bits} bits", "dense, 32 bits"
    return "; ".join(text for text, there in ((factors, load.has_factors), (dense, load.has_dense)) if there)


def _photos(load: Workload, micro_batch: int) -> Item:
    """Decoded views of a micro-batch, and their pixels normalised."""
    per_photo = load.augment_photo_bytes * 2 + 3 * load.image_size**2 * (FLOAT + 1)
    return Item("photos of a micro-batch", micro_batch * per_photo)


class _TrainedSizes(NamedTuple):
    """Bytes of the trained linears: P or momentum with their bases, bases U (I, r) alone, Gram
    matrices, scratch."""

    subspaces: int
    bases: int
    grams: int
    scratch: int


def _trained_sizes(load: Workload, choices: Choices) -> _TrainedSizes:
    """Worked out once: thousands of plans share them."""
    key = choices.trained_blocks, choices.gradient_rank
    if key not in load.memo:
        first = load.depth - choices.trained_blocks
        linears = [linear for block in load.linears[first:] for linear in block]
        ranks = [(out, inner, min(choices.gradient_rank, inner)) for out, inner, _ in linears]
        load.memo[key] = _TrainedSizes(
            subspaces=sum((out + inner) * r * FLOAT for out, inner, r in ranks),
            bases=sum(inner * r * FLOAT for _, inner, r in ranks),
            grams=sum((2 * rank + 3) * rank * FLOAT for _, _, rank in linears),
            scratch=update_scratch_bytes(linears, choices.gradient_rank),
        )
    return load.memo[key]


def total(items: list[Item]) -> int:
    """Sum of all items, bytes."""
    return sum(item.bytes for item in items)


def _with_slack(items: list[Item]) -> list[Item]:
    slack = HEAP_SLACK_BYTES + int(HEAP_SLACK_SHARE * total(items))
    return [*items, Item("heap rounding and headroom", slack)]
