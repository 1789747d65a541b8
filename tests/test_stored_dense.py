"""Linears that a model stores dense, because their factors would be larger: trained dense beside those in factors, by
the same rule, and dense in the result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from gradients import assert_autograd_agrees
from models import MIXED, TINY, dense_reader, random_tensors, random_vit
from reference import (  # noqa: F401
    dense_momentum_step,
    dense_polar_factor,
    dense_wsi_step,
    one_thread,
    plain_qr,
    relative_difference,
)
from test_finetune import finetune, kill_when, render, report_of, run, tensors
from test_planner import VIT_S
from tiny_artefact import write_tiny
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wasi_edge.artefact import open_artefact, read_config
from wasi_edge.bench.subject import find_subject
from wasi_edge.bench.synthetic import synthetic_ranks
from wasi_edge.chunks import TURNS, has_turn
from wasi_edge.cli.info import describe
from wasi_edge.export.model import write_onnx
from wasi_edge.inference.onnx_backend import OnnxClassifier
from wasi_edge.inference.torch_backend import TorchClassifier
from wasi_edge.keep import ALL_KEEPS, EXACT, RECOMPUTE, Keep
from wasi_edge.layers.linear import AsiLinear, DenseWsiLinear, LinearKinds, WasiLinear, WsiLinear
from wasi_edge.layers.saving import Pass
from wasi_edge.method import Method, Optimizer
from wasi_edge.models.geometry_swin import SwinGeometry
from wasi_edge.models.network import artefact_name, build_network
from wasi_edge.models.vanilla import build_vanilla
from wasi_edge.planner.choices import Choices
from wasi_edge.planner.outlook import outlook
from wasi_edge.training.adam import Adam
from wasi_edge.training.checkpoint import latest_checkpoint, save_checkpoint
from wasi_edge.training.factor_update import MOMENTUM, ORTHONORMALISE_EVERY, POLAR_FLOOR
from wasi_edge.training.methods import make_trainer
from wasi_edge.training.prepare import choose_model
from wasi_edge.training.request import FinetuneRequest
from wasi_edge.training.trainer import Recipe, SubspaceTrainer

SIZE, BATCH, GRADIENT_RANK = 16, 4, 4
RECIPE = Recipe(0.02, 1e-3, 2e-3, 0.1, 1.0, 0.1, stem_rate=1 / 4)
DENSE = {name for name, rank in MIXED.items() if rank is None}
METHODS = pytest.mark.parametrize("method", [Method.WASI, Method.WSI])
WHOLE = dataclasses.replace(RECOMPUTE, compact=False)


def photos(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, labels and weights of a batch."""
    generator = torch.Generator().manual_seed(100 + step)
    pixels = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator, dtype=dtype)
    labels = torch.randint(0, 3, (BATCH,), generator=generator)
    return pixels, labels, 0.5 + torch.rand(BATCH, generator=generator, dtype=dtype)


def trainer_of(
    method: Method,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    recipe: Recipe = RECIPE,
    keep: Keep = EXACT,
) -> SubspaceTrainer:
    model = random_vit(rank=MIXED, dtype=dtype, seed=seed, kinds=LinearKinds.of(method))
    return SubspaceTrainer(model, recipe, [keep] * TINY.depth, GRADIENT_RANK, seed)


@torch.no_grad()
def one_step(trainer: SubspaceTrainer, step: int, dtype: torch.dtype = torch.float32, micro: int = 2) -> None:
    pixels, labels, weight = photos(step, dtype)
    for first in range(0, BATCH, micro):
        part = slice(first, first + micro)
        trainer.micro_batch(pixels[part], labels[part], weight[part], first == 0, BATCH)
    trainer.apply(step, 1.0)


# ------------------------------------------------------------------------------------------------- before training


@METHODS
def test_the_network_is_built_as_it_is_stored(method):
    model = random_vit(rank=MIXED, kinds=LinearKinds.of(method))
    dense, factored = (AsiLinear, WasiLinear) if method is Method.WASI else (DenseWsiLinear, WsiLinear)
    for name, linear in model.linears().items():
        assert type(linear) is (dense if name in DENSE else factored), name


