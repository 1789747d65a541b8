"""What the builders of all architectures share: layers from named tensors, and patches from photos."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from wasi_edge.layers.linear import Linear, LinearKinds
from wasi_edge.layers.norm import LayerNorm
from wasi_edge.layers.saving import Pass

OnGradients = Callable[[str, dict[str, Tensor]], None]


@dataclass(frozen=True)
class Parts:
    """Layers of the block `name`: `read` gives tensors by their artefact names, `ranks` the rank of a linear or None
    for a dense one, `kinds` what it is built of."""

    name: str
    ranks: Mapping[str, int | None]
    read: Callable[[str], Tensor]
    kinds: LinearKinds
    norm_eps: float

    def linear(self, key: str, scale: str | None = None, has_bias: bool = True) -> Linear:
        """The linear `key`, with the output scale of that name."""
        name, read = f"{self.name}.{key}", self.read
        bias = read(f"{name}.bias") if has_bias else None
        factor = None if scale is None else read(f"{self.name}.{scale}")
        if self.ranks[name] is None:
            return self.kinds.dense(read(f"{name}.weight"), bias, factor)
        return self.kinds.factored(read(f"{name}.left"), read(f"{name}.right"), bias, factor)

    def norm(self, key: str) -> LayerNorm:
        """The norm `key`."""
        name = f"{self.name}.{key}"
        return LayerNorm(self.read(f"{name}.weight"), self.read(f"{name}.bias"), self.norm_eps)


def patches_of(pixels: Tensor, patch_size: int, run: Pass) -> Tensor:
    """(B, C, S, S) -> (B * g * g, C * p * p), row by row of patches, in a buffer."""
    batch, channels, side, _ = pixels.shape
    p, grid = patch_size, side // patch_size
    patches = run.workspace.take("patches", (batch, grid, grid, channels, p, p), pixels.dtype)
    patches.copy_(pixels.view(batch, channels, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5))
    return patches.view(batch * grid * grid, channels * p * p)
