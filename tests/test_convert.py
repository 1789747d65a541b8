"""Conversion of a whole small network: its ranks, its outputs, what it reads at a time, what a failure leaves."""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from models import random_tensors
from reference import one_thread, relative_difference  # noqa: F401
from torch import Tensor

from wasi_edge.artefact import ModelConfig, open_artefact, write_artefact
from wasi_edge.conversion.convert import Calibration, Settings, choose_ranks, convert
from wasi_edge.conversion.sources import DenseSource, open_source
from wasi_edge.conversion.walk import Walk, _Stages
from wasi_edge.errors import ArtefactError, ConversionError
from wasi_edge.layers.saving import Pass
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.network import build_network
from wasi_edge.models.vanilla import build_vanilla
from wasi_edge.preprocess import center_view, normalise, open_photo, shrink
from wasi_edge.preprocessing import Preprocessing

GEOMETRY = ViTGeometry(patch_size=4, width=24, depth=3, heads=3, mlp_width=48, position_grid=4, layer_scale=True)
SIZE = 16
PHOTOS = np.random.default_rng(5).integers(0, 256, (11, SIZE, SIZE, 3), dtype=np.uint8)  # a chunk of 8 and one of 3
CALIBRATION = Calibration(len(PHOTOS), lambda index: PHOTOS[index])
_HUGGING_FACE = {
    "norm1": "norm1",
    "norm2": "norm2",
    "proj": "attention.output.dense",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "scale1": "layer_scale1.lambda1",
    "scale2": "layer_scale2.lambda1",
}


def dense_tensors() -> dict[str, np.ndarray]:
    """Weights with decaying spectra, some steep and some flat, and norms that make some channels loud."""
    _, tensors = random_tensors(GEOMETRY, None, None, dtype=torch.float32)
    generator = torch.Generator().manual_seed(9)
    for index, (name, (out, inner)) in enumerate(GEOMETRY.linear_shapes().items()):
        left, _, right = torch.linalg.svd(torch.randn(out, inner, generator=generator), full_matrices=False)
        steepness = (0.2, 2.0)[index % 3 == 1]
        values = torch.logspace(0, -steepness, min(out, inner))
        tensors[f"{name}.weight"] = 1.5 * (left * values) @ right
    for name, value in tensors.items():
        if name.startswith("blocks.") and name.endswith(("norm1.weight", "norm2.weight")):
            loud = torch.logspace(-1.5, 0.7, len(value))
            tensors[name] = loud[torch.randperm(len(value), generator=generator)]
    return {name: value.numpy() for name, value in tensors.items()}