@METHODS
@pytest.mark.parametrize("rank", [MIXED, None], ids=["in part", "dense"])
def test_it_computes_what_the_stored_network_computes_to_the_bit(method, rank):
    pixels, _, _ = photos(0, torch.float32)
    stored = random_vit(rank=rank, dtype=torch.float32)
    built = random_vit(rank=rank, dtype=torch.float32, kinds=LinearKinds.of(method))
    expected = stored.features(pixels, Pass())[0].clone()
    assert torch.equal(built.features(pixels, Pass())[0], expected)
    trainer = SubspaceTrainer(built, RECIPE, [EXACT] * TINY.depth, 4, 0)
    # pairs of factors are rotated when training begins, which rounds; nothing else is touched
    tolerance = 0.0 if rank is None else 1e-6
    assert relative_difference(trainer.features(pixels), expected) <= tolerance
    for name, value in stored.parameters().items():
        if not name.endswith((".left", ".right")):
            assert torch.equal(trainer.parameters()[name], value), name


# --------------------------------------------------------------------------------------------------------- a step


@METHODS
@pytest.mark.parametrize("keep", [keep for keep in ALL_KEEPS if not keep.compact])
def test_with_complete_bases_every_gradient_is_that_of_autograd(method, keep):
    _, values = random_tensors(TINY, MIXED)
    model = random_vit(rank=MIXED, kinds=LinearKinds.of(method))
    dfeatures = torch.randn(BATCH, TINY.feature_width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_autograd_agrees(TINY, values, model, SIZE, photos(0)[0], dfeatures, keep)


@METHODS
def test_so_it_is_where_merging_linears_are_dense(method):
    swin = SwinGeometry(patch_size=2, width=12, depths=(2, 2), stage_heads=(2, 3), window=4, mlp_ratio=2)
    ranks = {name: None if name.endswith(("merge", "0.proj", "3.fc2")) else 5 for name in swin.linear_shapes()}
    _, values = random_tensors(swin, ranks)
    model = build_network(swin, ranks, lambda name: values[name].clone(), 32, head=True, kinds=LinearKinds.of(method))
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=generator)
    dfeatures = torch.randn(2, swin.feature_width, dtype=torch.float64, generator=generator)
    assert_autograd_agrees(swin, values, model, 32, pixels, dfeatures, WHOLE)


