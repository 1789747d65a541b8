"""The explicit Swin transformer against the same network under torch autograd, and what it is made of."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from gradients import assert_autograd_agrees, engine_gradients
from models import random_tensors
from reference import relative_difference

from wasi_edge.artefact import ModelConfig
from wasi_edge.errors import ArtefactError, UsageError
from wasi_edge.keep import ALL_KEEPS, EXACT
from wasi_edge.layers.saving import Pass
from wasi_edge.models.geometry_swin import SwinGeometry, geometry_from_dict
from wasi_edge.models.network import build_network
from wasi_edge.models.resample import resample_bias
from wasi_edge.models.windows import APART, relative_index, shift_mask, window_order
from wasi_edge.preprocessing import Preprocessing

TINY = SwinGeometry(patch_size=2, width=12, depths=(2, 3), stage_heads=(2, 3), window=4, mlp_ratio=2)
SIZE = 32  # grids of 16 and 8 tokens


def network(geometry: SwinGeometry, rank: int | None, size: int = SIZE, dtype: torch.dtype = torch.float64):
    ranks, tensors = random_tensors(geometry, rank, dtype=dtype)
    return build_network(geometry, ranks, lambda name: tensors[name].clone(), size, head=True), tensors


@pytest.mark.parametrize("rank", [5, None])
@pytest.mark.parametrize("keep", [keep for keep in ALL_KEEPS if not keep.compact])
@pytest.mark.parametrize("size", [SIZE, 24, 16])  # windows as stored; of 6, tables resampled; one window in the end
def test_every_gradient_equals_autograd_when_the_basis_is_complete(rank, keep, size):
    model, tensors = network(TINY, rank, size)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(3, 3, size, size, dtype=torch.float64, generator=generator)
    dfeatures = torch.randn(3, TINY.feature_width, dtype=torch.float64, generator=generator)
    assert_autograd_agrees(TINY, tensors, model, size, pixels, dfeatures, keep)


@pytest.mark.parametrize("keep", [keep for keep in ALL_KEEPS if keep.compact])
def test_compact_saving_stays_close_to_the_exact_gradients(keep):
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(4, 3, SIZE, SIZE, generator=generator)
    dfeatures = torch.randn(4, TINY.feature_width, generator=generator)
    _, exact = engine_gradients(network(TINY, 5, dtype=torch.float32)[0], pixels, dfeatures, EXACT)
    _, compact = engine_gradients(network(TINY, 5, dtype=torch.float32)[0], pixels, dfeatures, keep)
    worst = max(relative_difference(compact[name], exact[name]) for name in exact)
    assert 0 < worst < 0.01


@pytest.mark.parametrize("keep", ALL_KEEPS)
def test_a_second_micro_batch_of_another_size_reuses_the_buffers(keep):
    model, _ = network(TINY, 5, dtype=torch.float32)
    for name, linear in model.linears().items():
        linear.start_training(4, model.tokens_of(name), torch.Generator().manual_seed(0))
    run, held = Pass(refresh_basis=True), []
    for batch in (4, 4, 3, 4):
        features, saved = model.features(torch.randn(batch, 3, SIZE, SIZE), run, [keep] * TINY.depth)
        model.backward(saved, torch.randn_like(features), run, lambda layer, parts: None)
        held.append(run.workspace.held_bytes())
    assert len(set(held)) == 1


@pytest.mark.parametrize("first", range(TINY.depth + 1))
def test_two_parts_make_the_whole(first):
    ranks, tensors = random_tensors(TINY, 5)
    pixels = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)

    def part(blocks: range | None, head: bool):
        return build_network(TINY, ranks, tensors.__getitem__, SIZE, head=head, blocks=blocks)

    whole = part(None, True).logits(pixels, Pass())
    tokens = part(range(first), False).last_tokens(pixels, Pass()) if first else pixels
    assert relative_difference(part(range(first, TINY.depth), True).logits(tokens, Pass()), whole) < 1e-14


@pytest.mark.parametrize(("grid", "window"), [(4, 2), (4, 4), (8, 2), (8, 4)])
@pytest.mark.parametrize("is_shifted", [False, True])
def test_windows_are_those_of_rolling_and_partitioning(grid, window, is_shifted):
    shift = window // 2 if is_shifted else 0
    tokens = torch.arange(grid * grid).view(grid, grid)
    rolled = torch.roll(tokens, (-shift, -shift), (0, 1))
    windows = [
        rolled[row : row + window, column : column + window].flatten()
        for row in range(0, grid, window)
        for column in range(0, grid, window)
    ]
    assert window_order(grid, window, shift).tolist() == torch.cat(windows).tolist()


def test_the_mask_keeps_apart_what_only_the_shift_brought_together():
    grid, window, shift = 8, 4, 2
    mask = shift_mask(grid, window, shift)
    order = window_order(grid, window, shift).reshape(-1, window * window)
    assert shift_mask(grid, window, 0) is None
    for tokens, values in zip(order.tolist(), mask, strict=True):
        for (i, one), (j, other) in itertools.product(enumerate(tokens), repeat=2):
            near = all(abs(a - b) < window for a, b in zip(divmod(one, grid), divmod(other, grid), strict=True))
            assert values[i, j] == (0 if near else APART)


def test_each_pair_of_tokens_has_the_row_of_its_relative_position():
    window = 3
    index = relative_index(window)
    for one, other in itertools.product(range(window * window), repeat=2):
        down, right = (a - b for a, b in zip(divmod(one, window), divmod(other, window), strict=True))
        assert index[one, other] == (down + window - 1) * (2 * window - 1) + right + window - 1


def test_bias_tables_are_resampled_and_constants_stay():
    table = np.full((49, 3), 2.5)
    assert resample_bias(table, 4) is table
    assert resample_bias(table, 6).shape == (121, 3)
    np.testing.assert_allclose(resample_bias(table, 6), np.full((121, 3), 2.5))


def test_sizes_and_shapes():
    assert TINY.depth == 5 and TINY.feature_width == 24 and TINY.tokens(SIZE) == 256
    assert [shape.tokens for shape in TINY.block_shapes(SIZE)] == [256, 256, 64, 64, 64]
    assert [shape.merged for shape in TINY.block_shapes(SIZE)] == [False, False, True, False, False]
    assert [TINY.shift_at(SIZE, block) for block in range(5)] == [0, 2, 0, 2, 0]
    assert TINY.window_at(24) == 6 and TINY.at_size(24).window == 6 and TINY.at_size(SIZE) == TINY
    assert [TINY.shift_at(16, block) for block in range(5)] == [0, 2, 0, 0, 0]  # one window in the second stage
    with pytest.raises(UsageError, match=r"multiple of 4.*try 32 or 36"):
        TINY.tokens(34)
    linears = list(TINY.linear_shapes())
    assert linears[8:10] == ["blocks.2.merge", "blocks.2.qkv"] and TINY.linear_shapes()["blocks.2.merge"] == (24, 48)


@pytest.mark.parametrize(
    "change",
    [{"width": 0}, {"depths": (2,)}, {"depths": ()}, {"stage_heads": (5, 3)}, {"mlp_ratio": "4"}, {"window": 2.0}],
)
def test_contradictions_are_refused(change):
    with pytest.raises(ArtefactError, match="geometry"):
        dataclasses.replace(TINY, **change)


def test_configurations_go_through_json():
    config = ModelConfig("swin", TINY, dict.fromkeys(TINY.linear_shapes()), Preprocessing(image_size=SIZE))
    values = config.to_dict()
    assert values["architecture"] == "swin"
    assert ModelConfig.from_dict(values) == config
    with pytest.raises(ArtefactError, match="architecture should be 'vit' or 'swin'"):
        geometry_from_dict("beit", {})
