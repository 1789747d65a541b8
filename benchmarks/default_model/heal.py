"""Heal the truncated default model: keep what the dense network knew of photos, learn what small pictures show, and
what a network of ImageNet knows of sharp photos.

    python -m benchmarks.default_model.heal --source ../shared/models/vit-s14 --photos ../shared/data/photos-1k \
        --tiles ../shared/data/tiny-imagenet-32 --student build/converted-vit-s14 --out wasi_edge/default_model

Every step sees crops of unlabelled photos, half of the time mixed in pairs, and small labelled pictures. On photos the
loss is the squared error of the tokens after the last norm, and of what a head reads of them (class token, mean of the
patches), each relative to the dense network's spread; beside it the answers and the features of EfficientNet-Lite2, as
linear readers see them in what a head reads; on small pictures, the cross-entropy of a linear reader. All readers are
thrown away in the end. Sizes take turns. AdamW on balanced factors under torch autograd: this runs on a developer's
machine, memory does not matter. Evaluation photos are not used, nor what `overlap` finds to be the same as one, nor
classes that evaluation tasks are drawn from. Resumable: the state is written to --state every 50 steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.default_model.crops import Crops, mixed, shrunk
from benchmarks.default_model.pictures import Tiles, photo_paths, read_tiles
from benchmarks.default_model.student import Sized, factored, in_factors
from benchmarks.default_model.teachers import DenseTeacher, ImageNetTeacher, Readers
from wasi_edge.artefact import Artefact, open_artefact, write_artefact
from wasi_edge.atomic import replacing
from wasi_edge.conversion.sources import open_source
from wasi_edge.models.vanilla import VanillaViT, build_vanilla
from wasi_edge.preprocess import normalise, open_photo, shrink
from wasi_edge.subspace.factors import orthonormal_pair
from wasi_edge.training.head import fit_head

# input size and pictures of a step: steps go through these in turn
PHOTO_STEPS = ((112, 12), (168, 6))
TILE_STEPS = ((84, 24), (84, 24), (112, 14), (84, 24))
# weight of the dense network, whose error is what regularises: a thousand photos are soon known by heart
KEEP, LABEL_SMOOTHING = 2.0, 0.1
WARM_UP, CLIP, READER_RATE = 100, 1.0, 5e-4
SAVED_EVERY, FITTED_ON_EACH, SPREAD_OVER, AT_ONCE = 50, 20, 64, 50
# side of a photo as it is kept, and of its crops as Lite2 sees them, px
SIDE, VIEW = 260, 224
PHOTO_CROPS, FITTED_CROPS, TILE_CROPS = (0.08, 1.0), (0.5, 1.0), (0.5, 1.0)


class Rival(Protocol):
    """A network that has seen labels of sharp photos."""

    def answers(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, S, S, 3) -> logits, features."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run depends on beside its data; another run's state is of no use.

    `lr`: the highest of the network's parameters, on a cosine over `steps`.
    """

    steps: int = 6000
    lr: float = 1.5e-5
    seed: int = 0
    bfloat16: bool = False


