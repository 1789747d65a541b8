"""Make a ViT of a well-known size with random weights in factors of fixed ranks, to measure memory and time with.

    python benchmarks/make_random_model.py vit-b16 build/vit-b16 [--image-size 224] [--dtype float32]

K / min(O, I) is 0.40 for qkv, 0.30 for the projection and 0.47 for fc1 and fc2, which is what epsilon 0.8 gives on
pretrained networks of this kind. The weights are scaled like those of a trained network, so that activations and
gradients stay in range; what such a model learns means nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from wasi_edge.artefact import ModelConfig, write_artefact
from wasi_edge.bench.synthetic import synthetic_ranks
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.preprocessing import Preprocessing

# patch, width, depth, heads
SIZES = {
    "vit-ti16": (16, 192, 12, 3),
    "vit-s16": (16, 384, 12, 6),
    "vit-b32": (32, 768, 12, 12),
    "vit-b16": (16, 768, 12, 12),
    "vit-l16": (16, 1024, 24, 16),
}


def main() -> int:
    """Write the model and print its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=sorted(SIZES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    options = parser.parse_args()
    make(options.size, options.out, options.image_size, options.dtype)
    bytes_on_disk = (options.out / "model.safetensors").stat().st_size
    print(f"{options.out}: {bytes_on_disk / 2**20:.1f} MB")
    return 0


def make(size: str, out: Path, image_size: int = 224, dtype: str = "float32") -> ModelConfig:
    """Write model `size` to the folder `out`. Deterministic."""
    patch, width, depth, heads = SIZES[size]
    geometry = ViTGeometry(patch, width, depth, heads, 4 * width, image_size // patch, features="class+mean")
    config = ModelConfig(
        name=f"{size} (random)",
        geometry=geometry,
        linears=synthetic_ranks(geometry),
        preprocessing=Preprocessing(image_size=image_size),
        dtype=dtype,
        provenance={"origin": "random weights, benchmarks/make_random_model.py"},
    )
    generator = np.random.default_rng(0)
    with write_artefact(out, config) as writer:
        for name, shape in config.tensor_shapes().items():
            writer.add(name, _tensor(name, shape, generator).astype(dtype))
    return config


def _tensor(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    if name.endswith("bias"):
        return np.zeros(shape, np.float32)
    if len(shape) == 1 and "norm" in name:
        return np.ones(shape, np.float32)
    if name.endswith((".left", ".right")):
        # (O, K) and (K, I): the product's entries have variance 1 / (2 I), and so outputs that of a trained linear
        scale = shape[1] ** -0.5 if name.endswith(".left") else (2 * shape[1]) ** -0.5
        return generator.standard_normal(shape, np.float32) * np.float32(scale)
    return generator.standard_normal(shape, np.float32) * np.float32(0.02)


if __name__ == "__main__":
    sys.exit(main())
