"""The linears of `wasi` and dense ones against autograd and against a slow twin; those of `wsi` and `asi` are in
test_subspace_linears.py."""

from __future__ import annotations

import pytest
import torch
from reference import generator, gradients, one_thread, plain_qr, random, relative_difference  # noqa: F401
from torch import Tensor

from wasi_edge.layers.linear import DenseLinear, WasiLinear
from wasi_edge.layers.saving import Pass

BATCH, TOKENS, IN, OUT, RANK = 3, 5, 14, 18, 6


def linear_parameters(dense: bool, scale: bool, bias: bool) -> list[tuple[str, Tensor]]:
    weights = (
        [("weight", random(OUT, IN, seed=20))]
        if dense
        else [("left", random(OUT, RANK, seed=21)), ("right", random(RANK, IN, seed=22))]
    )
    extra = [("bias", random(OUT, seed=23))] * bias + [("scale", random(OUT, seed=24))] * scale
    return weights + extra


def twin(named: dict[str, Tensor], x: Tensor) -> Tensor:
    """s * (x W^T + b), W multiplied out."""
    weight = named["weight"] if "weight" in named else named["left"] @ named["right"]
    y = x @ weight.T + named.get("bias", torch.zeros((), dtype=x.dtype))
    return y * named["scale"] if "scale" in named else y


def make_linear(
    dense: bool, scale: bool, bias: bool, rank: int = IN, dtype: torch.dtype = torch.float64
) -> DenseLinear | WasiLinear:
    named = {key: value.to(dtype) for key, value in linear_parameters(dense, scale, bias)}
    if dense:
        return DenseLinear(named["weight"], named.get("bias"), named.get("scale"))
    layer = WasiLinear(named["left"], named["right"], named.get("bias"), named.get("scale"))
    layer.start_training(rank, TOKENS, generator(25))
    return layer


LINEARS = pytest.mark.parametrize(
    ("dense", "scale", "bias"), [(d, s, b) for d in (True, False) for s in (True, False) for b in (True, False)]
)


@LINEARS
@pytest.mark.parametrize("with_out", [True, False])
def test_linear_with_a_complete_basis_equals_autograd(dense, scale, bias, with_out):
    layer = make_linear(dense, scale, bias)
    x, dy = random(BATCH * TOKENS, IN, seed=26), random(BATCH * TOKENS, OUT, seed=27)
    x_before, dy_before = x.clone(), dy.clone()
    params_before = {key: value.clone() for key, value in layer.params.items()}
    run = Pass(refresh_basis=True)
    out = torch.full((len(x), OUT), torch.nan, dtype=x.dtype) if with_out else None
    y, saved = layer.forward(x, TOKENS, run, "linear", out=out)
    dx_out = torch.full((len(x), IN), torch.nan, dtype=x.dtype) if with_out else None
    assert saved is not None
    if out is not None:
        assert y.data_ptr() == out.data_ptr()
    y = y.clone()
    dx, grads = layer.backward(saved, dy, TOKENS, run, out=dx_out)
    assert dx_out is None or dx.data_ptr() == dx_out.data_ptr()
    assert torch.equal(x, x_before) and torch.equal(dy, dy_before)
    assert all(torch.equal(value, params_before[key]) for key, value in layer.params.items())

    named = dict(linear_parameters(dense, scale, bias))
    if not dense:
        named = {"weight": named["left"] @ named["right"], **{k: named[k] for k in ("bias", "scale") if k in named}}
    keys = list(named)
    expected = gradients(lambda a, *values: twin(dict(zip(keys, values, strict=True)), a), [x, *named.values()], dy)
    if isinstance(layer, WasiLinear):
        assert layer.basis is not None
        grads["weight"] = grads.pop("projected") @ layer.basis.T
    assert relative_difference(y, twin(named, x)) < 1e-13
    assert relative_difference(dx, expected[0]) < 1e-12
    assert set(grads) == set(keys)
    for key, wanted in zip(keys, expected[1:], strict=True):
        assert relative_difference(grads[key], wanted) < 1e-12, key