class Healing:
    """The teachers, the student with its readers, the pictures and the optimiser.

    A step is a function of its number and the state before it.
    """

    def __init__(
        self,
        artefact: Artefact,
        source: Path,
        photos: Path,
        tiles: Tiles,
        options: Options,
        rival: Rival,
    ) -> None:
        config = artefact.config
        self.preprocessing = config.preprocessing
        kept = self.preprocessing.with_image_size(SIDE)
        paths = photo_paths(photos)
        pictures = [np.asarray(shrink(open_photo(path, kept.resize_side), kept)) for path in paths]
        self.photos = Crops(pictures, PHOTO_CROPS, PHOTO_STEPS, options.seed, VIEW)
        self.tiles = Crops(tiles.pictures, TILE_CROPS, TILE_STEPS, options.seed + 1)
        self.labels, self.options, self.rival, self.done = torch.from_numpy(tiles.labels), options, rival, 0
        self._data = _digest([path.name for path in paths], tiles, artefact)
        sizes = sorted({size for size, _ in PHOTO_STEPS + TILE_STEPS})
        with open_source(source) as opened:
            read = lambda name: torch.from_numpy(opened.read(name))  # noqa: E731
            position = read("position")
            dense, student = (build_vanilla(config.geometry, read, self.preprocessing.image_size, 1) for _ in range(2))
        assert isinstance(dense, VanillaViT) and isinstance(student, VanillaViT)
        before = Sized(dense.eval().requires_grad_(False), position, sizes, options.bfloat16)
        views = self.photos.of_all(FITTED_CROPS, SPREAD_OVER)
        self.dense = DenseTeacher.over(before, self._normalised(shrunk(views, PHOTO_STEPS[0][0])))
        position = torch.from_numpy(artefact.tensors.read("position", np.float32))
        self.student = Sized(in_factors(student, artefact), position, sizes, options.bfloat16)
        self.readers = Readers(config.geometry.feature_width, tiles.classes)
        self.trained = self.student.trained()
        groups = [
            {"params": list(self.trained.values()), "highest": options.lr},
            {"params": list(self.readers.parameters()), "highest": READER_RATE},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def fit_readers(self, tiles: Tiles) -> None:
        """In closed form, on one crop of every photo and some tiles of each class."""
        views = self.photos.of_all(FITTED_CROPS)
        answers = [self.rival.answers(part) for part in torch.from_numpy(views).split(AT_ONCE)]
        read = self._read(views, PHOTO_STEPS[0][0])
        self.readers.fit(read, *(torch.cat(found) for found in zip(*answers, strict=True)))
        chosen = tiles.spread(FITTED_ON_EACH * tiles.classes)
        some = dataclasses.replace(self.tiles, pictures=[tiles.pictures[i] for i in chosen])
        read = self._read(some.of_all(TILE_CROPS), TILE_STEPS[0][0])
        head = fit_head(read, torch.from_numpy(tiles.labels[chosen]), tiles.classes)
        self.readers.tiles.weight.copy_(head.weight)
        self.readers.tiles.bias.copy_(head.bias)

    def step(self) -> tuple[float, float, float]:
        """Distances of photos from the dense network and from the rival, and the loss of tiles."""
        _, size, views = self.photos.of_step(self.done)
        if self.done // (2 * len(PHOTO_STEPS)) % 2:
            views = mixed(views, self.done)
        pixels = self._normalised(shrunk(views, size))
        seen = self.student.see(pixels)
        of_dense = self.dense.distance(seen, pixels)
        of_rival = self.readers.distance(seen[1], *self.rival.answers(torch.from_numpy(views)))
        (KEEP * of_dense + of_rival).backward()
        chosen, _, crops = self.tiles.of_step(self.done)
        logits = self.readers.tiles(self.student.see(self._normalised(crops))[1])
        of_tiles = F.cross_entropy(logits, self.labels[chosen], label_smoothing=LABEL_SMOOTHING)
        of_tiles.backward()
        nn.utils.clip_grad_norm_(self.trained.values(), CLIP)
        rate = min(1.0, (self.done + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * self.done / self.options.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return of_dense.item(), of_rival.item(), of_tiles.item()

    def save(self, path: Path) -> None:
        """Write what `load` needs, all of it or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "trained": dict(self.trained),
            "readers": self.readers.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.done,
            "options": dataclasses.asdict(self.options),
            "data": self._data,
        }
        with replacing(path) as file:
            torch.save(state, file)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from there. Raises ValueError where it was begun with other options, when rates would jump, or with
        other pictures or weights."""
        state = torch.load(path, weights_only=True)
        begun, wanted = state["options"], dataclasses.asdict(self.options)
        if begun != wanted:
            raise ValueError(f"{path} was begun with {begun}, not {wanted}: delete it, or keep to those")
        if state["data"] != self._data:
            raise ValueError(f"{path} was begun with other photos, tiles or weights: delete it, or keep to those")
        for name, parameter in self.trained.items():
            parameter.copy_(state["trained"][name])
        self.readers.load_state_dict(state["readers"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["step"]

    def _normalised(self, views: np.ndarray) -> Tensor:
        return torch.from_numpy(normalise(views, self.preprocessing))

    def _read(self, views: np.ndarray, size: int) -> Tensor:
        """What a head reads of all views at that input size, (n, F)."""
        parts = (views[first : first + AT_ONCE] for first in range(0, len(views), AT_ONCE))
        return torch.cat([self.student.see(self._normalised(shrunk(part, size)))[1] for part in parts])


def _digest(photos: Sequence[str], tiles: Tiles, artefact: Artefact) -> str:
    """Of names, not of every pixel: what tells two runs apart."""
    first = artefact.tensors.read(f"{factored(artefact)[0]}.left")
    parts = [*photos, *tiles.names, str(len(tiles.labels))]
    return hashlib.sha256("\n".join(parts).encode() + first.tobytes()).hexdigest()


def main() -> int:
    """Train, and write the healed artefact in float16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--tiles", type=Path, required=True, help="mosaics of Tiny ImageNet")
    parser.add_argument("--student", type=Path, required=True, help="artefact made by convert")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, default=Path("build/heal-state.pt"))
    parser.add_argument("--steps", type=int, default=Options.steps)
    parser.add_argument("--lr", type=float, default=Options.lr)
    parser.add_argument("--seed", type=int, default=Options.seed)
    parser.add_argument("--bfloat16", action="store_true", help="faster on CPUs that multiply in it")
    given = parser.parse_args()

    artefact, tiles = open_artefact(given.student), read_tiles(given.tiles)
    options = Options(given.steps, given.lr, given.seed, given.bfloat16)
    try:
        rival = ImageNetTeacher()
    except ImportError as problem:
        parser.error(f"{problem}: benchmarks/accuracy/rivals.py says what to install")
    healing = Healing(artefact, given.source, given.photos, tiles, options, rival)
    if given.state.exists():
        try:
            healing.load(given.state)
        except ValueError as problem:
            parser.error(str(problem))
    else:
        healing.fit_readers(tiles)
    began, recent = time.monotonic(), []
    while healing.done < options.steps:
        recent.append(healing.step())
        if healing.done % SAVED_EVERY == 0 or healing.done == options.steps:
            healing.save(given.state)
            means = " ".join(f"{value:.3f}" for value in np.mean(recent, axis=0))
            print(f"step {healing.done}: {means}, {time.monotonic() - began:.0f} s", flush=True)
            recent = []
    sets = f"the dense network and EfficientNet-Lite2 on {given.photos.name}, labels of {given.tiles.name}"
    write(healing.trained, artefact, given.out, f"{options.steps} steps: {sets}")
    return 0


@torch.no_grad()
def write(trained: dict[str, nn.Parameter], artefact: Artefact, out: Path, healed: str) -> None:
    """The healed tensors as a float16 artefact, factors orthonormal on the left; the position table is untouched."""
    config = artefact.config
    named = {name: value.detach() for name, value in trained.items()}
    for name in factored(artefact):
        pair = orthonormal_pair(named[f"{name}.left"], named[f"{name}.right"])
        named[f"{name}.left"], named[f"{name}.right"] = pair.left, pair.right
    described = dataclasses.replace(config, provenance={**config.provenance, "healed": healed})
    with write_artefact(out, described) as writer:
        for name in config.tensor_shapes():
            value = artefact.tensors.read(name) if name == "position" else named[name].numpy().astype(np.float16)
            writer.add(name, value)


if __name__ == "__main__":
    sys.exit(main())
