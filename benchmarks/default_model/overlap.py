"""Which pictures the default model could be made from are evaluation photos, or crops of them.

    python -m benchmarks.default_model.overlap --photos ../shared/data/photos-1k --tiles ../shared/data/tiny-imagenet-32

Crops of each evaluation photo, also mirrored, are compared at 4 x 4 px with all pictures; the most alike few again at
32 x 32 px around that crop, by the correlation of what a blur takes away in each of 16 cells, which a chance likeness
of colours or of one edge does not share. What is alike is written to `overlap.json`, and `pictures` leaves it out.
The same photo had 0.58 and more wherever we looked; some chance likenesses of plain pictures have as much, and are
left out with them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.accuracy.datasets import all_photos, load_photos
from benchmarks.default_model.pictures import OVERLAP, all_tiles
from benchmarks.mosaics import TILE
from wasi_edge.preprocessing import Preprocessing

SETS = ("clothing", "flowers", "hymenoptera", "cifar10")
COARSE, CANDIDATES, COARSELY_ALIKE = 4, 6, 0.8
CELL = 8
SIZES, SIZES_OF_TILES, PLACES = (1.0, 0.85, 0.7, 0.55, 0.42), (1.0, 0.85, 0.7), (0.0, 0.5, 1.0)
# how far the sides of a crop move in search of a better one, by turns
SEARCH = (0.1, 0.06, 0.04, 0.02)
ALIKE = 0.5
Box = tuple[float, float, float, float]


def standard(pictures: np.ndarray) -> np.ndarray:
    """(n, ...) as unit vectors (n, d) without their mean: products are correlations."""
    flat = pictures.reshape(len(pictures), -1).astype(np.float32)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def fine(pictures: np.ndarray) -> np.ndarray:
    """What a blur over 5 x 5 px takes away of uint8 (n, 32, 32, 3), `standard` in each of 16 cells.

    A product is the mean of their correlations: one strong edge in both does not make two pictures alike.
    """
    x = pictures.astype(np.float32)
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    shifts = [padded[:, i : i + TILE, j : j + TILE] for i in range(5) for j in range(5)]
    cells = (x - sum(shifts) / len(shifts)).reshape(len(x), TILE // CELL, CELL, TILE // CELL, CELL, 3).swapaxes(2, 3)
    count = (TILE // CELL) ** 2
    return standard(cells.reshape(len(x) * count, -1)).reshape(len(x), -1) / count**0.5


def shrunk(tiles: np.ndarray) -> np.ndarray:
    """(n, 32, 32, 3) -> means, (n, 4, 4, 3)."""
    cell = TILE // COARSE
    return tiles.reshape(len(tiles), COARSE, cell, COARSE, cell, 3).mean((2, 4))


def boxes(size: tuple[int, int]) -> list[Box]:
    """Crops of a picture of `size`, of any shape; of a tile the larger ones of its own shape."""
    width, height = size
    found = set()
    shapes = [(s, s) for s in SIZES_OF_TILES] if max(size) <= TILE else itertools.product(SIZES, SIZES)
    for w, h in shapes:
        for x, y in itertools.product(PLACES, PLACES):
            left, top = x * (1 - w) * width, y * (1 - h) * height
            found.add((left, top, left + w * width, top + h * height))
    return sorted(found)


def nearby(box: Box, size: tuple[int, int], share: float) -> Iterator[Box]:
    """The box, and with each side moved in or out by `share` of its length."""
    width, height = box[2] - box[0], box[3] - box[1]
    for moves in itertools.product((0.0, -share, share), repeat=4):
        left, right = box[0] + moves[0] * width, box[2] + moves[1] * width
        top, bottom = box[1] + moves[2] * height, box[3] + moves[3] * height
        yield max(left, 0.0), max(top, 0.0), min(right, size[0]), min(bottom, size[1])


def crop(picture: Image.Image, box: Box, side: int) -> np.ndarray:
    """uint8 (side, side, 3), averaged."""
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX, box=box))


def best_match(picture: Image.Image, tiles: np.ndarray, coarse: np.ndarray) -> tuple[float, int]:
    """Highest fine correlation of any crop with any of `tiles`, and which one.

    `coarse`: the tiles `shrunk` and `standard`.
    """
    score, number = -1.0, -1
    for flipped in (False, True):
        seen = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else picture
        places = boxes(seen.size)
        alike = standard(np.stack([crop(seen, box, COARSE) for box in places])) @ coarse.T
        most = alike.max(0)
        for i in np.argpartition(most, -CANDIDATES)[-CANDIDATES:]:
            if most[i] < COARSELY_ALIKE:
                continue
            box, wanted = places[int(alike[:, i].argmax())], fine(tiles[i : i + 1])[0]
            for share in (0.0,) if max(seen.size) <= TILE else SEARCH:
                around = list(dict.fromkeys(nearby(box, seen.size, share)))
                found = fine(np.stack([crop(seen, b, TILE) for b in around])) @ wanted
                box = around[int(found.argmax())]
            score, number = max((score, number), (float(found.max()), int(i)))
    return score, number


def main() -> int:
    """Search, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--tiles", type=Path, required=True)
    parser.add_argument("--data", default=",".join(SETS))
    parser.add_argument("--per-class", type=int, default=1700, help="of cifar10, as many as any study uses")
    given = parser.parse_args()
    small = all_tiles(given.tiles)
    names = [f"{small.names[label]}/{i % (len(small.labels) // small.classes)}" for i, label in enumerate(small.labels)]
    paths = all_photos(given.photos)
    whole = [crop(Image.open(path).convert("RGB"), (0, 0, *Image.open(path).size), TILE) for path in paths]
    pool, names = np.concatenate([small.pictures, np.stack(whole)]), names + [path.name for path in paths]
    coarse = standard(shrunk(pool))
    pairs = []
    for data in given.data.split(","):
        kept = Preprocessing(TILE if data == "cifar10" else 3 * TILE, crop_fraction=1.0)
        photos = load_photos(data, kept, given.per_class if data == "cifar10" else None)
        best = 0.0
        for name, pixels in zip(photos.names, photos.shrunk, strict=True):
            picture = Image.fromarray(pixels)
            score, number = best_match(picture, pool, coarse)
            best = max(best, score)
            if score >= ALIKE:
                pairs.append({"photo": f"{data}/{name}", "picture": names[number], "correlation": round(score, 3)})
                print(*pairs[-1].values(), flush=True)
        print(f"{data}: {len(photos)} photos, highest {best:.3f}", flush=True)
    OVERLAP.write_text(json.dumps(pairs, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
