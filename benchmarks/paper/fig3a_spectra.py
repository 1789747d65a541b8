"""Fig. 3a: do the singular values of a weight change while a network is fine-tuned?

    python -m benchmarks.paper.fig3a_spectra

Vanilla fine-tuning of the dense ViT-S/14 on `clothing` at 112 px; after every epoch the singular values of a few
weights, and how much of the first epoch's dominant subspace is still in that epoch's (1: all of it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.datasets import fixed_split, load_photos
from benchmarks.accuracy.learn import Variant, learn
from benchmarks.accuracy.studies import DENSE_MODEL
from benchmarks.accuracy.study import Job
from benchmarks.paper.figures import open_store, write_plot, write_table
from wasi_edge.bench.subject import find_subject
from wasi_edge.report.svg import Series, line_chart
from wasi_edge.subspace.ranks import rank_for_explained_variance
from wasi_edge.training.trainer import Trainer

WEIGHTS = ("blocks.0.fc1.weight", "blocks.5.qkv.weight", "blocks.5.fc1.weight", "blocks.11.fc2.weight")
DATA, SIZE, EPOCHS, EPSILON = "clothing", 112, 8, 0.8


def main() -> None:
    """Train once, then draw."""
    store = open_store("fig3a")
    job = Job(DATA, "vanilla", 0, _run)
    store.run([job])
    found = store.runs[job.key]
    rows = [
        {"weight": name, **{key: value for key, value in entry.items() if key != "values"}}
        for name in WEIGHTS
        for entry in found["weights"][name]
    ]
    write_table("fig3a", rows, f"{DATA}, {SIZE} px, {EPOCHS} epochs of vanilla")
    for name in WEIGHTS:
        entries = found["weights"][name]
        shown = [entry for entry in entries if entry["epoch"] in (0, 1, EPOCHS // 2, EPOCHS)]
        curves = [
            Series(f"epoch {entry['epoch']}", range(1, 1 + len(entry["values"])), entry["values"]) for entry in shown
        ]
        write_plot(f"fig3a-{name.removesuffix('.weight')}", line_chart(curves, "index", "singular value"))


def _run() -> dict[str, Any]:
    subject = find_subject(DENSE_MODEL, SIZE)
    photos = load_photos(DATA, subject.preprocessing)
    weights: dict[str, list[dict[str, Any]]] = {name: [] for name in WEIGHTS}
    first: dict[str, Tensor] = {}

    def watch(epoch: int, trainer: Trainer) -> None:
        parameters = trainer.parameters()
        for name, entries in weights.items():
            left, values, _ = torch.linalg.svd(parameters[name].detach().double(), full_matrices=False)
            rank = rank_for_explained_variance(values.numpy(), EPSILON)
            start = first.setdefault(name, left[:, :rank].clone())
            entries.append(
                {
                    "epoch": epoch,
                    f"rank at {EPSILON}": rank,
                    "overlap with epoch 0": float((start.t() @ left[:, : start.shape[1]]).square().sum())
                    / start.shape[1],
                    "values": [round(value, 4) for value in values.tolist()],
                }
            )

    variant = Variant("vanilla", epochs=EPOCHS)
    return {**learn(subject, photos, fixed_split(DATA, photos), variant, 0, watch), "weights": weights}


if __name__ == "__main__":
    main()
