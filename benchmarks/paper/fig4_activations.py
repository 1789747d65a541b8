"""Fig. 4: how much of the inputs of a linear a few directions of each mode explain.

    python -m benchmarks.paper.fig4_activations

The dense ViT-S/14, a batch of `clothing` at 168 px, before and after vanilla fine-tuning. Inputs (B, N, I) of some
linears are unfolded in each mode; the table gives the ranks that explain 0.8 and 0.95 of the variance (as the paper,
without taking the mean out) and what the mean alone explains, which is most of the first direction; and, because
explained variance is not what training needs, the error of the weight's gradient at rank 32 of the last mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.datasets import fixed_split, load_photos
from benchmarks.accuracy.learn import Variant, learn
from benchmarks.accuracy.studies import DENSE_MODEL
from benchmarks.accuracy.study import Job
from benchmarks.paper.figures import open_store, write_plot, write_table
from wasi_edge.bench.subject import find_subject
from wasi_edge.report.svg import Series, line_chart
from wasi_edge.subspace.tucker import gradient_error
from wasi_edge.training.loss import cross_entropy
from wasi_edge.training.trainer import Trainer
from wasi_edge.training.vanilla_trainer import VanillaTrainer

LINEARS = tuple(f"blocks.{block}.{kind}" for block in (0, 5, 11) for kind in ("qkv", "fc1", "fc2"))
MODES = ("photos", "tokens", "features")
DATA, SIZE, EPOCHS, BATCH, GRADIENT_RANK = "clothing", 168, 4, 16, 32
SHOWN = ("blocks.0.fc1", "blocks.5.qkv", "blocks.5.fc1", "blocks.5.fc2", "blocks.11.fc2")


def main() -> None:
    """Train once, then draw."""
    store = open_store("fig4")
    job = Job(DATA, "vanilla", 0, _run)
    store.run([job])
    found = store.runs[job.key]["activations"]
    rows = []
    for entry in found:
        row = {"epoch": entry["epoch"], "linear": entry["linear"], "mean explains": entry["mean"]}
        for mode in MODES:
            shares = entry[mode]
            row |= {f"{mode}, of": len(shares), **{f"{mode}, {e}": _rank(shares, e) for e in (0.8, 0.95)}}
        rows.append({**row, "gradient error, by variance": entry["by variance"], "by gradient": entry["by gradient"]})
    write_table("fig4", rows, f"{DATA}, {SIZE} px, batch {BATCH}; gradient errors at rank {GRADIENT_RANK}")
    last = [entry for entry in found if entry["epoch"] == EPOCHS]
    for mode in MODES:
        curves = []
        for name in SHOWN:
            shares = next(entry[mode] for entry in last if entry["linear"] == name)
            curves.append(Series(name, range(1, 1 + len(shares[:48])), shares[:48]))
        write_plot(f"fig4-{mode}", line_chart(curves, f"directions of the {mode}", "variance explained", (0.0, 1.0)))


def _rank(shares: list[float], epsilon: float) -> int:
    return next(index for index, share in enumerate(shares, 1) if share >= epsilon - 1e-4)


def _run() -> dict[str, Any]:
    subject = find_subject(DENSE_MODEL, SIZE)
    photos = load_photos(DATA, subject.preprocessing)
    split = fixed_split(DATA, photos)
    order = torch.randperm(len(split.train), generator=torch.Generator().manual_seed(0))[:BATCH].tolist()
    chosen = split.train[order]
    pixels, labels = photos.inputs(chosen), photos.labels[torch.from_numpy(chosen)]
    activations: list[dict[str, Any]] = []

    def watch(epoch: int, trainer: Trainer) -> None:
        if epoch in (0, EPOCHS):
            assert isinstance(trainer, VanillaTrainer)
            for name, (x, dy) in _inputs_and_gradients(trainer.model, pixels, labels).items():
                activations.append({"epoch": epoch, "linear": name, **_describe(x, dy)})

    result = learn(subject, photos, split, Variant("vanilla", epochs=EPOCHS), 0, watch)
    return {**result, "activations": activations}


def _inputs_and_gradients(model: nn.Module, pixels: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """x (B, N, I) and dy (B, N, O) of each of `LINEARS`."""
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    hooks = []
    for name in LINEARS:
        linear = model.get_submodule(name)
        hooks += [
            linear.register_forward_hook(lambda _, given, __, name=name: inputs.update({name: given[0].detach()})),
            linear.register_full_backward_hook(lambda _, __, dy, name=name: gradients.update({name: dy[0]})),
        ]
    with torch.enable_grad():
        logits = model(pixels)
    loss = cross_entropy(logits.detach(), labels, torch.ones(len(labels)), len(labels), 0.1)
    logits.backward(loss.dlogits)
    model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    return {name: (inputs[name], gradients[name]) for name in LINEARS}


def _describe(x: Tensor, dy: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {"mean": float(x.mean((0, 1)).square().sum() * x[..., 0].numel() / x.square().sum())}
    for mode, name in enumerate(MODES):
        unfolded = x.movedim(mode, 0).reshape(x.shape[mode], -1).double()
        energy = torch.linalg.svdvals(unfolded).square()
        found[name] = [round(share, 5) for share in (energy.cumsum(0) / energy.sum()).tolist()]
    flat, dflat = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    by_variance = torch.linalg.svd(flat, full_matrices=False)[2][:GRADIENT_RANK].t().contiguous()
    by_gradient = torch.linalg.svd(dflat.t() @ flat, full_matrices=False)[2][:GRADIENT_RANK].t().contiguous()
    found["by variance"] = gradient_error(dflat, flat, by_variance)
    found["by gradient"] = gradient_error(dflat, flat, by_gradient)
    return found


if __name__ == "__main__":
    main()
