"""How a low-rank weight learns: orthogonalised momentum in the gradient's subspace, then one exact WSI step.

The gradient of W = L R arrives as P U^T, P (O, r), U (I, r) orthonormal. The rule:

    M <- beta M U_old^T U + (1 - beta) P            momentum, carried to the step's new basis (a projection)
    D  = M (M^T M)^(-1/2)                           its polar factor: every direction of the subspace counts the same
    W <- truncate_K( W - eta D U^T ),               eta = learning_rate * ||W||_F

The last line is the WSI step of `subspace/weight.py`. The paper uses plain SGD in its place, which does not learn on a
real pretrained network: raw gradient norms differ a hundredfold between layers and photos, and one clip threshold lets
a few layers decide. The polar factor is steepest descent under the spectral norm (as in Muon, Jordan et al. 2024, where
an iteration over the dense (O, I) momentum approximates it; here r is small enough to do it exactly on (r, r)). It
needs no second moments: the state is M, the old U and the Gram matrices, a fifth of what AdamW on the factors holds.
`eta` is relative to the layer's own size, so that one learning rate fits all layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wasi_edge.layers.linear import WasiLinear
from wasi_edge.subspace.weight import (
    MAX_CONDITION,
    WeightFactors,
    momentum_to_new_basis,
    orthonormal_pair,
    pack_grams,
    unpack_grams,
    update_weight,
    weight_factors,
)

MOMENTUM = 0.9
# singular values of M below this share of the largest are noise and are not blown up to one
POLAR_FLOOR = 1e-3
ORTHONORMALISE_EVERY = 50


class FactorUpdate:
    """The state of all low-rank linears: momentum, its basis, and the Gram matrices of the factors.

    `carry_grams` False rebuilds the Gram matrices at every step instead of holding them: less memory, more time.
    """

    def __init__(self, linears: Mapping[str, WasiLinear], weight_decay: float, carry_grams: bool = True) -> None:
        self._linears = dict(linears)
        self._carry_grams = carry_grams
        self._weight_decay = weight_decay
        self._packed_grams: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}
        self._basis: dict[str, Tensor] = {}
        for name in self._linears:
            self._orthonormalise(name)

    def update(self, name: str, projected: Tensor, learning_rate: float, step: int) -> None:
        """One step of linear `name` with P (O, r), which stays as it is. `step` counts from 1."""
        basis = self._linears[name].basis
        assert basis is not None
        if name in self._momentum:
            carried = momentum_to_new_basis(self._momentum[name], self._basis[name], basis)
            torch.lerp(carried, projected, 1 - MOMENTUM, out=self._momentum[name])
        else:
            self._momentum[name] = projected * (1 - MOMENTUM)
        momentum, self._basis[name] = self._momentum[name], basis
        params = self._linears[name].params
        packed = self._packed_grams.get(name)
        if packed is None:
            factors = weight_factors(params["left"], params["right"])
        else:
            factors = WeightFactors(params["left"], params["right"], *unpack_grams(packed))
        size = float(factors.left_gram.mul(factors.right_gram).sum().clamp_min(0).sqrt())  # ||L R||_F
        condition = update_weight(factors, polar_factor(momentum), basis, learning_rate * size, self._weight_decay)
        if step % ORTHONORMALISE_EVERY == 0 or not condition <= MAX_CONDITION:
            self._orthonormalise(name)
        elif packed is not None:
            pack_grams(factors.left_gram, factors.right_gram, out=packed)

    def state(self) -> dict[str, Tensor]:
        """Momentum, basis and packed Gram matrices as `<kind>.<linear>`."""
        named: dict[str, Tensor] = {}
        for name in self._linears:
            if name in self._packed_grams:
                named[f"grams.{name}"] = self._packed_grams[name]
            if name in self._momentum:
                named[f"momentum.{name}"] = self._momentum[name]
                named[f"basis.{name}"] = self._basis[name]
        return named

    def load(self, key: str, value: Tensor) -> None:
        """Take back one entry of `state`; the factors themselves are the layers' parameters."""
        kind, _, name = key.partition(".")
        {"grams": self._packed_grams, "momentum": self._momentum, "basis": self._basis}[kind][name] = value

    def clear(self) -> None:
        """Forget everything; the factors themselves stay where they are."""
        self._packed_grams.clear()
        self._momentum.clear()
        self._basis.clear()

    def _orthonormalise(self, name: str) -> None:
        """Rotate the pair of `name` to orthonormal L and diagonal R R^T, in the layer's own tensors."""
        params = self._linears[name].params
        pair = orthonormal_pair(params["left"], params["right"])
        params["left"].copy_(pair.left)
        params["right"].copy_(pair.right)
        if self._carry_grams:
            packed = self._packed_grams.get(name)
            self._packed_grams[name] = pack_grams(pair.left_gram, pair.right_gram, out=packed)


def polar_factor(matrix: Tensor) -> Tensor:
    """M (M^T M)^(-1/2) for M (O, r), through the eigenvalues of the (r, r) Gram matrix in float64.

    Directions far below the largest stay below one. Zero gives zero.
    """
    gram = matrix.double()
    gram = gram.t() @ gram
    values, vectors = torch.linalg.eigh(gram)
    sizes = values.clamp_min(0).sqrt()
    largest = sizes[-1]
    if not largest > 0:
        return torch.zeros_like(matrix)
    inverse = 1 / (sizes + POLAR_FLOOR * largest)
    return matrix @ ((vectors * inverse) @ vectors.t()).to(matrix.dtype)
