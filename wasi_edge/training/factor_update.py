"""How a weight learns from a small gradient: orthogonalised momentum in its subspace, then one exact WSI step.

The gradient of W arrives as P U^T, P (O, r), U (I, r) orthonormal. The rule:

    M V^T <- truncate_r( beta M V^T + (1 - beta) P U^T )   momentum, in a subspace of its own (`subspace/momentum.py`)
    D  = M (M^T M)^(-1/2)                                  its polar factor: every direction counts the same
    W <- truncate_K( W - eta D V^T ),                      eta = learning_rate * ||W||_F

The last line is the WSI step of `subspace/weight.py` where W = L R is in factors; a dense W (all of `asi`'s, and what a
model stores dense) is not truncated.
The paper uses plain SGD in its place, W <- truncate_K( W - eta P U^T ) with an absolute eta: it ends ahead in runs of
many steps and holds no momentum, but raw gradient norms differ a hundredfold between layers and photos, and at first it
undoes what the network knew (`docs/results.md`). Both are here (`method.Optimizer`). The polar factor is steepest
descent under the spectral norm (as in Muon, Jordan et al. 2024, where an iteration over the dense (O, I) momentum
approximates it; here r is small enough to do it exactly on (r, r)). It needs no second moments: the state is M,
V and the Gram matrices, a fifth of what AdamW on the factors holds.
`eta` is relative to the layer's own size, so that one learning rate fits all layers.

All three lines cost much, and a mean over many steps changes little from one to the next. So linears take turns: each
`turns`-th step moves the weight, `turns` times as far, and chooses V anew; at the steps between, momentum gathers
what V sees of their gradients. SGD, which remembers nothing, moves every weight at every step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from wasi_edge.chunks import ROUNDING_ROWS, has_turn
from wasi_edge.layers.linear import AsiLinear, SubspaceLinear, WasiLinear
from wasi_edge.method import Optimizer
from wasi_edge.planner.memory import update_scratch_bytes
from wasi_edge.subspace.factors import MAX_CONDITION, WeightFactors, make_orthonormal, weight_factors
from wasi_edge.subspace.momentum import add_gradient, add_known_part
from wasi_edge.subspace.weight import update_weight

MOMENTUM = 0.95
# singular values of M below this share of the largest are noise and are not blown up to one
POLAR_FLOOR = 1e-3
# steps; linears take turns, so that no step is much longer than another
ORTHONORMALISE_EVERY = 200
# of float32's mantissa, that float16 has no room for
_DROPPED_BITS = 13


class FactorUpdate:
    """The state of all linears that learn so: momentum, its basis, and what `subspace.weight` carries with factors.

    `turns`: how many groups the linears are divided into, one of which moves at each step.
    `carry_grams` False measures the Gram matrices at every step instead: less memory, more time. Factors in float16 are
    widened for their update and rounded stochastically, keyed by (seed, step, linear), so that steps far smaller than
    float16's spacing still add up; their Gram matrices are always those of the rounded factors.
    """

    def __init__(
        self,
        linears: Mapping[str, SubspaceLinear],
        weight_decay: float,
        carry_grams: bool = True,
        seed: int = 0,
        turns: int = 1,
        optimizer: Optimizer = Optimizer.POLAR,
    ) -> None:
        self._linears = dict(linears)
        self._number = {name: index for index, name in enumerate(self._linears)}
        self._carry_grams, self._seed = carry_grams, seed
        self._weight_decay, self._turns, self._optimizer = weight_decay, turns, optimizer
        self.seconds = 0.0  # that updates have taken so far
        self._carried: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}
        self._basis: dict[str, Tensor] = {}
        self.orthonormalise()

    def has_turn(self, name: str, step: int) -> bool:
        """Whether the weight of `name` moves at this step, which counts from 1; by SGD all do."""
        return self._optimizer is Optimizer.SGD or has_turn(self._number[name], len(self._number), step, self._turns)

    def update(self, name: str, projected: Tensor, learning_rate: float, step: int) -> None:
        """One step of linear `name` with P (O, r), which stays as it is. `step` counts from 1; the weight itself moves
        where it `has_turn`."""
        began = time.perf_counter()
        self._update(name, projected, learning_rate, step)
        self.seconds += time.perf_counter() - began

    def _update(self, name: str, projected: Tensor, learning_rate: float, step: int) -> None:
        basis = self._linears[name].basis
        assert basis is not None
        if self._optimizer is Optimizer.SGD:
            self._follow_gradient(name, projected, basis, learning_rate, step)
        else:
            self._follow_momentum(name, projected, basis, learning_rate, step)

    def _follow_gradient(self, name: str, projected: Tensor, basis: Tensor, learning_rate: float, step: int) -> None:
        self._move(name, projected, basis, learning_rate, step, relative=False)

    def _follow_momentum(
        self, name: str, projected: Tensor, gradient_basis: Tensor, learning_rate: float, step: int
    ) -> None:
        has_turn = self.has_turn(name, step)
        momentum, basis = self._add_to_momentum(name, projected, gradient_basis, has_turn)
        if has_turn:
            self._move(name, polar_factor(momentum), basis, learning_rate * self._turns, step)

    def _move(
        self, name: str, direction: Tensor, basis: Tensor, learning_rate: float, step: int, relative: bool = True
    ) -> None:
        """The weight along `direction` `basis`^T, by a rate that is `relative` to the weight's norm or is not."""
        linear = self._linears[name]
        if isinstance(linear, AsiLinear):
            weight = linear.params["weight"]
            rate = learning_rate * (float(torch.linalg.vector_norm(weight)) if relative else 1.0)
            weight.addmm_(direction, basis.t(), beta=1 - rate * self._weight_decay, alpha=-rate)
            return
        assert isinstance(linear, WasiLinear)
        factors = self._wide_factors(name, linear)
        rate = learning_rate * (factors.norm if relative else 1.0)
        condition = update_weight(factors, direction, basis, rate, self._weight_decay)
        first = self._number[name] * ORTHONORMALISE_EVERY // len(self._number)
        if (step - first) % ORTHONORMALISE_EVERY < self._turns or not condition <= MAX_CONDITION:
            self._orthonormalise(name, linear, factors)
        self._put_back(linear, factors, name, step)

    def _add_to_momentum(
        self, name: str, projected: Tensor, gradient_basis: Tensor, moves_basis: bool
    ) -> tuple[Tensor, Tensor]:
        """M (O, r) with P in it, and its basis V (I, r), which is chosen anew where it may move."""
        if name not in self._momentum:
            self._momentum[name], self._basis[name] = projected * (1 - MOMENTUM), gradient_basis.clone()
        else:
            add = add_gradient if moves_basis else add_known_part
            add(self._momentum[name], self._basis[name], projected, gradient_basis, MOMENTUM)
        return self._momentum[name], self._basis[name]

    @property
    def scratch_bytes(self) -> int:
        """About what an update takes beside its state, gaps between blocks of many sizes included."""
        shapes = [
            (*linear.shape, linear.params["left"].shape[1] if isinstance(linear, WasiLinear) else 0)
            for linear in self._linears.values()
        ]
        bases = [linear.basis for linear in self._linears.values() if linear.basis is not None]
        return update_scratch_bytes(shapes, max((basis.shape[1] for basis in bases), default=0))

    def state(self) -> dict[str, Tensor]:
        """Momentum, basis and what is carried with factors as `<kind>.<linear>`."""
        named: dict[str, Tensor] = {}
        for name in self._linears:
            if name in self._carried:
                named[f"carried.{name}"] = self._carried[name]
            if name in self._momentum:
                named[f"momentum.{name}"] = self._momentum[name]
                named[f"basis.{name}"] = self._basis[name]
        return named

    def load(self, key: str, value: Tensor) -> None:
        """Take back one entry of `state`; the factors themselves are the layers' parameters."""
        kind, _, name = key.partition(".")
        {"carried": self._carried, "momentum": self._momentum, "basis": self._basis}[kind][name] = value

    def clear(self) -> None:
        """Forget everything; the factors themselves stay where they are."""
        self._carried.clear()
        self._momentum.clear()
        self._basis.clear()

    def _wide_factors(self, name: str, linear: WasiLinear) -> WeightFactors:
        """The layer's own tensors, or widened copies of them, with what is carried, held or measured."""
        left, right = (_widened(linear.params[key]) for key in ("left", "right"))
        carried = self._carried.get(name)
        return weight_factors(left, right) if carried is None else WeightFactors(left, right, carried)

    def _orthonormalise(self, name: str, linear: WasiLinear, factors: WeightFactors) -> None:
        """Rotate the pair of `name` to orthonormal L and diagonal R R^T, in place."""
        self._hold(name, linear, make_orthonormal(factors.left, factors.right, factors.carried))

    def orthonormalise(self) -> None:
        """All pairs at once; otherwise they take turns (`ORTHONORMALISE_EVERY`)."""
        for name, linear in self._linears.items():
            if isinstance(linear, WasiLinear):
                left, right = (_widened(linear.params[key]) for key in ("left", "right"))
                factors = make_orthonormal(left, right, self._carried.get(name))
                self._hold(name, linear, factors)
                self._put_back(linear, factors, name, step=0)

    def _hold(self, name: str, linear: WasiLinear, factors: WeightFactors) -> None:
        if self._carry_grams and not _is_rounded(linear):
            self._carried[name] = factors.carried

    def _put_back(self, linear: WasiLinear, factors: WeightFactors, name: str, step: int) -> None:
        """Round widened factors into the layer's tensors."""
        if not _is_rounded(linear):
            return
        key = (self._seed * 1_000_003 + step) * len(self._number) + self._number[name]
        generator = torch.Generator().manual_seed(key & (2**63 - 1))
        stochastic_round(factors.left, linear.params["left"], generator)
        stochastic_round(factors.right, linear.params["right"], generator)


def _is_rounded(linear: WasiLinear) -> bool:
    return linear.params["left"].dtype is torch.float16


def _widened(factor: Tensor) -> Tensor:
    return factor.float() if factor.dtype is torch.float16 else factor


def stochastic_round(values: Tensor, out: Tensor, generator: torch.Generator) -> Tensor:
    """float32 values into `out`, float16, up or down with the probability that makes the mean exact.

    Random bits are added below the last bit that float16 keeps, and the sum is cut there. `values` is overwritten.
    Rows far apart share their random bits: each is as random, and drawing them would take longer than the update.
    Below 6e-5, where float16 has fewer bits, the ordinary rounding of the conversion adds at most 3e-8.
    """
    bits = values.view(torch.int32)
    dropped = 2**_DROPPED_BITS
    noise = torch.randint(0, dropped, (ROUNDING_ROWS, values.shape[1]), generator=generator, dtype=torch.int32)
    for rows in bits.split(ROUNDING_ROWS):
        rows.add_(noise[: len(rows)]).bitwise_and_(-dropped)
    return out.copy_(values)


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