def write_hugging_face(folder: Path, ours: dict[str, np.ndarray]) -> Path:
    """A DINOv2 folder as transformers writes it, query, key and value stored apart."""
    theirs: dict[str, np.ndarray] = {}
    for name, value in ours.items():
        if not name.startswith("blocks."):
            continue
        _, block, layer, *rest = name.split(".")
        prefix, suffix = f"encoder.layer.{block}.", "".join(f".{part}" for part in rest)
        if layer == "qkv":
            for key, part in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                theirs[f"{prefix}attention.attention.{key}{suffix}"] = np.ascontiguousarray(part)
        else:
            theirs[f"{prefix}{_HUGGING_FACE[layer]}{suffix}"] = value
    width, patch = GEOMETRY.width, GEOMETRY.patch_size
    theirs |= {
        "embeddings.patch_embeddings.projection.weight": ours["patch_embed.weight"].reshape(width, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": ours["patch_embed.bias"],
        "embeddings.cls_token": ours["class_token"][None, None],
        "embeddings.position_embeddings": ours["position"][None],
        "layernorm.weight": ours["norm.weight"],
        "layernorm.bias": ours["norm.bias"],
    }
    config = {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": width,
        "num_hidden_layers": GEOMETRY.depth,
        "num_attention_heads": GEOMETRY.heads,
        "mlp_ratio": GEOMETRY.mlp_width // width,
        "image_size": patch * GEOMETRY.position_grid,
        "patch_size": patch,
        "num_channels": 3,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": GEOMETRY.norm_eps,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(theirs, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_hugging_face(tmp_path_factory.mktemp("source") / "dense", dense_tensors())


@pytest.fixture
def source(folder):
    with open_source(folder) as opened:
        assert opened.geometry == GEOMETRY
        yield opened


def pixels(preprocessing: Preprocessing) -> Tensor:
    return torch.from_numpy(normalise(PHOTOS, preprocessing.with_image_size(SIZE)))


@torch.no_grad()
def dense_features(source: DenseSource) -> Tensor:
    """Of the source, by the plain network under torch."""
    model = build_vanilla(source.geometry, lambda name: torch.from_numpy(source.read(name)), SIZE, 2)
    return model.features(pixels(source.preprocessing))


def features(folder: Path) -> Tensor:
    """Of an artefact, by the explicit network."""
    with open_artefact(folder) as artefact:
        config = artefact.config

        def read(name: str) -> Tensor:
            return torch.from_numpy(artefact.tensors.read(name, np.float32))

        model = build_network(config.geometry, config.linears, read, SIZE, head=False)
        return model.features(pixels(config.preprocessing), Pass())[0]


def stored(folder: Path) -> dict[str, np.ndarray]:
    with open_artefact(folder) as artefact:
        return {name: artefact.tensors.read(name) for name in artefact.tensors}


def kept_share(weight: np.ndarray, rank: int) -> float:
    squares = np.linalg.svd(weight.astype(np.float64), compute_uv=False) ** 2
    return float(squares[:rank].sum() / squares.sum())


# --------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("epsilon", [0.3, 0.5, 0.8, 0.9])
def test_each_rank_is_the_smallest_that_explains_epsilon_or_none_from_break_even_on(source, epsilon):
    ranks = choose_ranks(source, Settings(epsilon=epsilon))
    assert list(ranks) == list(GEOMETRY.linear_shapes())
    for name, rank in ranks.items():
        weight = source.read(f"{name}.weight")
        smallest = next(k for k in range(1, min(weight.shape) + 1) if kept_share(weight, k) >= epsilon)
        saves = smallest * sum(weight.shape) < weight.size
        assert rank == (smallest if saves else None), name


def test_some_linears_stay_dense_and_always_factor_puts_them_just_below_break_even(source):
    ranks = choose_ranks(source, Settings(epsilon=0.9))
    forced = choose_ranks(source, Settings(epsilon=0.9, always_factor=True))
    dense = [name for name, rank in ranks.items() if rank is None]
    assert 0 < len(dense) < len(ranks)
    for name, rank in forced.items():
        out, inner = GEOMETRY.linear_shapes()[name]
        if name in dense:
            assert rank is not None and rank * (out + inner) < out * inner <= (rank + 1) * (out + inner)
        else:
            assert rank == ranks[name]


# ------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("calibration", [None, CALIBRATION])
def test_epsilon_1_keeps_every_linear_dense_and_every_output(source, tmp_path, calibration):
    config = convert(source, tmp_path / "out", Settings(epsilon=1.0, image_size=SIZE), calibration)
    assert set(config.linears.values()) == {None}
    assert relative_difference(features(tmp_path / "out"), dense_features(source)) < 1e-5
    for name, value in stored(tmp_path / "out").items():
        np.testing.assert_array_equal(value, source.read(name), err_msg=name)


def test_calibration_keeps_the_outputs_better_than_plain_svd_with_as_many_parameters(source, tmp_path):
    settings = Settings(epsilon=0.6, image_size=SIZE)
    plain = convert(source, tmp_path / "plain", settings)
    aware = convert(source, tmp_path / "aware", settings, CALIBRATION)
    shapes = GEOMETRY.linear_shapes()
    sizes = [
        sum(rank * sum(shapes[name]) for name, rank in config.linears.items() if rank is not None)
        for config in (plain, aware)
    ]
    assert 0.95 * sizes[0] < sizes[1] <= sizes[0] and plain.linears != aware.linears
    assert [n for n, rank in plain.linears.items() if rank is None] == [
        n for n, rank in aware.linears.items() if rank is None
    ]
    expected = dense_features(source)
    plain_error, aware_error = (relative_difference(features(tmp_path / name), expected) for name in ("plain", "aware"))
    assert 0 < aware_error < 0.6 * plain_error


def test_in_the_mean_every_layer_gives_what_the_dense_one_gives(source, tmp_path):
    """Also behind layers that are truncated already: each is calibrated on what they really make."""
    config = convert(source, tmp_path / "out", Settings(epsilon=0.5, image_size=SIZE, always_factor=True), CALIBRATION)
    named = {key: torch.from_numpy(value) for key, value in stored(tmp_path / "out").items()}
    read = lambda name: torch.from_numpy(source.read(name))  # noqa: E731
    dense = build_network(GEOMETRY, dict.fromkeys(GEOMETRY.linear_shapes()), read, SIZE, head=False)
    ours = build_network(GEOMETRY, config.linears, named.__getitem__, SIZE, head=False)
    streams = [
        model.stem.forward(pixels(source.preprocessing), Pass(), learns=False)[0].half().float()
        for model in (dense, ours)
    ]
    for blocks in zip(dense.blocks, ours.blocks, strict=True):
        outputs = []
        for number, (block, tokens) in enumerate(zip(blocks, list(streams), strict=True)):
            normed, _ = block.norm1.forward(tokens.view(-1, GEOMETRY.width), Pass(), None)
            outputs.append(block.qkv.forward(normed, dense.tokens_of("blocks.0.qkv"), Pass(), None)[0])
            streams[number] = block.forward(tokens, Pass(), None)[0].half().float()
        for wanted, made in (outputs, streams):
            spread = float(wanted.std())
            assert float((wanted - made).flatten(0, -2).mean(0).abs().max()) < 2e-3 * spread  # float16 streams
            assert float((wanted - made).abs().max()) > 0.05 * spread


@torch.no_grad()
def test_the_parts_of_a_block_make_the_block(source):
    read = lambda name: torch.from_numpy(source.read(name))  # noqa: E731
    dense = build_network(GEOMETRY, dict.fromkeys(GEOMETRY.linear_shapes()), read, SIZE, head=False)
    tokens = dense.stem.forward(pixels(source.preprocessing), Pass(), learns=False)[0].half()
    stages = _Stages(dense.blocks[0], tokens, Pass())
    expected = dense.blocks[0].forward(tokens.float(), Pass(), None)[0]
    assert relative_difference(stages.output(stages.middle()), expected) < 1e-6


def test_spectra_are_those_of_the_dense_walk_and_leave_the_photos_tokens_to_start_again_with(source):
    read = lambda name: torch.from_numpy(source.read(name))  # noqa: E731
    walk = Walk(GEOMETRY, read, CALIBRATION, source.preprocessing.with_image_size(SIZE))
    first = [walk.spectra(index) for index in range(GEOMETRY.depth)]
    walk.start_again()
    again = [walk.spectra(index) for index in range(GEOMETRY.depth)]
    for block, twin in zip(first, again, strict=True):
        for name, values in block.items():
            assert (values[:-1] >= values[1:]).all() and values[0] > 0
            np.testing.assert_array_equal(values, twin[name])


def test_calibration_at_another_input_size_resamples_the_positions_but_stores_the_original_ones(source, tmp_path):
    photos = np.random.default_rng(6).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)
    settings = Settings(epsilon=0.5, image_size=24)
    config = convert(source, tmp_path / "out", settings, Calibration(3, lambda index: photos[index]))
    assert config.preprocessing.image_size == 24 and config.geometry.position_grid == 4
    np.testing.assert_array_equal(stored(tmp_path / "out")["position"], source.read("position"))
    assert bool(features(tmp_path / "out").isfinite().all())


def test_float16_stores_what_float32_rounds_to(source, tmp_path):
    for dtype in ("float32", "float16"):
        convert(source, tmp_path / dtype, Settings(epsilon=0.5, dtype=dtype, image_size=SIZE))
    wide, narrow = stored(tmp_path / "float32"), stored(tmp_path / "float16")
    assert set(wide) == set(narrow)
    for name, value in narrow.items():
        assert value.dtype == np.float16
        np.testing.assert_array_equal(value, wide[name].astype(np.float16), err_msg=name)
    assert relative_difference(features(tmp_path / "float16"), features(tmp_path / "float32")) < 5e-3


def test_same_source_and_photos_give_the_same_bytes(source, tmp_path):
    for name in ("first", "second"):
        convert(source, tmp_path / name, Settings(epsilon=0.5, image_size=SIZE), CALIBRATION)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


# ----------------------------------------------------------------------------------------- converting once more


def test_a_second_truncation_is_relative_to_the_first(source, tmp_path):
    stored_ranks = convert(source, tmp_path / "first", Settings(epsilon=0.85, image_size=SIZE)).linears
    with open_source(tmp_path / "first") as first:
        config = convert(first, tmp_path / "second", Settings(epsilon=0.5, image_size=SIZE))
        directly = choose_ranks(source, Settings(epsilon=0.5))
        for name, rank in config.linears.items():
            own, before, direct = first.read(f"{name}.weight"), stored_ranks[name], directly[name]
            share = 0.5 / 0.85 if before is not None else 0.5
            smallest = next(k for k in range(1, min(own.shape) + 1) if kept_share(own, k) >= share)
            assert rank == (smallest if smallest * sum(own.shape) < own.size else None), name
            if rank is not None:
                # never less of the original than was asked for, and hardly more than directly
                assert kept_share(source.read(f"{name}.weight"), rank) >= 0.5 - 1e-9
                assert direct is not None and direct <= rank <= direct + 1
    assert None in stored_ranks.values() and None not in directly.values()  # both kinds were there


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_converting_at_its_own_epsilon_keeps_ranks_and_outputs(source, tmp_path, dtype):
    config = convert(source, tmp_path / "first", Settings(epsilon=0.8, dtype=dtype, image_size=SIZE))
    assert {rank is None for rank in config.linears.values()} == {True, False}
    with open_source(tmp_path / "first") as first:
        again = convert(first, tmp_path / "second", Settings(epsilon=0.8, image_size=SIZE))
    assert again.linears == config.linears
    assert relative_difference(features(tmp_path / "second"), features(tmp_path / "first")) < 1e-5


# ---------------------------------------------------------------------------------------------- memory and failure


@pytest.mark.parametrize("epsilon", [0.5, 1.0])  # all factored; all dense
@pytest.mark.parametrize("calibration", [None, CALIBRATION])
def test_at_no_time_are_two_dense_blocks_in_memory(source, tmp_path, epsilon, calibration):
    alive: dict[int, tuple[str, int]] = {}
    blocks: list[set[str]] = []
    held: list[int] = []

    def fetch(name: str) -> np.ndarray:
        array = source._fetch(name)
        if name.startswith("blocks.") and array.ndim == 2:
            alive[id(array)] = name.split(".")[1], array.nbytes
            weakref.finalize(array, alive.pop, id(array))
            blocks.append({block for block, _ in alive.values()})
            held.append(sum(count for _, count in alive.values()))
        return array

    spied = dataclasses.replace(source, _fetch=fetch)
    convert(spied, tmp_path / "out", Settings(epsilon=epsilon, image_size=SIZE), calibration)
    linears = len(GEOMETRY.linear_shapes())
    one_block = 4 * sum(out * inner for out, inner in GEOMETRY.linear_shapes().values()) // GEOMETRY.depth
    # for the ranks each is read by itself, the next while the last is still bound
    assert max(held[:linears]) <= 0.8 * one_block
    assert set.union(*blocks) == {"0", "1", "2"} and max(map(len, blocks[linears:])) == 1
    assert max(held) <= one_block
    if calibration is None and epsilon < 1:
        assert max(held) < one_block  # nothing runs: never even one whole block


def test_progress_counts_blocks(source, tmp_path):
    calls: list[tuple[int, int]] = []
    convert(source, tmp_path / "out", Settings(epsilon=0.5), on_progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    calls.clear()  # with photos all blocks are measured first
    settings = Settings(epsilon=0.5, image_size=SIZE)
    convert(source, tmp_path / "aware", settings, CALIBRATION, on_progress=lambda *call: calls.append(call))
    assert calls == [(number, 6) for number in range(1, 7)]


@pytest.mark.parametrize("calibration", [None, CALIBRATION])
@pytest.mark.parametrize("existing", [True, False])
def test_a_damaged_source_leaves_no_file_behind(tmp_path, calibration, existing):
    tensors = dense_tensors()
    tensors["blocks.2.norm2.bias"][3] = np.nan  # met after two blocks were written
    out = tmp_path / "out"
    if existing:
        out.mkdir()
    with (
        open_source(write_hugging_face(tmp_path / "source", tensors)) as damaged,
        pytest.raises(ConversionError, match=r"blocks\.2\.norm2\.bias holds values that are not finite"),
    ):
        convert(damaged, out, Settings(epsilon=0.5, image_size=SIZE), calibration)
    assert not out.exists() or list(out.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "out"}


def test_a_truncated_file_is_refused_before_anything_is_written(folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((folder / "config.json").read_bytes())
    content = (folder / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[:-1000])
    with pytest.raises((ArtefactError, ConversionError)), open_source(broken) as source:
        convert(source, tmp_path / "out", Settings(epsilon=0.5, image_size=SIZE))
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_failure_over_an_older_model_leaves_that_one_whole(source, tmp_path):
    out = tmp_path / "out"
    convert(source, out, Settings(epsilon=0.5, image_size=SIZE))
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def stop(done: int, of: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, Settings(epsilon=0.3, image_size=SIZE), on_progress=stop)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_nothing_is_drawn_from_the_global_generator(source, tmp_path):
    before = torch.random.get_rng_state()
    convert(source, tmp_path / "out", Settings(epsilon=0.5, image_size=SIZE), CALIBRATION)
    assert torch.equal(before, torch.random.get_rng_state())


# ------------------------------------------------------------------------------------------------- the real network


@torch.no_grad()
def test_the_real_vit_s14_gives_the_same_features_explicitly_and_under_torch(shared_model, shared_data):
    paths = sorted((shared_data / "clothing").rglob("*.jpg"))[:2]
    assert len(paths) == 2
    with open_source(shared_model) as source:
        preprocessing = source.preprocessing.with_image_size(168)
        side = preprocessing.resize_side
        views = [center_view(shrink(open_photo(path, side), preprocessing), preprocessing) for path in paths]
        batch = torch.from_numpy(normalise(np.stack(views), preprocessing))
        geometry = source.geometry

        def read(name: str) -> Tensor:
            return torch.from_numpy(source.read(name))

        vanilla = build_vanilla(geometry, read, 168, 2).features(batch)
        explicit, _ = build_network(geometry, dict.fromkeys(geometry.linear_shapes()), read, 168, head=False).features(
            batch, Pass()
        )
    assert vanilla.shape == (2, 768)
    assert relative_difference(vanilla[0], vanilla[1]) > 0.1  # two photos, not one
    assert relative_difference(explicit, vanilla) < 1e-4


def test_a_source_of_our_own_without_an_epsilon_counts_as_whole(source, tmp_path):
    """A vanilla run's result is dense: nothing was cut away from it, whatever it was made from."""
    config = ModelConfig("dense", GEOMETRY, dict.fromkeys(GEOMETRY.linear_shapes()), source.preprocessing, None)
    with write_artefact(tmp_path / "dense", config) as writer:
        for name in config.tensor_shapes():
            writer.add(name, source.read(name))
    with open_source(tmp_path / "dense") as own:
        assert choose_ranks(own, Settings(epsilon=0.6)) == choose_ranks(source, Settings(epsilon=0.6))


@pytest.mark.parametrize(
    "change",
    [
        {"features": "class"},
        {"features": "class+distillation", "registers": 2},
        {"features": "mean", "class_token": False, "pool_first": True},
    ],
)
def test_a_network_whose_head_reads_few_tokens_is_calibrated_on_all_of_them(tmp_path, change):
    geometry = dataclasses.replace(GEOMETRY, **change)
    ranks, values = random_tensors(geometry, None, None)
    with write_artefact(
        tmp_path / "dense", ModelConfig("d", geometry, ranks, Preprocessing(image_size=SIZE))
    ) as writer:
        for name, value in values.items():
            writer.add(name, value.numpy().astype(np.float32))
    settings = Settings(epsilon=0.5, image_size=SIZE, always_factor=True)
    with open_source(tmp_path / "dense") as dense:
        expected = dense_features(dense)
        convert(dense, tmp_path / "plain", settings)
        convert(dense, tmp_path / "aware", settings, CALIBRATION)
    plain_error, aware_error = (relative_difference(features(tmp_path / name), expected) for name in ("plain", "aware"))
    assert 0 < aware_error < 0.9 * plain_error
