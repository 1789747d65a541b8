"""Floating-point operations of a training step and of a forward pass, by arithmetic over shapes. No torch.

Two counts that must not be mixed:

`step_flops` counts the matrix products that our engine and a vanilla network really do, upkeep included: what the
bounds of `bench` are made of (the ratio that a step would reach if products were all there is). A product of (m, k) and
(k, n) is 2 m k n. Norms, GELU, softmax and copies are left out: they are the distance between bound and reality.

`paper_count` counts linear layers only, as arXiv 2510.09160 prints it: elements of weights and saved inputs times four
bytes, and its FLOP formulas. Its weight gradient is printed in multiply-adds. It says nothing about process memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from wasi_edge.chunks import TURNS, sampled_tokens
from wasi_edge.method import Method
from wasi_edge.models.geometry import BlockShape
from wasi_edge.models.geometry_swin import Geometry

# products of attention forward (scores, mix), and backward with the scores computed again
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5


@dataclass(frozen=True)
class Flops:
    """Of one image: the passes of a training step, what keeps subspaces and weights current, a forward pass alone."""

    train: float
    upkeep: float
    infer: float


def step_flops(
    geometry: Geometry,
    image_size: int,
    ranks: Mapping[str, int | None],
    method: Method,
    gradient_rank: int,
    batch: int,
    checkpointed: bool = False,
    lora_rank: int = 0,
) -> Flops:
    """Of `method` with an effective batch of `batch`; `ranks` None where dense. AdamW of dense weights counts nothing:
    it is no product. With `checkpointed` every block runs forward twice."""
    blocks = geometry.block_shapes(image_size)
    patches = geometry.tokens(image_size) - geometry.leading_tokens
    stem = 2 * patches * geometry.channels * geometry.patch_size**2 * geometry.width
    # one product of all heads, in blocks whose tokens all ask and in the last
    asking = [shape.tokens for shape in blocks]
    asking[-1] = geometry.read_tokens(asking[-1])
    attention = sum(2 * count * shape.width * shape.attended for count, shape in zip(asking, blocks, strict=True))
    linears = [
        (name, _tokens_of(name, geometry, blocks), out, inner, rank)
        for name, out, inner, rank in _shapes(geometry, ranks)
    ]
    forward = sum(2 * count * _weight(out, inner, rank) for _, count, out, inner, rank in linears)
    infer = stem + forward + _FORWARD_PRODUCTS * attention
    if method is Method.HEAD:
        return Flops(infer, 0.0, infer)
    passes = 2 * forward + (_FORWARD_PRODUCTS + _BACKWARD_PRODUCTS) * attention + stem
    passes += infer - stem if checkpointed else 0
    if method is Method.VANILLA:
        return Flops(passes + forward + stem, 0.0, infer)
    if method is Method.LORA:
        # x A^T and h B^T of queries and values: forward, and backward with respect to both operands
        updates = sum(2 * 3 * 2 * shape.tokens * 2 * shape.width * lora_rank for shape in blocks)
        return Flops(passes + updates, 0.0, infer)
    gradients = sum(2 * count * (inner + out) * min(gradient_rank, inner) for _, count, out, inner, _ in linears)
    upkeep = sum(
        _refresh(name, count, out, inner, min(gradient_rank, inner), batch, method)
        + update_flops(out, inner, rank, gradient_rank) / batch
        for name, count, out, inner, rank in linears
    )
    return Flops(passes + gradients + stem, upkeep, infer)


def _tokens_of(linear: str, geometry: Geometry, blocks: Sequence[BlockShape]) -> int:
    """Tokens of a photo that pass through a linear: behind the last attention only those that the head reads."""
    tokens = blocks[int(linear.split(".")[1])].tokens
    is_read = linear.startswith(f"blocks.{geometry.depth - 1}.") and not linear.endswith(".qkv")
    return geometry.read_tokens(tokens) if is_read else tokens


def paper_count(
    geometry: Geometry,
    image_size: int,
    ranks: Mapping[str, int | None],
    method: Method,
    gradient_rank: int,
    batch: int,
) -> dict[str, float]:
    """`train_flops`, `infer_flops`, `upkeep_flops` of a step of `batch` images, `memory_bytes`, and `memory_ratio` to
    vanilla, of linear layers alone. Inputs are compressed in their last mode, as ours are (r1 = B, r2 = N). LoRA's
    frozen weights need no subspace iteration, and no inputs but those of qkv; its adapters are not counted."""
    blocks = geometry.block_shapes(image_size)
    compresses = method in (Method.WASI, Method.ASI)
    train = infer = upkeep = memory = vanilla_memory = 0.0
    for name, out, inner, rank in _shapes(geometry, ranks):
        r = min(gradient_rank, inner)
        tokens = blocks[int(name.split(".")[1])].tokens
        rows = batch * tokens
        if rank is None:
            forward, backward = rows * out * (2 * inner - 1), rows * inner * (2 * out - 1)
            weights = out * inner
        else:
            forward = rows * rank * (2 * inner - 1) + rows * out * (2 * rank - 1)
            backward = 2 * rows * rank * (out + inner)
            weights = rank * (out + inner)
            upkeep += _iteration(out, inner, rank) if method.has_factors else 0
        infer += forward
        if method is Method.HEAD:
            train += forward
            memory += weights
        elif compresses:
            # multiply-adds as printed, with r1 = B, r2 = N, r3 = r
            gradient = batch * tokens * out * batch + batch * tokens * r * tokens + batch * r * inner * tokens
            train += forward + backward + 2 * (gradient + inner * out * tokens * batch)
            upkeep += _iteration(inner, rows, r)
            memory += batch * tokens * r + inner * r + weights
        elif method is Method.LORA:
            train += forward + backward
            memory += weights + (rows * inner if name.endswith(".qkv") else 0)
        else:
            train += forward + backward + out * inner * (2 * rows - 1)
            memory += rows * inner + weights
        vanilla_memory += rows * inner + out * inner
    return {
        "train_flops": train,
        "infer_flops": infer,
        "upkeep_flops": upkeep,
        "memory_bytes": 4 * memory,
        "memory_ratio": memory / vanilla_memory,
    }


def _shapes(geometry: Geometry, ranks: Mapping[str, int | None]) -> Iterator[tuple[str, int, int, int | None]]:
    for name, (out, inner) in geometry.linear_shapes().items():
        yield name, out, inner, ranks[name]


def _weight(out: int, inner: int, rank: int | None) -> int:
    """Multiply-adds of one token."""
    return out * inner if rank is None else rank * (out + inner)


def _refresh(name: str, tokens: int, out: int, inner: int, r: int, batch: int, method: Method) -> float:
    """One warm iteration of U from a share of the tokens: dW^T (dW U) without forming dW; of fc2, whose input is gone
    by the time its gradient is known, x^T (x U)."""
    share = sampled_tokens(batch * tokens) / (batch * tokens)
    follows_gradient = method is Method.WSI or not name.endswith(".fc2")
    return share * 4 * tokens * r * (inner + (out if follows_gradient else 0))


def update_flops(out: int, inner: int, rank: int | None, gradient_rank: int) -> float:
    """Of a weight in one step: the gradient into momentum (`subspace/momentum.py`); and, in the mean of `TURNS` steps,
    momentum's new basis and polar factor and the exact WSI step (`subspace/weight.py`), or the product added to a dense
    weight."""
    r = min(gradient_rank, inner)
    carry, polar = 2 * r * r * (inner + out), 4 * r * r * out
    # E, E^T E, V W and E S^-T W, and the QR; P S, T^T T and T W
    new_basis = 2 * r * r * (6 * inner + 7 * out)
    if rank is None:
        return carry + (new_basis + polar + 2 * out * inner * r) / TURNS
    thin = 2 * rank * r * (2 * out + 3 * inner)  # L^T P, R U, L + P E, F, R + X F
    # five products of an inverse Gram matrix with (K, r), and a change of rank 2 r to both
    return carry + (new_basis + polar + thin + 18 * rank * rank * r) / TURNS


def _iteration(a: int, b: int, r: int) -> float:
    """One subspace iteration of an (a, b) matrix at rank r, as the paper counts it."""
    return a * r * (2 * b - 1) + b * r * (2 * a - 1) + 2 * max(a, r) * min(a, r) ** 2
