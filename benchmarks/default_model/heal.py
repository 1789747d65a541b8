"""Heal the truncated default model: keep what the dense network knew of photos, learn what small pictures show.

    python -m benchmarks.default_model.heal --source ../shared/models/vit-s14 --photos ../shared/data/photos-1k \
        --tiles ../shared/data/tiny-imagenet-32 --student build/default-converted --out wasi_edge/default_model

Every step sees crops of unlabelled photos, half of the time mixed in pairs, and small labelled pictures. On photos the
loss is the squared error of the tokens after the last norm, and of what a head reads of them (class token, mean of the
patches), each relative to the dense network's spread; on small pictures, the cross-entropy of a linear classifier on
what a head reads, which is thrown away in the end. Sizes take turns. AdamW on balanced factors under torch autograd:
this runs on a developer's machine, memory does not matter. Evaluation photos are not used,
nor what `overlap` finds to be the same as one. Resumable: the state is written to --state every 50 steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.default_model.pictures import Tiles, photo_paths, read_tiles
from wasi_edge.artefact import Artefact, open_artefact, write_artefact
from wasi_edge.atomic import replacing
from wasi_edge.conversion.sources import open_source
from wasi_edge.data.augment import augment, epoch_order
from wasi_edge.models.network import resampled
from wasi_edge.models.vanilla import VanillaViT, build_vanilla
from wasi_edge.preprocess import normalise, open_photo, shrink
from wasi_edge.preprocessing import Preprocessing
from wasi_edge.subspace.factors import orthonormal_pair
from wasi_edge.training.head import fit_head

# input size and pictures of a step: steps go through these in turn
PHOTO_STEPS = ((168, 5), (112, 9))
TILE_STEPS = ((84, 24), (84, 24), (112, 14), (84, 24))
# bees: `hymenoptera` was taken from the same photos, and not every crop of one can be found
LEFT_OUT = ("n02206856",)
PHOTO_WEIGHT, LABEL_SMOOTHING = 2.0, 0.1
WARM_UP, CLIP, CLASSIFIER_RATE = 100, 1.0, 5e-4
SAVED_EVERY, FITTED_ON_EACH, SIDE = 50, 25, 224
PHOTO_CROPS, TILE_CROPS = (0.2, 1.0), (0.5, 1.0)


class TwoFactors(nn.Module):
    """x -> (x R^T) L^T + b."""

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor) -> None:
        super().__init__()
        balance = (right.norm(dim=1) / left.norm(dim=0)).sqrt()
        self.left = nn.Parameter(left * balance)
        self.right = nn.Parameter(right / balance[:, None])
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.right), self.left, self.bias)


class Sized:
    """A network whose position table is resampled to the size of what it sees, and not trained.

    With `bfloat16`, its matrix products are computed in that precision; parameters and results stay float32.
    """

    def __init__(self, model: VanillaViT, position: Tensor, sizes: Sequence[int], bfloat16: bool) -> None:
        self.model = model
        self._bfloat16 = bfloat16
        self._tables = {size: resampled("position", position, model.geometry, size).clone() for size in sizes}

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, S, S) -> tokens after the last norm (B, N, D), and what a head reads of them (B, F)."""
        self.model.position = nn.Parameter(self._tables[pixels.shape[-1]], requires_grad=False)
        hidden: list[Tensor] = []
        hook = self.model.norm.register_forward_hook(lambda _, __, output: hidden.append(output))
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            read = self.model.features(pixels)
        hook.remove()
        return hidden[0].float(), read.float()


@dataclasses.dataclass(frozen=True)
class Crops:
    """Random crops of pictures, all of which pass once an epoch, keyed by seed and epoch."""

    pictures: Sequence[np.ndarray]
    scale: tuple[float, float]
    turns: tuple[tuple[int, int], ...]
    seed: int
    preprocessing: Preprocessing

    def of_step(self, step: int) -> tuple[list[int], Tensor]:
        """Which pictures a step sees, and their crops normalised, (B, 3, S, S)."""
        counts = [count for _, count in self.turns]
        rounds, turn = divmod(step, len(self.turns))
        first = rounds * sum(counts) + sum(counts[:turn])
        size, count = self.turns[turn]
        places = [divmod(number, len(self.pictures)) for number in range(first, first + count)]
        chosen = [(epoch, int(_order(len(self.pictures), self.seed, epoch)[at])) for epoch, at in places]
        views = [augment(self.pictures[i], size, self.seed, epoch, i, self.scale) for epoch, i in chosen]
        return [i for _, i in chosen], torch.from_numpy(normalise(np.stack(views), self.preprocessing))


@lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return epoch_order(count, seed, epoch)


def distance(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Errors of all tokens, and of what a head reads, each relative to its variance."""
    (tokens, read), (wanted_tokens, wanted_read) = student, teacher
    of_read = (read - wanted_read).square().mean() / wanted_read.var(0).mean()
    return (tokens - wanted_tokens).square().mean() / wanted_tokens.var() + of_read


def mixed(pixels: Tensor, seed: int) -> Tensor:
    """Every picture with another one, in random shares."""
    share = torch.from_numpy(np.random.default_rng(seed).random((len(pixels), 1, 1, 1), dtype=np.float32))
    return share * pixels + (1 - share) * pixels.flip(0)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run depends on beside its data; another run's state is of no use.

    `lr`: the highest of the network's parameters, on a cosine over `steps`.
    """

    steps: int = 6000
    lr: float = 3e-5
    seed: int = 0
    bfloat16: bool = False


class Healing:
    """The teacher, the student with its classifier, the pictures and the optimiser.

    A step is a function of its number and the state before it.
    """

    def __init__(
        self,
        artefact: Artefact,
        source: Path,
        photos: Path,
        tiles: Tiles,
        options: Options,
    ) -> None:
        config = artefact.config
        preprocessing = config.preprocessing
        kept = preprocessing.with_image_size(SIDE)
        paths = photo_paths(photos)
        shrunk = [np.asarray(shrink(open_photo(path, kept.resize_side), kept)) for path in paths]
        self.photos = Crops(shrunk, PHOTO_CROPS, PHOTO_STEPS, options.seed, preprocessing)
        self.tiles = Crops(tiles.pictures, TILE_CROPS, TILE_STEPS, options.seed + 1, preprocessing)
        self.labels, self.options, self.done = tiles.labels, options, 0
        self._data = _digest([path.name for path in paths], tiles, artefact)
        sizes = {size for size, _ in PHOTO_STEPS + TILE_STEPS}
        stored = lambda name: torch.from_numpy(artefact.tensors.read(name, np.float32))  # noqa: E731
        with open_source(source) as opened:
            read = lambda name: torch.from_numpy(opened.read(name))  # noqa: E731
            position = read("position")
            teacher = build_vanilla(config.geometry, read, preprocessing.image_size, 1).eval()
            student = build_vanilla(config.geometry, read, preprocessing.image_size, 1)
        assert isinstance(teacher, VanillaViT) and isinstance(student, VanillaViT)
        self.teacher = Sized(teacher.requires_grad_(False), position, sorted(sizes), options.bfloat16)
        self.student = Sized(_in_factors(student, artefact), stored("position"), sorted(sizes), options.bfloat16)
        self.classifier = nn.Linear(config.geometry.feature_width, tiles.classes)
        self.trained = {
            name: parameter
            for name, parameter in student.named_parameters()
            if name != "position" and not name.startswith("head.")
        }
        groups = [
            {"params": list(self.trained.values()), "highest": options.lr},
            {"params": list(self.classifier.parameters()), "highest": CLASSIFIER_RATE},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=0.0)

    @torch.no_grad()
    def fit_classifier(self, tiles: Tiles) -> None:
        """In closed form, on some tiles of each class."""
        chosen = tiles.spread(FITTED_ON_EACH * tiles.classes)
        size, features = TILE_STEPS[0][0], []
        for part in np.array_split(chosen, math.ceil(len(chosen) / 64)):
            views = [augment(tiles.pictures[i], size, self.options.seed, 0, int(i), TILE_CROPS) for i in part]
            pixels = torch.from_numpy(normalise(np.stack(views), self.tiles.preprocessing))
            features.append(self.student.see(pixels)[1])
        head = fit_head(torch.cat(features), torch.from_numpy(tiles.labels[chosen]), tiles.classes)
        self.classifier.weight.copy_(head.weight)
        self.classifier.bias.copy_(head.bias)

    def step(self) -> tuple[float, float]:
        """Errors of photos and of tiles."""
        _, photos = self.photos.of_step(self.done)
        if self.done // len(TILE_STEPS) % 2:
            photos = mixed(photos, self.done)
        with torch.no_grad():
            wanted = self.teacher.see(photos)
        of_photos = distance(self.student.see(photos), wanted)
        (PHOTO_WEIGHT * of_photos).backward()
        chosen, tiles = self.tiles.of_step(self.done)
        logits = self.classifier(self.student.see(tiles)[1])
        of_tiles = F.cross_entropy(logits, torch.from_numpy(self.labels[chosen]), label_smoothing=LABEL_SMOOTHING)
        of_tiles.backward()
        nn.utils.clip_grad_norm_(self.trained.values(), CLIP)
        rate = min(1.0, (self.done + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * self.done / self.options.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return of_photos.item(), of_tiles.item()

    def save(self, path: Path) -> None:
        """Write what `load` needs, all of it or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "trained": dict(self.trained),
            "classifier": self.classifier.state_dict(),
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
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["step"]


def _digest(photos: Sequence[str], tiles: Tiles, artefact: Artefact) -> str:
    """Of names, not of every pixel: what tells two runs apart."""
    first = artefact.tensors.read(f"{_factored(artefact)[0]}.left")
    parts = [*photos, *tiles.names, str(len(tiles.labels))]
    return hashlib.sha256("\n".join(parts).encode() + first.tobytes()).hexdigest()


def _factored(artefact: Artefact) -> list[str]:
    return [name for name, rank in artefact.config.linears.items() if rank is not None]


@torch.no_grad()
def _in_factors(student: VanillaViT, artefact: Artefact) -> VanillaViT:
    """With what the artefact has, linears of blocks as pairs."""
    stored = lambda name: torch.from_numpy(artefact.tensors.read(name, np.float32))  # noqa: E731
    for name in _factored(artefact):
        _, index, linear = name.split(".")
        pair = TwoFactors(stored(f"{name}.left"), stored(f"{name}.right"), stored(f"{name}.bias"))
        setattr(student.blocks[int(index)], linear, pair)
    for name, parameter in student.named_parameters():
        if name != "position" and not name.startswith("head.") and not name.endswith((".left", ".right")):
            parameter.copy_(stored(name))
    return student


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
    parser.add_argument("--bfloat16", action="store_true", help="1.5 times faster where the CPU has AVX512-BF16")
    given = parser.parse_args()

    artefact, tiles = open_artefact(given.student), read_tiles(given.tiles, LEFT_OUT)
    options = Options(given.steps, given.lr, given.seed, given.bfloat16)
    healing = Healing(artefact, given.source, given.photos, tiles, options)
    if given.state.exists():
        try:
            healing.load(given.state)
        except ValueError as problem:
            parser.error(str(problem))
    else:
        healing.fit_classifier(tiles)
    began, recent = time.monotonic(), []
    while healing.done < options.steps:
        recent.append(healing.step())
        if healing.done % SAVED_EVERY == 0 or healing.done == options.steps:
            healing.save(given.state)
            of_photos, of_tiles = np.mean(recent, axis=0)
            print(f"step {healing.done}: {of_photos:.3f} {of_tiles:.3f}, {time.monotonic() - began:.0f} s", flush=True)
            recent = []
    sets = f"{options.steps} steps: the dense network's features on {given.photos.name}, labels of {given.tiles.name}"
    write(healing.trained, artefact, given.out, sets)
    return 0


@torch.no_grad()
def write(trained: dict[str, nn.Parameter], artefact: Artefact, out: Path, healed: str) -> None:
    """The healed tensors as a float16 artefact, factors orthonormal on the left; the position table is untouched."""
    config = artefact.config
    named = {name: value.detach() for name, value in trained.items()}
    for name in _factored(artefact):
        pair = orthonormal_pair(named[f"{name}.left"], named[f"{name}.right"])
        named[f"{name}.left"], named[f"{name}.right"] = pair.left, pair.right
    described = dataclasses.replace(config, provenance={**config.provenance, "healed": healed})
    with write_artefact(out, described) as writer:
        for name in config.tensor_shapes():
            value = artefact.tensors.read(name) if name == "position" else named[name].numpy().astype(np.float16)
            writer.add(name, value)


if __name__ == "__main__":
    sys.exit(main())