class DenseTwin:
    """The same training with dense weights under autograd: exact gradients, projected on the bases that the engine took
    (which other tests hold), momentum by its SVD, and of the linears in factors the weight cut back to rank K by one
    iteration as it is printed."""

    def __init__(self, recipe: Recipe) -> None:
        _, values = random_tensors(TINY, MIXED)
        read, model = dense_reader(values), build_vanilla(TINY, dense_reader(values), SIZE, 3)
        self.recipe = recipe
        self.parameters = {
            name: (values[name] if name in values else read(name)).clone() for name, _ in model.named_parameters()
        }
        self.left = {name: plain_qr(values[f"{name}.left"]) for name in MIXED if name not in DENSE}
        self.momentum = {name: torch.zeros_like(self.parameters[f"{name}.weight"]) for name in MIXED}
        self._momentum_basis: dict[str, Tensor | None] = dict.fromkeys(MIXED)
        # of factors, when their pair was last made orthonormal
        self._norm = {name: float(self.parameters[f"{name}.weight"].norm()) for name in MIXED}
        self._adam = Adam()

    def logits(self, pixels: Tensor) -> Tensor:
        return self._model()(pixels)

    def step(self, step: int, bases: Mapping[str, Tensor]) -> None:
        """One step, the gradient of each linear seen through its basis (I, r)."""
        model, (pixels, labels, weight) = self._model(), photos(step)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            each = torch.nn.functional.cross_entropy(
                model(pixels), labels, reduction="none", label_smoothing=self.recipe.label_smoothing
            )
            ((each * weight).sum() / BATCH).backward()
        gradients = {name: value.grad for name, value in model.named_parameters()}
        for name, basis in bases.items():
            exact = gradients[f"{name}.weight"]
            gradients[f"{name}.weight"] = exact @ basis @ basis.T
            if name.endswith(("proj", "fc2")):  # LayerScale's gradient is made of it
                scale = artefact_name(name, "scale")
                unseen = (exact - gradients[f"{name}.weight"]) * self.parameters[f"{name}.weight"]
                gradients[scale] = gradients[scale] - unseen.sum(1) / self.parameters[scale]
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        clip = min(1.0, self.recipe.clip_norm / float(norm))
        for name, gradient in gradients.items():
            self._update(name, gradient * clip, step)

    def _update(self, name: str, gradient: Tensor, step: int) -> None:
        share, linear = self.recipe.share(name, TINY.depth), name.removesuffix(".weight")
        if linear not in MIXED:
            rate = self.recipe.head_rate if name.startswith("head.") else self.recipe.dense_rate
            self._adam.update(name, self.parameters[name], gradient, rate * share, step)
            return
        weight, direction, rate = self.parameters[name], gradient, self.recipe.learning_rate * share
        if self.recipe.optimizer is Optimizer.POLAR:
            moves = has_turn(list(MIXED).index(linear), len(MIXED), step)
            self.momentum[linear], self._momentum_basis[linear] = dense_momentum_step(
                self.momentum[linear],
                None if moves else self._momentum_basis[linear],
                gradient,
                MOMENTUM,
                GRADIENT_RANK,
            )
            if not moves:
                return
            direction = dense_polar_factor(self.momentum[linear], GRADIENT_RANK, POLAR_FLOOR)
            rate *= TURNS * (float(weight.norm()) if linear in DENSE else self._norm[linear])
        if linear in DENSE:
            weight.mul_(1 - rate * self.recipe.weight_decay).sub_(direction, alpha=rate)
        else:
            self.parameters[name], self.left[linear] = dense_wsi_step(
                weight, self.left[linear], direction, rate, self.recipe.weight_decay
            )
            first = list(MIXED).index(linear) * ORTHONORMALISE_EVERY // len(MIXED)
            if (step - first) % ORTHONORMALISE_EVERY < TURNS:
                self._norm[linear] = float(self.parameters[name].norm())

    def _model(self) -> torch.nn.Module:
        model = build_vanilla(TINY, lambda name: self.parameters[name].float(), SIZE, 3).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.parameters[name])
        return model


@METHODS
@pytest.mark.parametrize("optimizer", Optimizer)
@pytest.mark.parametrize("keep", [EXACT, WHOLE], ids=["kept", "rebuilt"])
def test_weights_state_and_answers_follow_the_dense_twin(method, optimizer, keep):
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer)
    trainer = trainer_of(method, dtype=torch.float64, recipe=recipe, keep=keep)
    twin, pixels = DenseTwin(recipe), photos(9)[0]
    before = {name: value.clone() for name, value in trainer.parameters().items()}
    for step in range(1, 4):
        one_step(trainer, step, torch.float64)
        parameters, state = trainer.parameters(), trainer.state()
        twin.step(step, {name: state[f"basis.{name}"] for name in MIXED})
        read = dense_reader(dict(parameters))
        for name, value in twin.parameters.items():
            if name.endswith("qkv.bias"):
                continue  # softmax forgets the keys' part: its gradient is rounding, which Adam blows up
            assert relative_difference(read(name), value) < 1e-8, (step, name)
        for name, momentum in twin.momentum.items():
            if optimizer is Optimizer.POLAR:
                product = state[f"factors.momentum.{name}"] @ state[f"factors.basis.{name}"].T
                assert relative_difference(product, momentum) < 1e-8, (step, name)
            assert (f"factors.carried.{name}" in state) == (name not in DENSE)
            assert (f"factors.momentum.{name}" in state) == (optimizer is Optimizer.POLAR)
        assert relative_difference(trainer.logits(pixels), twin.logits(pixels).detach()) < 1e-8
    for name in DENSE:
        assert relative_difference(parameters[f"{name}.weight"], before[f"{name}.weight"]) > 1e-3, name


