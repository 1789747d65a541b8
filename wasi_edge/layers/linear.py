"""Linear layers: dense, and in factors with a compressed input (WASI).

`WasiLinear` is y = (x R^T) L^T + b with `left` L (O, K) and `right` R (K, I) as its only weights. Of its input it
keeps z = x U (T, r), U (I, r) the warm-started orthonormal basis of the subspace that carries the gradient, and its
weight gradient is the small matrix P = dy^T z (O, r), meaning dW ~ P U^T (arXiv 2510.09160; the factored form is
ours). No (O, I) tensor exists in either pass.

An optional output scale s (LayerScale) belongs to the linear before it: y = s * (x W^T + b). Its gradient is
ds_o = <W_o, dW'_o> + b_o db'_o with dW' the gradient before scaling, so nothing is kept for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wasi_edge.layers.saving import Pass
from wasi_edge.subspace import tucker

# How fast the token weights forget: about the last ten micro-batches count.
_TOKEN_WEIGHT_MOMENTUM = 0.9


class DenseLinear:
    """y = x W^T + b. `params`: weight (O, I), bias (O,), perhaps scale (O,). Keeps its whole input."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> None:
        self.params = {"weight": weight}
        if bias is not None:
            self.params["bias"] = bias
        if scale is not None:
            self.params["scale"] = scale

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        out_features, in_features = self.params["weight"].shape
        return out_features, in_features

    def forward(
        self, x: Tensor, tokens: int, run: Pass, save_as: str | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(T, I) -> (T, O), into `out` if given. `tokens` per image is not used here."""
        y = _affine(x, self.params["weight"], self.params.get("bias"), out)
        if "scale" in self.params:
            y.mul_(self.params["scale"])
        return y, None if save_as is None else self.save(x, tokens, run, save_as)

    def save(self, x: Tensor, tokens: int, run: Pass, save_as: str) -> Tensor:
        """What the backward pass needs of x: all of it."""
        return run.workspace.keep(save_as, x, x.dtype)

    def backward(
        self, saved: Tensor, dy: Tensor, tokens: int, run: Pass, out: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(T, O) -> gradient of x (T, I), into `out` if given, and of the parameters."""
        weight = self.params["weight"]
        grads = {"weight": dy.t() @ saved}
        if "bias" in self.params:
            grads["bias"] = dy.sum(0)
        if "scale" in self.params:
            scale = self.params["scale"]
            grads["scale"] = (weight * grads["weight"]).sum(1)
            if "bias" in self.params:
                grads["scale"] += self.params["bias"] * grads["bias"]
                grads["bias"] *= scale
            grads["weight"] *= scale[:, None]
            weight = scale[:, None] * weight
        return torch.mm(dy, weight, out=out), grads


class WasiLinear:
    """y = (x R^T) L^T + b. `params`: left (O, K), right (K, I), bias (O,), perhaps scale (O,).

    Factors in float16 are widened into two shared buffers each time they are used: products are always in x's type.
    `basis` (I, r) and `token_weight` (N,) are training state, None until `start_training`.
    """

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> None:
        if left.shape[1] != right.shape[0]:
            raise ValueError(f"left is {tuple(left.shape)} but right is {tuple(right.shape)}: ranks must agree")
        self.params = {"left": left, "right": right}
        if bias is not None:
            self.params["bias"] = bias
        if scale is not None:
            self.params["scale"] = scale
        self.basis: Tensor | None = None
        self.token_weight: Tensor | None = None
        self._cold = True

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.params["left"].shape[0], self.params["right"].shape[1]

    def start_training(self, gradient_rank: int, tokens: int, generator: torch.Generator) -> None:
        """A random basis of rank min(gradient_rank, I), improved by the first refresh; equal token weights."""
        right = self.params["right"]
        dtype = torch.float32 if right.dtype is torch.float16 else right.dtype
        rank = min(gradient_rank, right.shape[1])
        self.basis = tucker.initial_basis(right.shape[1], rank, generator, dtype)
        self.token_weight = torch.ones(tokens, dtype=dtype)
        self._cold = True

    def training_state(self) -> tuple[Tensor, Tensor, bool]:
        """Basis (I, r), token weights (N,), and whether the basis is still the random start."""
        assert self.basis is not None and self.token_weight is not None, "start_training was not called"
        return self.basis, self.token_weight, self._cold

    def restore(self, basis: Tensor, token_weight: Tensor, cold: bool) -> None:
        """Take back what `training_state` gave."""
        self.basis, self.token_weight, self._cold = basis, token_weight, cold

    def forward(
        self, x: Tensor, tokens: int, run: Pass, save_as: str | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(T, I) -> (T, O), into `out` if given; T = B * `tokens`. With `save_as`, keeps z (T, r)."""
        left, right = self._factors(x.dtype, run)
        hidden = run.workspace.take("linear.hidden", (x.shape[0], right.shape[0]), x.dtype)
        torch.mm(x, right.t(), out=hidden)  # (T, I) @ (I, K) -> (T, K)
        y = _affine(hidden, left, self.params.get("bias"), out)  # (T, K) @ (K, O) -> (T, O)
        if "scale" in self.params:
            y.mul_(self.params["scale"])
        return y, None if save_as is None else self.save(x, tokens, run, save_as)

    def save(self, x: Tensor, tokens: int, run: Pass, save_as: str) -> Tensor:
        """What the backward pass needs of x: z = x U (T, r), U refreshed first where this pass says so."""
        assert self.basis is not None, "start_training was not called"
        if run.refresh_basis:
            self._refresh_basis(x, tokens)
        z = run.workspace.take(save_as, (x.shape[0], self.basis.shape[1]), x.dtype)
        return torch.mm(x, self.basis, out=z)  # (T, I) @ (I, r) -> (T, r)

    def backward(
        self, saved: Tensor, dy: Tensor, tokens: int, run: Pass, out: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(T, O) -> gradient of x (T, I), into `out` if given; `projected` P (O, r) and the dense parameters'."""
        left, right = self._factors(dy.dtype, run)
        assert self.basis is not None
        self._learn_token_weight(dy, tokens)
        projected = dy.t() @ saved  # (O, T) @ (T, r) -> (O, r)
        grads = {"projected": projected}
        if "bias" in self.params:
            grads["bias"] = dy.sum(0)
        if "scale" in self.params:
            scale = self.params["scale"]
            # rows of <L R, P U^T> without forming either product: (P * (L (R U))).sum(1)
            grads["scale"] = (projected * (left @ (right @ self.basis))).sum(1)
            if "bias" in self.params:
                grads["scale"] += self.params["bias"] * grads["bias"]
                grads["bias"] *= scale
            projected *= scale[:, None]
            scaled = run.workspace.take("linear.scaled", tuple(left.shape), left.dtype)
            left = torch.mul(left, scale[:, None], out=scaled)
        dhidden = run.workspace.take("linear.hidden", (dy.shape[0], right.shape[0]), dy.dtype)
        torch.mm(dy, left, out=dhidden)  # (T, O) @ (O, K) -> (T, K)
        return torch.mm(dhidden, right, out=out), grads  # (T, K) @ (K, I) -> (T, I)

    def _factors(self, dtype: torch.dtype, run: Pass) -> tuple[Tensor, Tensor]:
        """L (O, K) and R (K, I) in `dtype`."""
        left, right = self.params["left"], self.params["right"]
        if left.dtype is dtype:
            return left, right
        keep = run.workspace.keep
        return keep("linear.left", left, dtype), keep("linear.right", right, dtype)

    def _refresh_basis(self, x: Tensor, tokens: int) -> None:
        assert self.basis is not None and self.token_weight is not None
        weight = self.token_weight.repeat(x.shape[0] // tokens)
        # a random start needs a few iterations; afterwards the last step's basis is a warm start
        self.basis = tucker.refresh_basis(x, self.basis, weight, iterations=4 if self._cold else 1)
        self._cold = False

    def _learn_token_weight(self, dy: Tensor, tokens: int) -> None:
        """Lagged mean of |dy_t|^2 at each token position, relative to the mean over positions."""
        assert self.token_weight is not None
        energy = torch.linalg.vector_norm(dy, dim=1).square_().view(-1, tokens).mean(0)
        mean = energy.mean()
        if mean > 0:
            self.token_weight.mul_(_TOKEN_WEIGHT_MOMENTUM).add_(energy.div_(mean), alpha=1 - _TOKEN_WEIGHT_MOMENTUM)


Linear = DenseLinear | WasiLinear


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """x W^T + b."""
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)
