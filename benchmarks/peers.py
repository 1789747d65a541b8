"""Our vanilla network beside timm's of the same geometry: whole training steps and forward passes, interleaved.

The yardstick of every comparison must not be a slow one. Both are fine-tuned by torch's AdamW under autograd, on the
same pixels, with the same clipping. Ours has what is given to all methods alike, the class row alone in the last block;
`--all-rows` takes it away.

    pip install timm && python benchmarks/peers.py vit_base_patch16_224 8
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor

from wasi_edge.bench.contestant import Contestant, free_choices, parse_methods
from wasi_edge.bench.subject import CLASSES, find_subject
from wasi_edge.bench.timing import interleave
from wasi_edge.training.loss import cross_entropy

ROUNDS = 7


def timm_network(name: str) -> Any:
    """With random weights. Where torchvision's binary does not fit the installed torch, its operators are only named:
    timm asks for them when it is imported, a vision transformer never calls them."""
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms", "roi_align"):
        with contextlib.suppress(RuntimeError):  # the real one is there
            library.define(f"{operator}(Tensor a, Tensor b, float c) -> Tensor")
    import timm

    return timm.create_model(name, num_classes=CLASSES)


class Peer:
    """timm's network with the step of `VanillaTrainer`."""

    def __init__(self, name: str, batch: int, size: int) -> None:
        self.model = timm_network(name)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.01)
        generator = torch.Generator().manual_seed(0)
        self._pixels = torch.randn(batch, 3, size, size, generator=generator)
        self._labels = torch.randint(0, CLASSES, (batch,), generator=generator)

    def step(self) -> None:
        """Forward, backward, clipping, AdamW."""
        self.model.train()
        with torch.enable_grad():
            logits = self.model(self._pixels)
        count = len(self._labels)
        loss = cross_entropy(logits.detach(), self._labels, torch.ones(count), count, 0.1)
        logits.backward(loss.dlogits)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def infer(self) -> Tensor:
        """Logits."""
        self.model.eval()
        with torch.no_grad():
            return self.model(self._pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("batch", type=int)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--all-rows", action="store_true")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    subject = find_subject(given.model)
    entry = parse_methods("vanilla", (0.8,))[0]
    ours = Contestant(subject, entry, free_choices(given.batch, subject.geometry.depth, 32), given.batch, 0)
    if given.all_rows:
        # the same weights, read as a head on the mean of the patches would read them
        geometry = dataclasses.replace(subject.geometry, features="mean")
        ours = Contestant(dataclasses.replace(subject, geometry=geometry), entry, ours.choices, given.batch, 0)
    peer = Peer(given.model, given.batch, subject.image_size)
    for work in ("step", "infer"):
        timed = interleave({"timm": getattr(peer, work), "ours": getattr(ours, work)}, given.rounds)
        low, high = timed["ours"].spread
        seconds = {name: f"{1e3 * value.median_seconds:.0f} ms" for name, value in timed.items()}
        print(f"{given.model} batch {given.batch} {work}: {seconds}, timm over ours {timed['ours'].speedup:.3f} "
              f"({low:.3f} to {high:.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