@LINEARS
def test_linear_forward_and_backward_pass_gradcheck(dense, scale, bias):
    names = [key for key, _ in linear_parameters(dense, scale, bias)]
    values = [value for _, value in linear_parameters(dense, scale, bias)]

    class Wrapped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, *parameters: Tensor) -> Tensor:
            named = dict(zip(names, (p.detach() for p in parameters), strict=True))
            ctx.layer = make_linear(dense, scale, bias)
            for name in names:
                ctx.layer.params[name].copy_(named[name])
            ctx.run = Pass(refresh_basis=True)
            y, ctx.saved = ctx.layer.forward(x.detach(), TOKENS, ctx.run, "linear")
            return y.clone()

        @staticmethod
        def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
            dx, grads = ctx.layer.backward(ctx.saved, dy, TOKENS, ctx.run)
            if not dense:
                # dL = dW R^T and dR = L^T dW follow from dW = P U^T
                left, right = ctx.layer.params["left"], ctx.layer.params["right"]
                gradient = grads["projected"] @ ctx.layer.basis.T
                grads |= {"left": gradient @ right.T, "right": left.T @ gradient}
            return dx.clone(), *(grads[name] for name in names)

    x = random(2 * TOKENS, IN, seed=28)
    inputs = tuple(value.requires_grad_() for value in (x, *values))
    assert torch.autograd.gradcheck(Wrapped.apply, inputs, eps=1e-6, atol=1e-5, rtol=1e-5, fast_mode=True)


def test_wasi_linear_refuses_factors_that_do_not_belong_together():
    with pytest.raises(ValueError, match=r"left is \(18, 6\) but right is \(5, 14\)"):
        WasiLinear(torch.zeros(18, 6), torch.zeros(5, 14), None)


# ---------------------------------------------------------------------------------------- basis and token weights


class DenseTwin:
    """Basis and token weights of a WASI linear as DESIGN section 2 prints them: dense products, Householder QR."""

    def __init__(self, basis: Tensor, tokens: int) -> None:
        self.basis, self.weight, self.cold = basis, torch.ones(tokens, dtype=torch.float64), True

    def refresh(self, x: Tensor) -> None:
        """x (B, N, I)."""
        moment = sum((photo.T * self.weight) @ photo for photo in x)  # x^T diag(w) x
        for _ in range(4 if self.cold else 1):
            self.basis = plain_qr(moment @ self.basis)
        self.cold = False

    def projector(self) -> Tensor:
        return self.basis @ self.basis.T

    def learn(self, dy: Tensor) -> None:
        """dy (B, N, O)."""
        energy = dy.square().sum(2).mean(0)
        self.weight = 0.9 * self.weight + 0.1 * energy / energy.mean()


def uneven(seed: int, features: int, photos: int = BATCH) -> Tensor:
    """(B, N, F) with tokens of very different size and a decaying spectrum."""
    tokens = torch.logspace(-1, 1, TOKENS, dtype=torch.float64)[:, None]
    return random(photos, TOKENS, features, seed=seed) * tokens * torch.logspace(0, -1, features, dtype=torch.float64)


def test_basis_gradient_and_token_weights_equal_the_dense_twin_over_three_steps():
    rank = 4
    layer = make_linear(False, True, True, rank=rank)
    assert isinstance(layer, WasiLinear) and layer.basis is not None
    slow = DenseTwin(layer.basis.clone(), TOKENS)
    run = Pass()
    for step in range(3):
        for part, photos in enumerate((3, 2)):  # two micro-batches a step, the second smaller
            x = uneven(40 + 2 * step + part, IN, photos)
            dy = uneven(60 + 2 * step + part, OUT, photos).flip(1)
            run.refresh_basis = part == 0
            if part == 0:
                slow.refresh(x)
            _, saved = layer.forward(x.flatten(0, 1), TOKENS, run, "linear")
            assert saved is not None
            _, grads = layer.backward(saved, dy.flatten(0, 1), TOKENS, run)
            scaled = dy.flatten(0, 1) * layer.params["scale"]
            expected = scaled.T @ x.flatten(0, 1) @ slow.projector()
            assert relative_difference(layer.basis @ layer.basis.T, slow.projector()) < 1e-9, (step, part)
            assert relative_difference(grads["projected"] @ layer.basis.T, expected) < 1e-9, (step, part)
            slow.learn(dy)
            assert layer.token_weight is not None
            assert relative_difference(layer.token_weight, slow.weight) < 1e-13
    # the weights matter: without them the basis would be another one
    assert float(slow.weight.max() / slow.weight.min()) > 3


