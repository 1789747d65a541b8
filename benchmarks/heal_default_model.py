"""Heal the truncated default model: teach its factors the dense network's last hidden state.

    python -m benchmarks.heal_default_model --source ../shared/models/vit-s14 --photos ../shared/data/photos-1k \
        --tiles ../shared/data/tiny-imagenet-32 --student build/default-converted --out wasi_edge/default_model

Teacher and student see the same random crops, a quarter of them of enlarged tiles. The loss is the squared error of
the student's tokens after the last norm, and of what a head reads of them (class token, mean of the patches), each
relative to the teacher's spread. AdamW on balanced factors under torch autograd: this runs on a developer's machine,
memory does not matter. Only the calibration photos are used, never an evaluation set. Resumable: the state is written
to --state every 10 steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.make_default_model import spread_tiles
from wasi_edge.artefact import open_artefact, write_artefact
from wasi_edge.conversion.sources import open_source
from wasi_edge.data.augment import augment, epoch_order
from wasi_edge.models.vanilla import VanillaViT, build_vanilla
from wasi_edge.preprocess import normalise, open_photo, shrink
from wasi_edge.subspace.factors import orthonormal_pair

BATCH, TILES_OF_BATCH, WARM_UP, CLIP = 16, 4, 40, 1.0


class TwoFactors(nn.Module):
    """x -> (x R^T) L^T + b."""

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor) -> None:
        super().__init__()
        balance = (right.norm(dim=1) / left.norm(dim=0)).sqrt()
        self.left = nn.Parameter(left * balance)
        self.right = nn.Parameter(right / balance[:, None])
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.right), self.left, self.bias)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Pictures of one kind: `each` of them in a batch, all of them once an epoch, in crops keyed by seed and epoch."""

    pictures: list[np.ndarray]
    each: int
    seed: int

    def views(self, step: int, size: int) -> list[np.ndarray]:
        """Crops (S, S, 3) of one step."""
        epoch, at = divmod(step, len(self.pictures) // self.each)
        order = epoch_order(len(self.pictures), self.seed, epoch)[at * self.each :][: self.each]
        return [augment(self.pictures[i], size, self.seed, epoch, int(i)) for i in order]


def tokens(model: VanillaViT, pixels: Tensor) -> Tensor:
    """(B, C, S, S) -> tokens after the last norm (B, N, D)."""
    hidden: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda _, __, output: hidden.append(output))
    model.features(pixels)
    hook.remove()
    return hidden[0]


def read_by_head(tokens: Tensor) -> Tensor:
    """(B, N, D) -> class token and mean of the patches (B, 2 D)."""
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Errors of all tokens, and of what a head reads, each relative to its variance."""
    read, wanted = read_by_head(student), read_by_head(teacher)
    of_read = (read - wanted).square().mean() / wanted.var(0).mean()
    return (student - teacher).square().mean() / teacher.var() + of_read


def main() -> int:
    """Train, and write the healed artefact in float16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--tiles", type=Path, required=True, help="mosaics of Tiny ImageNet")
    parser.add_argument("--tile-count", type=int, default=4000)
    parser.add_argument("--student", type=Path, required=True, help="artefact made by make_default_model.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, default=Path("build/heal-state.pt"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    artefact = open_artefact(options.student)
    config = artefact.config
    size, preprocessing = config.preprocessing.image_size, config.preprocessing
    with open_source(options.source) as source:
        read = lambda name: torch.from_numpy(source.read(name))  # noqa: E731
        teacher = build_vanilla(config.geometry, read, size, 1).eval()
        student = build_vanilla(config.geometry, read, size, 1)
    stored = lambda name: torch.from_numpy(artefact.tensors.read(name, np.float32))  # noqa: E731
    for index, block in enumerate(student.blocks):
        for linear in ("qkv", "proj", "fc1", "fc2"):
            name = f"blocks.{index}.{linear}"
            setattr(block, linear, TwoFactors(stored(f"{name}.left"), stored(f"{name}.right"), stored(f"{name}.bias")))
    for parameter in (*student.head.parameters(), student.position):
        parameter.requires_grad_(False)

    photos = sorted(path for path in options.photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    shrunk = [shrink(open_photo(path, preprocessing.resize_side), preprocessing) for path in photos]
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0)
    first = 0
    if options.state.exists():
        state = torch.load(options.state, weights_only=True)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    tiles = [shrink(tile, preprocessing) for tile in spread_tiles(options.tiles, options.tile_count)]
    pictures = Mixture(shrunk, BATCH - TILES_OF_BATCH, options.seed), Mixture(tiles, TILES_OF_BATCH, options.seed + 1)
    began, recent = time.monotonic(), []
    for step in range(first, options.steps):
        views = np.stack([view for part in pictures for view in part.views(step, size)])
        pixels = torch.from_numpy(normalise(views, preprocessing))
        with torch.no_grad():
            target = tokens(teacher, pixels)
        loss = distance(tokens(student, pixels), target)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        rate = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if (step + 1) % 10 == 0:
            print(f"step {step + 1}: error {sum(recent[-10:]) / len(recent[-10:]):.4f}, "
                  f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
            options.state.parent.mkdir(parents=True, exist_ok=True)
            torch.save(
                {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, options.state
            )
    write(student, artefact, options)
    return 0


@torch.no_grad()
def write(student: VanillaViT, artefact, options: argparse.Namespace) -> None:
    """The healed tensors as a float16 artefact, factors orthonormal on the left; the position table is untouched."""
    config = artefact.config
    named = {name: value.detach() for name, value in student.named_parameters()}
    for name in config.linears:
        pair = orthonormal_pair(named[f"{name}.left"], named[f"{name}.right"])
        named[f"{name}.left"], named[f"{name}.right"] = pair.left, pair.right
    sets = f"{options.photos.name} and {options.tiles.name}"
    healed = {**config.provenance, "healed": f"{options.steps} steps of distillation of the dense network on {sets}"}
    with write_artefact(options.out, dataclasses.replace(config, provenance=healed)) as writer:
        for name in config.tensor_shapes():
            value = artefact.tensors.read(name) if name == "position" else named[name].numpy().astype(np.float16)
            writer.add(name, value)


if __name__ == "__main__":
    sys.exit(main())
