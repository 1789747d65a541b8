"""The pieces of training against obvious twins: head, loss, Adam, the factors' update, checkpoints, schedule."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from models import TINY, dense_reader, random_tensors, random_vit

from wasi_edge.chunks import TURNS
from wasi_edge.errors import WasiEdgeError
from wasi_edge.keep import ALL_KEEPS, EXACT
from wasi_edge.models.vanilla import build_vanilla
from wasi_edge.training.adam import Adam
from wasi_edge.training.checkpoint import latest_checkpoint, save_checkpoint
from wasi_edge.training.factor_update import FactorUpdate, polar_factor
from wasi_edge.training.first_head import fit_with_curve, suffices
from wasi_edge.training.head import FeatureStatistics, Head, accuracy_of_half, fit, fit_head, merge_statistics
from wasi_edge.training.loop import schedule
from wasi_edge.training.loss import cross_entropy
from wasi_edge.training.trainer import Recipe, SubspaceTrainer
from wasi_edge.training.vanilla_trainer import VanillaTrainer

RECIPE = Recipe(1e-3, 1e-3, 1e-3, 0.01, 1.0, 0.1)


def clusters(per_class=40, width=12, spread=0.4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.arange(classes).repeat(per_class)
    return centres[labels] + spread * torch.randn(len(labels), width, generator=generator), labels


def test_head_recognises_clusters_and_its_probabilities_are_sane():
    features, labels = clusters()
    head = fit_head(features, labels, 3)
    fresh, truth = clusters(seed=0, per_class=30)
    logits = fresh @ head.weight.t() + head.bias
    assert float((logits.argmax(1) == truth).float().mean()) > 0.95
    assert float(torch.nn.functional.cross_entropy(logits, truth)) < 0.5


def test_head_of_few_photos_is_not_infinitely_sharp():
    features, labels = clusters(per_class=3, width=200, spread=0.1)
    head = fit_head(features, labels, 3)
    assert float((features @ head.weight.t() + head.bias).abs().max()) < 30


def refitted_errors(features, labels, classes, penalty):
    """Sum of squared errors of every photo by a ridge regression without it: standardised features, free intercept."""
    x, y = features.double(), torch.nn.functional.one_hot(labels, classes).double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    total = 0.0
    for left_out in range(len(x)):
        rest = [i for i in range(len(x)) if i != left_out]
        mean_x, mean_y = x[rest].mean(0), y[rest].mean(0)
        inner = (x[rest] - mean_x).t() @ (x[rest] - mean_x) + penalty * len(x) * torch.eye(x.shape[1])
        weight = torch.linalg.solve(inner, (x[rest] - mean_x).t() @ (y[rest] - mean_y))
        total += float((mean_y + (x[left_out] - mean_x) @ weight - y[left_out]).square().sum())
    return total


@pytest.mark.parametrize(("width", "spread"), [(5, 0.8), (60, 2.5), (60, 0.5)])
def test_head_has_the_penalty_that_refitting_without_each_photo_would_choose(width, spread):
    """Fewer photos than features included: there a small penalty fits every photo, and says nothing of the next one."""
    features, labels = clusters(per_class=12, width=width, spread=spread)
    penalties = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0)
    best = min(penalties, key=lambda penalty: refitted_errors(features, labels, 3, penalty))
    x = features.double()
    deviation = x.std(0, correction=0)
    x = (x - x.mean(0)) / deviation
    y = torch.nn.functional.one_hot(labels, 3).double() - 1 / 3
    expected = torch.linalg.solve(x.t() @ x + best * len(x) * torch.eye(width), x.t() @ y).t() / deviation
    weight = fit_head(features, labels, 3).weight.double()
    sharpness = weight.norm() / expected.norm()
    assert float((weight / sharpness - expected).norm() / expected.norm()) < 1e-5


def test_head_of_fewer_photos_than_features_knows_new_photos():
    features, labels = clusters(per_class=40, width=300, spread=3.0)
    fresh, truth = clusters(per_class=200, width=300, spread=3.0, seed=0)
    fresh = fresh + 3.0 * torch.randn(fresh.shape, generator=torch.Generator().manual_seed(1))
    head = fit_head(features, labels, 3)
    assert float(((fresh @ head.weight.t() + head.bias).argmax(1) == truth).float().mean()) > 0.9


@pytest.mark.parametrize("spread", [0.0, 1e-6])
@pytest.mark.parametrize(("count", "width"), [(10, 192), (300, 48), (300, 192)])
def test_head_of_photos_that_are_all_alike_is_finite(count, width, spread):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(width, generator=generator).repeat(count, 1)
    features = features + spread * torch.randn(count, width, generator=generator)
    labels = torch.arange(count) % 2
    head = fit_head(features, labels, 2)
    assert bool(head.weight.isfinite().all()) and bool(head.bias.isfinite().all())
    assert len(fit_with_curve(features, labels, 2, None)[1]) == 2


def test_there_is_no_learning_curve_of_two_photos_a_class_or_of_photos_that_are_gone():
    features, labels = clusters(per_class=2)
    assert fit_with_curve(features, labels, 3, None)[1] == []
    features, labels = clusters()
    earlier = FeatureStatistics.of(features, labels, 3)
    assert fit_with_curve(features, labels, 3, lambda: earlier)[1] == [] != fit_with_curve(features, labels, 3, None)[1]


def test_a_rare_class_that_is_never_recognised_keeps_the_head_from_being_enough():
    labels = torch.tensor([0] * 1000 + [1] * 5)
    always_first = torch.tensor([[1.0, 0.0]]).repeat(len(labels), 1)
    right = torch.nn.functional.one_hot(labels, 2).float()
    curve = [{"photos": 500, "accuracy": 1.0}, {"photos": 1000, "accuracy": 1.0}]
    assert not suffices(always_first, labels, curve) and suffices(right, labels, curve)
    assert not suffices(right[:10], labels[:10], curve) and not suffices(right, labels, [])


def test_accuracy_on_photos_left_out_is_that_on_new_ones_and_half_of_the_photos_knows_less():
    features, labels = clusters(per_class=30, width=80, spread=5.0)
    fitted = fit(features, labels, 3)
    generator = torch.Generator().manual_seed(2)
    centres, _ = clusters(per_class=1, width=80, spread=0.0)
    truth = torch.randint(0, 3, (3000,), generator=generator)
    fresh = centres[truth] + 5.0 * torch.randn(3000, 80, generator=generator)
    logits = fresh @ fitted.head.weight.t() + fitted.head.bias
    known = float((logits.argmax(1) == truth).float().mean())
    assert abs(fitted.left_out_accuracy - known) < 0.1
    half, accuracy = accuracy_of_half(features, labels, 3)
    assert half == 45 and accuracy < fitted.left_out_accuracy


def test_a_rare_class_is_not_drowned():
    features, labels = clusters(per_class=60, spread=0.9)
    rare = torch.cat([(labels != 2).nonzero().flatten(), (labels == 2).nonzero().flatten()[:5]])
    head = fit_head(features[rare], labels[rare], 3)
    logits = features @ head.weight.t() + head.bias
    recall = (logits.argmax(1)[labels == 2] == 2).float().mean()
    assert float(recall) > 0.6


def test_head_keeps_a_class_that_has_statistics_but_no_photos():
    features, labels = clusters()
    earlier = FeatureStatistics.of(features, labels, 3)
    now = labels != 1
    head = fit_head(features[now], labels[now], 3, earlier)
    logits = features @ head.weight.t() + head.bias
    for label in range(3):
        assert float((logits.argmax(1)[labels == label] == label).float().mean()) > 0.9


def test_merging_statistics_leaves_classes_with_photos_alone():
    features, labels = clusters()
    earlier = FeatureStatistics.of(features, labels, 3)
    now = FeatureStatistics.of(features[labels != 1], labels[labels != 1], 3)
    merged = merge_statistics(now, earlier)
    assert torch.equal(merged.sums[0], now.sums[0])
    assert float(merged.counts[1]) > 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_equal_torch(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    labels, weight = torch.tensor([0, 1, 2, 3, 0]), torch.rand(5, generator=generator, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    (expected * weight).sum().div(8).backward()
    loss = cross_entropy(logits.detach(), labels, weight, 8, smoothing)
    assert abs(loss.value - float((expected * weight).sum())) < 1e-12
    assert float((loss.dlogits - logits.grad).abs().max()) < 1e-15


def test_a_class_without_photos_gets_no_gradient():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    active = torch.tensor([True, False, True, True])
    loss = cross_entropy(logits, torch.tensor([0, 2, 3]), torch.ones(3), 3, 0.1, active)
    assert bool((loss.dlogits[:, 1] == 0).all()) and bool(loss.dlogits.isfinite().all())
    assert abs(float(loss.dlogits.sum())) < 1e-6


def test_adam_equals_torch_over_several_steps():
    value = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    twin = value.clone().requires_grad_()
    optimizer = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.1)
    adam = Adam()
    for step in range(1, 6):
        gradient = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        twin.grad = gradient.clone()
        optimizer.step()
        adam.update("w", value, gradient.clone(), 0.01, step, decay=0.1)
        assert float((value - twin.detach()).abs().max()) < 1e-14


def test_polar_factor_has_unit_singular_values_and_survives_zero():
    matrix = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert float((polar_factor(matrix) - left @ right).abs().max()) < 5e-3  # the floor shortens weak directions
    assert float(polar_factor(torch.zeros(4, 2)).abs().max()) == 0


def trainer_of(seed=0, keep=EXACT, carry_grams=True, recipe=RECIPE):
    model = random_vit(dtype=torch.float32, seed=seed)
    return SubspaceTrainer(model, recipe, [keep] * TINY.depth, 4, seed, carry_grams=carry_grams)


def one_step(trainer, step, micro=2):
    generator = torch.Generator().manual_seed(100 + step)
    pixels = torch.randn(4, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 3, (4,), generator=generator)
    for first in range(0, 4, micro):
        part = slice(first, first + micro)
        trainer.micro_batch(pixels[part], labels[part], torch.ones(micro), first == 0, 4)
    return trainer.apply(step, 1.0)


def test_the_weight_moves_by_one_exact_wsi_step_of_the_dense_rule():
    trainer = trainer_of()
    linear = trainer.model.linears()["blocks.0.fc1"]
    before = (linear.params["left"] @ linear.params["right"]).double()
    projected = torch.randn(linear.shape[0], 4, generator=torch.Generator().manual_seed(1))
    rule = FactorUpdate({"x": linear}, 0.0)
    eta = 0.05 * float(before.norm())
    target = before - eta * polar_factor(projected.double() * 0.1) @ linear.basis.double().t()
    rule.update("x", projected.clone(), 0.05, 1)
    after = (linear.params["left"] @ linear.params["right"]).double()
    rank = linear.params["left"].shape[1]
    u, s, v = torch.linalg.svd(target, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    moved, ideal = (after - before).norm(), (best - before).norm()
    assert 0.5 < float(moved / ideal) < 1.5
    # one warm-started iteration: close to the best truncation, at any rate closer than not moving
    assert float((after - target).norm()) < 1.2 * float((best - target).norm()) + 1e-3


@pytest.mark.parametrize("keep", ALL_KEEPS)
def test_training_lowers_the_loss(keep):
    trainer = trainer_of(keep=keep)
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    labels = torch.tensor([0, 1, 2, 0])
    losses = []
    for step in range(1, 31):
        losses.append(trainer.micro_batch(pixels, labels, torch.ones(4), True, 4).value)
        trainer.apply(step, 1.0)
    assert losses[-1] < 0.7 * losses[0]


def test_rebuilt_gram_matrices_train_like_carried_ones_and_are_not_held():
    carried, rebuilt = trainer_of(), trainer_of(carry_grams=False)
    for step in range(1, 6):
        one_step(carried, step)
        one_step(rebuilt, step)
    assert not any("gram" in name for name in rebuilt.state())
    for name in carried.model.linears():
        here, there = (t.model.linears()[name].params for t in (carried, rebuilt))
        expected = here["left"] @ here["right"]
        error = (there["left"] @ there["right"] - expected).norm() / expected.norm()
        assert float(error) < 1e-3, name  # float32 rounding, amplified by Adam on near-zero gradients elsewhere


def vanilla_of(recipe):
    _, tensors = random_tensors(TINY, dtype=torch.float32)
    trainer = VanillaTrainer(build_vanilla(TINY, dense_reader(tensors), 16, 3), recipe)
    trainer.set_head(Head(tensors["head.weight"], tensors["head.bias"]))
    return trainer


def by_share(share, stem_rate=1.0):
    """All rates of RECIPE at a share."""
    rates = {rate: share * getattr(RECIPE, rate) for rate in ("learning_rate", "dense_rate", "head_rate")}
    return replace(RECIPE, stem_rate=stem_rate, **rates)


def place_of(name):
    """0 before the blocks, the number of one of them from 1, or the next after them."""
    if name.startswith(("norm.", "head.")):
        return TINY.depth + 1
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0


@pytest.mark.parametrize("build", [trainer_of, vanilla_of])
def test_a_block_learns_as_if_all_did_at_its_share(build):
    shares = [1 / 16, 1 / 4, 1.0, 1.0]  # before two blocks, of each, after them
    moved = set()
    for step in range(1, TURNS + 1):  # as the first: linears take turns
        decayed, start = build(recipe=by_share(1.0, 1 / 16)), build(recipe=RECIPE).parameters()
        one_step(decayed, step)
        for place, share in enumerate(shares):
            alike = build(recipe=by_share(share))
            one_step(alike, step)
            for name, value in decayed.parameters().items():
                if place_of(name) == place:
                    assert torch.equal(value, alike.parameters()[name]), name
                    moved |= set() if torch.equal(value, start[name]) else {name}
    assert moved == set(start)


@pytest.mark.parametrize("carry_grams", [True, False])
def test_state_restores_a_run_to_the_bit(tmp_path, carry_grams):
    straight = trainer_of(carry_grams=carry_grams)
    for step in range(1, 6):
        one_step(straight, step)
    begun = trainer_of(carry_grams=carry_grams)
    for step in range(1, 3):
        one_step(begun, step)
    save_checkpoint(tmp_path, 2, begun.state(), {"step": 2})
    resumed = trainer_of(seed=5, carry_grams=carry_grams)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.progress == {"step": 2}
    resumed.load_state(checkpoint.tensors())
    for step in range(3, 6):
        one_step(resumed, step)
    for name, value in straight.state().items():
        assert torch.equal(value, resumed.state()[name]), name


def test_an_abandoned_step_leaves_no_trace():
    straight, stopped = trainer_of(), trainer_of()
    one_step(straight, 1)
    one_step(stopped, 1)
    stopped.micro_batch(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]), torch.ones(2), True, 4)
    stopped.abandon()
    one_step(straight, 2)
    one_step(stopped, 2)
    for name, value in straight.state().items():
        assert torch.equal(value, stopped.state()[name]), name


def test_a_gradient_that_is_not_finite_is_an_error_with_a_remedy():
    trainer = trainer_of()
    trainer.model.norm.params["weight"].fill_(float("inf"))
    trainer.micro_batch(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]), torch.ones(2), True, 2)
    with pytest.raises(WasiEdgeError, match="--lr"):
        trainer.apply(1, 1.0)


def test_micro_batches_add_up_to_the_batch():
    whole, parts = trainer_of(), trainer_of()
    # the basis is refreshed from the first micro-batch, so only the dense parameters' gradients are comparable
    norms = [one_step(whole, 1, micro=4), one_step(parts, 1, micro=1)]
    assert abs(norms[0] - norms[1]) < 0.2 * norms[0]
    name = "norm.bias"
    assert torch.allclose(whole.parameters()[name], parts.parameters()[name], atol=1e-5)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path):
    save_checkpoint(tmp_path, 1, {"a": torch.ones(3)}, {"n": 1})
    newest = save_checkpoint(tmp_path, 2, {"a": torch.zeros(3)}, {"n": 2})
    with open(newest / "state.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 1


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    save_checkpoint(tmp_path, 1, {"a": torch.ones(3)}, {"n": 1})
    folder = save_checkpoint(tmp_path, 2, {"a": torch.ones(3)}, {"n": 2})
    (folder / "manifest.json").unlink()
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 1


def test_only_two_checkpoints_are_kept(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, {"a": torch.ones(1)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]
    assert json.loads((tmp_path / "step-00000005" / "manifest.json").read_text())["step"] == 5


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(WasiEdgeError, match="free disk"):
        save_checkpoint(tmp_path, 1, {"a": torch.ones(3)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_the_same_step_is_not_taken_away_to_be_written_again(tmp_path, monkeypatch):
    state = {"a": torch.arange(4.0)}
    folder = save_checkpoint(tmp_path, 3, state, {"step": 3})
    written = (folder / "state.safetensors").stat().st_ino
    monkeypatch.setattr("wasi_edge.training.checkpoint.TensorWriter", None)
    assert save_checkpoint(tmp_path, 3, state, {"step": 3}) == folder
    assert (folder / "state.safetensors").stat().st_ino == written


def test_schedule_warms_up_and_ends_near_zero():
    values = [schedule(step, 100, 0.1) for step in range(1, 101)]
    assert values[0] < 0.2 and max(values) > 0.9 and 0 <= values[-1] < 0.01
    assert values.index(max(values)) in range(8, 12)


def test_photos_that_are_all_alike_still_get_a_head():
    features = torch.full((40, 12), 1e4) + 0.1
    labels = torch.arange(40) % 2
    head = fit_head(features, labels, 2)
    assert bool(head.weight.isfinite().all() and head.bias.isfinite().all())
