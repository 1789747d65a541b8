"""Linear layers: dense, and those whose weight gradient comes as a small matrix.

    WasiLinear       factors L (O, K), R (K, I):  y = (x R^T) L^T + b;  keeps z = x U (T, r)
    WsiLinear        the same factors;                                  keeps all of x
    AsiLinear        a dense W (O, I):            y = x W^T + b;        keeps z = x U (T, r)
    DenseWsiLinear   a dense W (O, I);                                  keeps all of x

A method decides what is kept of the inputs, the stored model whether a weight is in factors: where factors would cost
more than the weight it is dense, and then `wasi` trains an `AsiLinear` among its others and `wsi` a `DenseWsiLinear`.

Their weight gradient is P = dy^T x U (O, r), meaning dW ~ P U^T, with U (I, r) an orthonormal basis warm-started from
step to step (arXiv 2510.09160; the factored form is ours): no gradient of shape (O, I) ever exists.

There are two backward passes. `backward` reads what the forward pass kept: where that is z, U had to be chosen before
dy was known, and follows the input, weighted by where gradients arrived in the past. `backward_from_input` is for
callers that have x at hand in the backward pass anyway (the output of a norm is its own x_hat again, that of the
attention is kept for the attention's sake): nothing is kept for the linear, and U follows the gradient itself,
U <- orth(dW^T dW U) with dW = dy^T x, which is the best that rank r can do. So does WSI, which keeps x.

An optional output scale s (LayerScale) belongs to the linear before it: y = s * (x W^T + b). Its gradient is
ds_o = <W_o, dW'_o> + b_o db'_o with dW' the gradient before scaling, so nothing is kept for it.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from wasi_edge.chunks import padded_rank, sampled_tokens
from wasi_edge.layers.saving import Pass
from wasi_edge.method import Method
from wasi_edge.subspace import tucker
from wasi_edge.subspace.orthonormal import orthonormalise

# How fast the token weights forget: about the last ten micro-batches count.
_TOKEN_WEIGHT_MOMENTUM = 0.9
# Iterations that a random start needs; afterwards the last step's basis is a warm start.
_COLD_ITERATIONS = 4


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
        return self.params["weight"].shape[0], self.params["weight"].shape[1]

    def forward(
        self,
        x: Tensor,
        tokens: int,
        run: Pass,
        save_as: str | None,
        out: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(T, I) -> (T, O), plus `residual` (T, O), into `out` if given. `tokens` per image is not used here."""
        y = _dense_product(x, self.params, out, residual)
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

    def backward_from_input(
        self, x: Tensor, dy: Tensor, run: Pass, out: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`backward` with the input (T, I) itself."""
        return self.backward(x, dy, 1, run, out)


class SubspaceLinear:
    """A linear whose weight gradient is P U^T. `basis` U (I, r) and `token_weight` (N,) are training state, None until
    `start_training`. Subclasses say what the weight is."""

    params: dict[str, Tensor]

    def __init__(self, weights: dict[str, Tensor], bias: Tensor | None, scale: Tensor | None) -> None:
        self.params = dict(weights)
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
        raise NotImplementedError

    def start_training(self, gradient_rank: int, tokens: int, generator: torch.Generator) -> None:
        """A random basis of rank min(gradient_rank, I), improved by the first refresh; equal token weights."""
        features = self.shape[1]
        held = next(iter(self.params.values())).dtype
        dtype = torch.float32 if held is torch.float16 else held
        self.basis = tucker.initial_basis(features, min(gradient_rank, features), generator, dtype)
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
        self,
        x: Tensor,
        tokens: int,
        run: Pass,
        save_as: str | None,
        out: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(T, I) -> (T, O), plus `residual` (T, O), into `out` if given; T = B * `tokens`. With `save_as`, keeps what
        `save` says."""
        y = self._product(self._weights(x.dtype, run), x, run, out, residual)
        return y, None if save_as is None else self.save(x, tokens, run, save_as)

    def save(self, x: Tensor, tokens: int, run: Pass, save_as: str) -> Tensor:
        """What the backward pass needs of x: z = x U (T, r), U refreshed first where this pass says so. `tokens` per
        photo: all that there are, or the first ones that somebody reads."""
        assert self.basis is not None and self.token_weight is not None, "start_training was not called"
        if run.refresh_basis:
            began = time.perf_counter()
            stride = len(x) // sampled_tokens(len(x))
            weight = self.token_weight[:tokens].repeat(len(x) // tokens)[::stride]
            iterations = _COLD_ITERATIONS if self._cold else 1
            self.basis = tucker.refresh_basis(x[::stride], self.basis, weight, iterations)
            self._cold = False
            run.refresh_seconds += time.perf_counter() - began
        z = run.workspace.take(save_as, (x.shape[0], self.basis.shape[1]), x.dtype)
        return torch.mm(x, self.basis, out=z)  # (T, I) @ (I, r) -> (T, r)

    def backward(
        self, saved: Tensor, dy: Tensor, tokens: int, run: Pass, out: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(T, O) -> gradient of x (T, I), into `out` if given; `projected` P (O, r) and the dense parameters'."""
        assert self.token_weight is not None, "start_training was not called"
        # lagged mean of |dy_t|^2 at each token position, relative to the mean over positions
        energy = torch.linalg.vector_norm(dy, dim=1).square_().view(-1, tokens).mean(0)
        mean = energy.mean()
        if mean > 0:
            self.token_weight[:tokens].lerp_(energy.div_(mean), 1 - _TOKEN_WEIGHT_MOMENTUM)
        return self._backward(saved, dy, run, out)

    def backward_from_input(
        self, x: Tensor, dy: Tensor, run: Pass, out: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same with the input (T, I) itself: U is chosen by the gradient first, where this pass says so."""
        assert self.basis is not None, "start_training was not called"
        if run.refresh_basis:
            began = time.perf_counter()
            some_x, some_dy = _strongest(x, dy, run)
            iterations = _COLD_ITERATIONS if self._cold else 1
            for _ in range(iterations):
                left = some_dy.t() @ (some_x @ self.basis)  # dW U, (O, r)
                if not 0 < float(left.norm()) < math.inf:
                    break  # no gradient, nothing to follow; or none that training will go on with
                self.basis = orthonormalise(some_x.t() @ (some_dy @ left))  # orth(dW^T dW U)
                self._cold = False
            run.refresh_seconds += time.perf_counter() - began
        z = run.workspace.take("linear.projection", (len(x), self.basis.shape[1]), x.dtype)
        return self._backward(torch.mm(x, self.basis, out=z), dy, run, out)

    def _backward(self, z: Tensor, dy: Tensor, run: Pass, out: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self._weights(dy.dtype, run)
        projected = dy.t() @ z  # (O, T) @ (T, r) -> (O, r)
        grads = {"projected": projected}
        if "bias" in self.params:
            grads["bias"] = dy.sum(0)
        if "scale" in self.params:
            scale = self.params["scale"]
            assert self.basis is not None
            # rows of <W, P U^T> without forming the second: (P * (W U)).sum(1)
            grads["scale"] = (projected * self._times_weight(weights, self.basis)).sum(1)
            if "bias" in self.params:
                grads["scale"] += self.params["bias"] * grads["bias"]
                grads["bias"] *= scale
            projected *= scale[:, None]
        return self._product_backward(weights, dy, run, out), grads

    def _weights(self, dtype: torch.dtype, run: Pass) -> tuple[Tensor, ...]:
        """The weight, or its factors, in `dtype`: what the three products below are made with."""
        raise NotImplementedError

    def _product(
        self, weights: tuple[Tensor, ...], x: Tensor, run: Pass, out: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """scale (x W^T + b) + residual (T, O)."""
        raise NotImplementedError

    def _product_backward(self, weights: tuple[Tensor, ...], dy: Tensor, run: Pass, out: Tensor | None) -> Tensor:
        """dy diag(scale) W (T, I)."""
        raise NotImplementedError

    def _times_weight(self, weights: tuple[Tensor, ...], basis: Tensor) -> Tensor:
        """W U (O, r)."""
        raise NotImplementedError


class _KeepsInput(SubspaceLinear):
    """One whose input is kept whole (T, I): U is chosen by the gradient itself."""

    def save(self, x: Tensor, tokens: int, run: Pass, save_as: str) -> Tensor:
        """What the backward pass needs of x: all of it."""
        return run.workspace.keep(save_as, x, x.dtype)

    def backward(
        self, saved: Tensor, dy: Tensor, tokens: int, run: Pass, out: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`backward_from_input`: what was kept is the input."""
        return self.backward_from_input(saved, dy, run, out)


class WasiLinear(SubspaceLinear):
    """y = (x R^T) L^T + b. `params`: left (O, K), right (K, I), bias (O,), perhaps scale (O,).

    Factors in float16 are widened into two shared buffers each time they are used: products are always in x's type.
    Products run over a rank padded to a multiple of 8, which no parameter shows. The first padded column of L is the
    bias, and that of the hidden layer is one, so that adding the bias takes no pass of its own over y; R is padded with
    zeros, so that nothing flows back through it.
    """

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> None:
        if left.shape[1] != right.shape[0]:
            raise ValueError(f"left is {tuple(left.shape)} but right is {tuple(right.shape)}: ranks must agree")
        self._left, self._right = _padded(left, right)
        rank = left.shape[1]
        super().__init__({"left": self._left[:, :rank], "right": self._right[:rank]}, bias, scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.params["left"].shape[0], self.params["right"].shape[1]

    def _product(
        self, weights: tuple[Tensor, ...], x: Tensor, run: Pass, out: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        (left, right), rank = weights, self.params["right"].shape[0]
        hidden = run.workspace.take("linear.hidden", (x.shape[0], right.shape[0]), x.dtype)
        torch.mm(x, right.t(), out=hidden)  # (T, I) @ (I, K) -> (T, K)
        if "bias" in self.params:
            left[:, rank] = self.params["bias"]
            hidden[:, rank] = 1.0
        left = self._scaled(left, run)
        # (T, K) @ (K, O) -> (T, O)
        if residual is None:
            return torch.mm(hidden, left.t(), out=out)
        return torch.addmm(residual, hidden, left.t(), out=out)

    def _product_backward(self, weights: tuple[Tensor, ...], dy: Tensor, run: Pass, out: Tensor | None) -> Tensor:
        left, right = weights
        left = self._scaled(left, run)
        dhidden = run.workspace.take("linear.hidden", (dy.shape[0], right.shape[0]), dy.dtype)
        torch.mm(dy, left, out=dhidden)  # (T, O) @ (O, K) -> (T, K)
        return torch.mm(dhidden, right, out=out)  # (T, K) @ (K, I) -> (T, I)

    def _times_weight(self, weights: tuple[Tensor, ...], basis: Tensor) -> Tensor:
        left, right = weights
        return left @ (right @ basis)

    def _scaled(self, left: Tensor, run: Pass) -> Tensor:
        """diag(scale) L."""
        if "scale" not in self.params:
            return left
        scaled = run.workspace.take("linear.scaled", tuple(left.shape), left.dtype)
        return torch.mul(left, self.params["scale"][:, None], out=scaled)

    def _weights(self, dtype: torch.dtype, run: Pass) -> tuple[Tensor, ...]:
        left, right = self._left, self._right
        if left.dtype is dtype:
            return left, right
        keep = run.workspace.keep
        return keep("linear.left", left, dtype), keep("linear.right", right, dtype)


class WsiLinear(_KeepsInput, WasiLinear):
    """The factors of `WasiLinear`, whose input is kept whole."""


class AsiLinear(SubspaceLinear):
    """y = x W^T + b. `params`: weight (O, I), bias (O,), perhaps scale (O,)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> None:
        super().__init__({"weight": weight}, bias, scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.params["weight"].shape[0], self.params["weight"].shape[1]

    def _weights(self, dtype: torch.dtype, run: Pass) -> tuple[Tensor, ...]:
        return (self.params["weight"],)

    def _product(
        self, weights: tuple[Tensor, ...], x: Tensor, run: Pass, out: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        return _dense_product(x, self.params, out, residual)

    def _product_backward(self, weights: tuple[Tensor, ...], dy: Tensor, run: Pass, out: Tensor | None) -> Tensor:
        if "scale" in self.params:
            scaled = run.workspace.take("linear.hidden", tuple(dy.shape), dy.dtype)
            dy = torch.mul(dy, self.params["scale"], out=scaled)
        return torch.mm(dy, weights[0], out=out)

    def _times_weight(self, weights: tuple[Tensor, ...], basis: Tensor) -> Tensor:
        return weights[0] @ basis


class DenseWsiLinear(_KeepsInput, AsiLinear):
    """The dense weight of `AsiLinear`, whose input is kept whole: no gradient of `wsi` is worse than another's."""


Linear = DenseLinear | SubspaceLinear


class LinearKinds(NamedTuple):
    """Which classes a network is built of: for weights that are dense, and for those in factors."""

    dense: type[DenseLinear] | type[AsiLinear] = DenseLinear
    factored: type[WasiLinear] = WasiLinear

    @classmethod
    def of(cls, method: Method) -> LinearKinds:
        """Those that `method` trains; of a network that is not trained so, the plain ones."""
        if method is Method.WSI:
            return cls(DenseWsiLinear, WsiLinear)
        return cls(AsiLinear, WasiLinear) if method.is_explicit else cls()


PLAIN_KINDS = LinearKinds()


def _strongest(x: Tensor, dy: Tensor, run: Pass) -> tuple[Tensor, Tensor]:
    """Of x (T, I) and dy (T, O) the tokens whose gradients are largest: a part of them stands for the whole."""
    rows = sampled_tokens(len(dy))
    if rows == len(dy):
        return x, dy
    strongest = torch.linalg.vector_norm(dy, dim=1).topk(rows, sorted=False).indices
    some_x = run.workspace.take("linear.sampled.x", (rows, x.shape[1]), x.dtype)
    some_dy = run.workspace.take("linear.sampled.dy", (rows, dy.shape[1]), dy.dtype)
    return torch.index_select(x, 0, strongest, out=some_x), torch.index_select(dy, 0, strongest, out=some_dy)


def _padded(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """left (O, K), right (K, I) with zeros up to the next padded rank."""
    (out_features, rank), in_features = left.shape, right.shape[1]
    held = padded_rank(rank)
    wide_left, wide_right = left.new_zeros(out_features, held), right.new_zeros(held, in_features)
    wide_left[:, :rank] = left
    wide_right[:rank] = right
    return wide_left, wide_right


def _dense_product(x: Tensor, params: dict[str, Tensor], out: Tensor | None, residual: Tensor | None) -> Tensor:
    """scale (x W^T + b) + residual for a dense weight."""
    weight = params["weight"].t()
    y = torch.addmm(params["bias"], x, weight, out=out) if "bias" in params else torch.mm(x, weight, out=out)
    if "scale" in params:
        y.mul_(params["scale"])
    return y if residual is None else y.add_(residual)
