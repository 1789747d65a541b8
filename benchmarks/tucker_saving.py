"""Would compressing the tokens too pay? The full Tucker form of what a linear keeps, against what it saves.

    python benchmarks/tucker_saving.py --photos ../shared/data/clothing

A linear keeps z = x U (B, N, r). The full Tucker form keeps a core (B, r2, r) and a factor (N, r2) instead. This
prints, for shares r2 / N, the relative error that it adds to the weight gradient, mean over all linears of the model on
a batch of 16 photos (factors from the batch itself: the best case), and the bytes that it saves of those a compact
block keeps. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from wasi_edge.bench.gradient import WARM_UP, closed_form_head, load_sample, start, weight_gradients
from wasi_edge.bench.subject import find_subject
from wasi_edge.keep import COMPACT, kept_bytes_per_token
from wasi_edge.layers.linear import Linear, SubspaceLinear
from wasi_edge.layers.saving import Pass
from wasi_edge.models.network import build_network
from wasi_edge.subspace import tucker

SHARES = (0.75, 0.5, 0.25)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--rank", type=int, default=32)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    subject = find_subject(options.model)
    sample = load_sample(options.photos, subject.preprocessing, 340)
    network = build_network(subject.geometry, subject.ranks(0.8), subject.reader(0.8), subject.image_size, head=False)
    head = closed_form_head(network, sample)
    start(network, options.rank)
    *warm_up, last = sample.batches(1)[: WARM_UP + 1]
    for part in warm_up:
        weight_gradients(network, head, sample.pixels[part], sample.labels[part])
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    watch(network.linears(), kept)
    weight_gradients(network, head, sample.pixels[last], sample.labels[last])
    errors = {
        share: statistics.fmean(error(z, dy, share, network.tokens) for z, dy in kept.values()) for share in SHARES
    }
    geometry = subject.geometry
    sizes = geometry.width, geometry.mlp_width, geometry.heads, options.rank
    whole, z = kept_bytes_per_token(COMPACT, *sizes), 16 * options.rank
    result = [
        {"share": share, "error": errors[share], "saved_share_of_kept": (1 - share) * z / whole} for share in SHARES
    ]
    for row in result:
        print(f"r2 = {row['share']:.2f} N: error {row['error']:.3f}, saves {100 * row['saved_share_of_kept']:.1f} %")
    print(json.dumps(result))
    return 0


def watch(linears: dict[str, Linear], kept: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Note (z, dy) of every linear's backward pass."""
    for name, linear in linears.items():
        assert isinstance(linear, SubspaceLinear)
        plain = linear.backward

        def backward(saved: torch.Tensor, dy: torch.Tensor, tokens: int, run: Pass, out=None, plain=plain, key=name):
            kept[key] = saved.clone(), dy.clone()
            return plain(saved, dy, tokens, run, out=out)

        linear.backward = backward  # type: ignore[method-assign]


def error(z: torch.Tensor, dy: torch.Tensor, share: float, tokens: int) -> float:
    """||P - P'|| / ||P||, P' from z with its tokens compressed to `share` of them."""
    cube = z.view(-1, tokens, z.shape[1])
    unfolded = cube.movedim(1, 0).reshape(tokens, -1)
    _, vectors = torch.linalg.eigh((unfolded @ unfolded.t()).double())
    factor = vectors[:, -max(1, round(share * tokens)) :].float()
    compressed = tucker.compress(cube, (None, factor, None))
    exact = dy.t() @ z
    found = tucker.weight_gradient(dy.view(-1, tokens, dy.shape[1]), compressed)
    return float((found - exact).norm() / exact.norm())


if __name__ == "__main__":
    sys.exit(main())