def test_p_is_dy_x_u_for_the_u_of_the_steps_first_micro_batch_although_others_follow():
    layer = make_linear(False, False, True, rank=3)
    assert isinstance(layer, WasiLinear)
    run, total, exact = Pass(), torch.zeros(OUT, 3, dtype=torch.float64), torch.zeros(OUT, IN, dtype=torch.float64)
    first_basis = None
    for part in range(3):
        run.refresh_basis = part == 0
        x, dy = uneven(80 + part, IN).flatten(0, 1), uneven(90 + part, OUT).flatten(0, 1)
        _, saved = layer.forward(x, TOKENS, run, "linear")
        assert saved is not None and layer.basis is not None
        first_basis = layer.basis.clone() if part == 0 else first_basis
        _, grads = layer.backward(saved, dy, TOKENS, run)
        total += grads["projected"]
        exact += dy.T @ x
    assert first_basis is not None and layer.basis is not None
    assert torch.equal(layer.basis, first_basis)
    assert relative_difference(total, exact @ first_basis) < 1e-13
    run.refresh_basis = True
    layer.forward(uneven(99, IN).flatten(0, 1), TOKENS, run, "linear")
    assert relative_difference(layer.basis, first_basis) > 1e-3  # the next step does refresh


def test_a_refresh_makes_a_new_basis_and_leaves_the_old_one_to_the_momentum():
    layer = make_linear(False, False, True, rank=3)
    assert isinstance(layer, WasiLinear) and layer.basis is not None
    old, before = layer.basis, layer.basis.clone()
    layer.forward(uneven(100, IN).flatten(0, 1), TOKENS, Pass(refresh_basis=True), "linear")
    assert layer.basis is not old and torch.equal(old, before)


def test_inference_and_a_dead_gradient_leave_the_training_state_alone():
    layer = make_linear(False, True, True, rank=3)
    assert isinstance(layer, WasiLinear)
    basis, weight, cold = layer.training_state()
    weight = weight.clone()
    x, run = uneven(101, IN).flatten(0, 1), Pass(refresh_basis=True)
    layer.forward(x, TOKENS, run, None)
    assert layer.basis is basis and cold and layer.training_state()[2]
    _, saved = layer.forward(x, TOKENS, run, "linear")
    assert saved is not None
    layer.backward(saved, torch.zeros(len(x), OUT, dtype=torch.float64), TOKENS, run)
    assert layer.token_weight is not None and torch.equal(layer.token_weight, weight)


def test_a_basis_for_fewer_weighted_tokens_than_its_rank_stays_orthonormal():
    """Only the class row carries gradient in the last block of a class-token network."""
    layer = make_linear(False, False, True, rank=8)
    assert isinstance(layer, WasiLinear) and layer.token_weight is not None
    layer.token_weight.zero_()
    layer.token_weight[0] = 1.0
    layer.forward(uneven(102, IN, photos=2).flatten(0, 1), TOKENS, Pass(refresh_basis=True), "linear")
    assert layer.basis is not None
    assert relative_difference(layer.basis.T @ layer.basis, torch.eye(8)) < 1e-12
    rows = uneven(102, IN, photos=2)[:, 0]
    assert relative_difference(rows @ layer.basis @ layer.basis.T, rows) < 1e-9  # and holds what matters
