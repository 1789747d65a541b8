"""What is particular to a plain Vision Transformer (Dosovitskiy et al. 2021; LayerScale: Touvron et al. 2021).

    photo -> patches -> tokens (class token, registers, position) -> blocks that attend to all tokens of a photo

`network.py` has the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wasi_edge.layers.attention import Attention
from wasi_edge.layers.block import Block
from wasi_edge.layers.linear import PLAIN_KINDS, DenseLinear, LinearKinds
from wasi_edge.layers.saving import Pass
from wasi_edge.models.geometry import ViTGeometry
from wasi_edge.models.parts import OnGradients, Parts, patches_of
from wasi_edge.models.resample import resample_position


class Stem:
    """Photo -> patches -> tokens: the class token, registers (R, D), patches. `position`, of all but the registers, is
    already resampled to the input size."""

    def __init__(
        self,
        patch_size: int,
        patch_embed: DenseLinear,
        class_token: Tensor | None,
        position: Tensor,
        registers: Tensor | None = None,
    ) -> None:
        self.patch_size = patch_size
        self.patch_embed, self.class_token, self.position = patch_embed, class_token, position
        self.registers = registers

    def parameters(self) -> dict[str, Tensor]:
        """By artefact name."""
        named: dict[str, Tensor] = {f"patch_embed.{key}": value for key, value in self.patch_embed.params.items()}
        if self.class_token is not None:
            named["class_token"] = self.class_token
        if self.registers is not None:
            named["registers"] = self.registers
        return named | {"position": self.position}

    def forward(self, pixels: Tensor, run: Pass, learns: bool) -> tuple[Tensor, Tensor | None]:
        """(B, C, S, S) -> tokens (B, N, D) and, if the stem learns, the patches (B * g * g, C * p * p) they are of."""
        batch, width = len(pixels), self.position.shape[1]
        patches = patches_of(pixels, self.patch_size, run)
        count = len(patches) // batch
        tokens = count + self._first_patch
        embedded = run.workspace.take("block.branch", (len(patches), width), pixels.dtype)
        embedded, _ = self.patch_embed.forward(patches, count, run, None, out=embedded)
        x = run.workspace.take("block.out", (batch, tokens, width), pixels.dtype)
        x[:, self._first_patch :].copy_(embedded.view(batch, count, width))
        x[:, self._first_patch :].add_(self.position[self._classes :])
        if self.class_token is not None:
            x[:, 0] = self.class_token + self.position[0]
        if self.registers is not None:
            x[:, self._classes : self._first_patch] = self.registers
        return x, patches if learns else None

    def backward(self, patches: Tensor, dx: Tensor, run: Pass, on_gradients: OnGradients) -> None:
        """Gradients from that of the tokens (B, N, D); photos need none."""
        summed = dx.sum(0)
        root = {"position": summed}
        if self.registers is not None:
            root["registers"] = summed[self._classes : self._first_patch]
            root["position"] = torch.cat((summed[: self._classes], summed[self._first_patch :]))
        if self.class_token is not None:
            root["class_token"] = summed[0].clone()
        on_gradients("", root)
        dpatches = run.workspace.keep("block.branch", dx[:, self._first_patch :], dx.dtype).view(-1, dx.shape[2])
        on_gradients("patch_embed", {"weight": dpatches.t() @ patches, "bias": dpatches.sum(0)})

    @property
    def _classes(self) -> int:
        return 0 if self.class_token is None else 1

    @property
    def _first_patch(self) -> int:
        return self._classes + (0 if self.registers is None else len(self.registers))


def build_stem(geometry: ViTGeometry, read: Callable[[str], Tensor], image_size: int) -> Stem:
    """What comes before the blocks; arguments as for `build_vit`."""
    return Stem(
        geometry.patch_size,
        DenseLinear(read("patch_embed.weight"), read("patch_embed.bias")),
        read("class_token") if geometry.class_token else None,
        torch.from_numpy(resample_position(read("position").numpy(), geometry, image_size)),
        read("registers") if geometry.registers else None,
    )


def build_block(
    geometry: ViTGeometry,
    index: int,
    ranks: Mapping[str, int | None],
    read: Callable[[str], Tensor],
    image_size: int,
    kinds: LinearKinds = PLAIN_KINDS,
) -> Block:
    """Block `index` alone; arguments as for `build_network`."""
    parts = Parts(f"blocks.{index}", ranks, read, kinds, geometry.norm_eps)
    scale1, scale2 = ("scale1", "scale2") if geometry.layer_scale else (None, None)
    return Block(
        parts.name,
        Attention(geometry.heads, geometry.queries if index == geometry.depth - 1 else None),
        parts.norm("norm1"),
        parts.linear("qkv"),
        parts.linear("proj", scale1),
        parts.norm("norm2"),
        parts.linear("fc1"),
        parts.linear("fc2", scale2),
    )