@METHODS
def test_state_restores_a_run_to_the_bit(tmp_path, method):
    straight, begun = trainer_of(method), trainer_of(method)
    for step in range(1, 6):
        one_step(straight, step)
    for step in range(1, 3):
        one_step(begun, step)
    save_checkpoint(tmp_path, 2, begun.state(), {"step": 2})
    resumed, checkpoint = trainer_of(method, seed=5), latest_checkpoint(tmp_path)
    assert checkpoint is not None
    resumed.load_state(checkpoint.tensors())
    for step in range(3, 6):
        one_step(resumed, step)
    assert straight.state().keys() == resumed.state().keys()
    for name, value in straight.state().items():
        assert torch.equal(value, resumed.state()[name]), name


@METHODS
def test_factors_in_16_bits_leave_dense_weights_in_32(method):
    """What a plan in 16 bits holds (no run of so small a network needs one)."""
    ranks, values = random_tensors(TINY, MIXED, dtype=torch.float32)
    held = {name: value.half() if name.endswith((".left", ".right")) else value for name, value in values.items()}
    choices = Choices(
        micro_batch=2, trained_blocks=TINY.depth, gradient_rank=GRADIENT_RANK, carried_grams=False, weight_bits=16
    )
    trainer = make_trainer(method, TINY, ranks, held.__getitem__, SIZE, 3, RECIPE, choices, seed=0)
    assert isinstance(trainer, SubspaceTrainer)
    before = {name: value.clone() for name, value in trainer.parameters().items()}
    for step in range(1, TURNS + 1):
        one_step(trainer, step)
    for name, value in trainer.parameters().items():
        assert value.dtype is (torch.float16 if name.endswith((".left", ".right")) else torch.float32), name
        assert not torch.equal(value, before[name]), name


# ------------------------------------------------------------------------------------ what is planned and measured


def test_the_outlook_of_a_model_that_is_dense_counts_it_dense():
    factors, dense = (
        outlook(VIT_S, 168, ranks, 184) for ranks in (synthetic_ranks(VIT_S), dict.fromkeys(VIT_S.linear_shapes()))
    )
    pairs = [(a, b) for a, b in zip(factors, dense, strict=True) if "peak_bytes" in a and "peak_bytes" in b]
    assert pairs
    for a, b in pairs:
        # the same costs more, or less can be had
        learned, less = ((row["trained_blocks"], row["gradient_rank"], row["micro_batch"]) for row in (a, b))
        assert a["peak_bytes"] < b["peak_bytes"] if learned == less else learned > less


@pytest.mark.parametrize(
    ("rank", "epsilon", "is_converted"),
    [(None, 1.0, False), (MIXED, 0.95, False), (MIXED, None, False), (None, None, True)],
)
def test_a_model_that_an_epsilon_made_is_trained_and_described_as_it_is_stored(tmp_path, rank, epsilon, is_converted):
    folder = write_tiny(tmp_path / "model", rank, epsilon=epsilon)
    request = FinetuneRequest(photos=tmp_path, out=tmp_path / "out", budget_bytes=2**29, model=str(folder))
    assert (choose_model(request).convert_epsilon is not None) == is_converted
    asked = choose_model(dataclasses.replace(request, epsilon=0.5))
    assert asked.convert_epsilon == 0.5
    config = read_config(folder)
    ranks = synthetic_ranks(TINY) if is_converted else config.linears
    expected = outlook(TINY, SIZE, ranks, config.preprocessing.resize_side)
    assert describe(folder)["training_memory"] == expected


def test_the_bench_measures_it_as_it_is_stored(tmp_path):
    folder = write_tiny(tmp_path / "model", MIXED, epsilon=0.95)
    subject = find_subject(str(folder))
    assert subject.ranks(0.95) == MIXED
    read = subject.reader(0.95)
    for name, value in tensors(folder).items():
        if name.startswith("blocks."):
            assert np.array_equal(read(name).numpy(), value), name
    assert None not in subject.ranks(0.5).values()


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict[str, Path]:
    """Photos, and the same dense network converted at an epsilon that leaves all linears dense, or some."""
    folder = tmp_path_factory.mktemp("stored-dense")
    source = write_tiny(folder / "source", rank=None, labels=None)
    for name, epsilon in (("dense", "1.0"), ("mixed", "0.875")):
        assert run("convert", source, folder / name, "--epsilon", epsilon).returncode == 0
    found = {"photos": render(folder / "photos"), "dense": folder / "dense", "mixed": folder / "mixed"}
    kinds = [set(map(type, read_config(found[name]).linears.values())) for name in ("dense", "mixed")]
    assert kinds == [{type(None)}, {type(None), int}]
    return found


