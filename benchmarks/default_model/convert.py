"""Make the model that ships inside the package: ViT-S/14 in factors, calibrated, float16.

    python -m benchmarks.default_model.convert --source ../shared/models/vit-s14 --photos ../shared/data/photos-1k \
        --tiles ../shared/data/tiny-imagenet-32 --out build/converted-vit-s14

As many parameters as plain epsilon ranks have (0.8 of each linear's squared singular values), spread over the layers,
and every layer fitted to bring the tokens back to the dense network's: of whole photos, of crops if asked for, and of
enlarged 32 px tiles, so that small and blurred pictures are known too. Deterministic. `heal` goes on from the result.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.default_model.pictures import photo_paths, read_tiles
from wasi_edge.conversion.calibration import spread
from wasi_edge.conversion.convert import Calibration, Settings, convert
from wasi_edge.conversion.sources import open_source
from wasi_edge.data.augment import augment
from wasi_edge.preprocess import center_view, open_photo, shrink


def _some_tiles(folder: Path, count: int) -> list[Image.Image]:
    tiles = read_tiles(folder)
    return [Image.fromarray(tiles.pictures[i]) for i in tiles.spread(count)]


def main() -> int:
    """Convert, and print the size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True, help="calibration photos, a flat folder")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--crops", type=int, default=0, help="random crops of each photo beside the whole")
    parser.add_argument("--tiles", type=Path, help="mosaics of Tiny ImageNet")
    parser.add_argument("--tile-count", type=int, default=500)
    parser.add_argument("--image-size", type=int, default=168)
    parser.add_argument("--epsilon", type=float, default=0.8)
    parser.add_argument("--origin", default="", help="of the source, with its licence: it is written down")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    photos = photo_paths(options.photos)
    photos = [photos[index] for index in spread(len(photos), options.count)]
    torch.set_grad_enabled(False)
    began = time.monotonic()
    with open_source(options.source) as source:
        preprocessing = source.preprocessing.with_image_size(options.image_size)

        tiles = [] if options.tiles is None else _some_tiles(options.tiles, options.tile_count)
        whole, size = len(photos) * (1 + options.crops), options.image_size

        def read(index: int) -> np.ndarray:
            if index >= whole:
                return center_view(shrink(tiles[index - whole], preprocessing), preprocessing)
            crop, photo = divmod(index, len(photos))
            pixels = shrink(open_photo(photos[photo], preprocessing.resize_side), preprocessing)
            return center_view(pixels, preprocessing) if crop == 0 else augment(pixels, size, 0, crop, photo)

        settings = Settings(options.epsilon, "float16", options.image_size, always_factor=True)
        folders = ", ".join(folder.name for folder in (options.photos, options.tiles) if folder)
        provenance = {"origin": options.origin} if options.origin else {}
        provenance["calibrated_on"] = folders
        convert(
            source,
            options.out,
            settings,
            Calibration(whole + len(tiles), read),
            provenance,
            lambda done, all_: print(f"block {done} of {all_}, {time.monotonic() - began:.0f} s", flush=True),
        )
    size = (options.out / "model.safetensors").stat().st_size
    print(f"{options.out}: {size / 2**20:.1f} MB from {len(photos)} photos")
    return 0


if __name__ == "__main__":
    sys.exit(main())