@pytest.mark.parametrize(
    ("start", "method", "more"),
    [("dense", "wasi", ()), ("mixed", "wasi", ("--train-blocks", "2")), ("mixed", "wsi", ())],
)
def test_a_run_starts_from_what_is_stored_and_leaves_it_so(base, tmp_path, start, method, more):
    model, out = base[start], tmp_path / "out"
    head = report_of(run(*finetune(base, tmp_path / "head", "--method", "head", model=model)))
    done = run(*finetune(base, out, "--epochs", 3, "--method", method, *more, model=model))
    report = report_of(done)
    assert report["status"] == "completed" and report["optimizer_steps"] == 12
    assert report["head_only_val_accuracy"] == report["history"][0]["val_accuracy"] == head["head_only_val_accuracy"]
    assert report["history"][0]["val_loss"] == pytest.approx(head["history"][0]["val_loss"], rel=1e-4)
    assert report["peak_rss_bytes"] <= report["planned_peak_rss_bytes"], report["memory_samples"]
    stored, result = read_config(model), read_config(out)
    assert result.linears == stored.linears and result.epsilon == stored.epsilon
    kinds = json.loads((out / "config.json").read_text())["linears"]
    dense = [name for name, rank in stored.linears.items() if rank is None]
    assert {name for name, entry in kinds.items() if entry["kind"] == "dense"} == set(dense)
    note = f"{len(dense)} of {len(kinds)} linears are stored dense and are trained dense: {dense[0]}"
    said = " ".join(done.stderr.split())
    assert note in said and "--epsilon" in said and "truncated" not in said
    before, after = tensors(model), tensors(out)
    learned = [name for name in dense if report["trained_blocks"] == 2 or name.startswith("blocks.1.")]
    for name in dense:
        changed = not np.array_equal(before[f"{name}.weight"], after[f"{name}.weight"])
        assert changed == (name in learned and report["best_epoch"] > 0), name


def test_a_run_of_a_mixed_network_resumes_to_the_same_weights(base, tmp_path):
    more = ("--epochs", 4, "--train-blocks", 2, "--checkpoint-every", "0.01s")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert report_of(run(*finetune(base, straight, *more, model=base["mixed"])))["status"] == "completed"
    arguments = finetune(base, killed, *more, model=base["mixed"])
    kill_when(arguments, lambda: any((killed / "checkpoint").glob("step-0000000[2-9]/manifest.json")))
    resumed = report_of(run(*arguments, "--resume"))
    assert resumed["status"] == "completed" and resumed["resumed_from_step"] > 0
    expected, actual = tensors(straight), tensors(killed)
    assert expected.keys() == actual.keys()
    assert all(np.array_equal(value, actual[name]) for name, value in expected.items())


def test_the_result_is_exported_and_gone_on_with(base, tmp_path):
    out = tmp_path / "out"
    report = report_of(run(*finetune(base, out, "--epochs", 1, model=base["mixed"])))
    assert report["onnx"]["file"] == "model.onnx"
    exported = tmp_path / "other.onnx"
    assert run("export", out, exported).returncode == 0
    with open_artefact(out) as artefact:
        write_onnx(artefact, tmp_path / "ours.onnx")
    views = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    expected = TorchClassifier(out).logits(views)
    for file in (exported, tmp_path / "ours.onnx"):
        assert np.abs(OnnxClassifier(file, 1).logits(views) - expected).max() < 1e-4 * np.abs(expected).max()
    again = report_of(run(*finetune(base, tmp_path / "again", "--epochs", 1, model=out)))
    assert again["status"] == "completed"
    assert read_config(tmp_path / "again").linears == read_config(out).linears


def test_a_lower_epsilon_puts_all_in_factors(base, tmp_path):
    out = tmp_path / "out"
    done = run(*finetune(base, out, "--epochs", 1, "--epsilon", "0.6", model=base["dense"]))
    assert report_of(done)["status"] == "completed" and "converted first, at epsilon 0.6" in done.stderr
    config = read_config(out)
    assert None not in config.linears.values() and config.epsilon == 0.6
