"""Each layer against torch's autograd or a slow twin: values, gradients, what is overwritten, what is remembered."""

from __future__ import annotations

import math

import pytest
import torch
from reference import generator, one_thread, plain_qr, random  # noqa: F401
from torch import Tensor
from torch.nn import functional as F

from wasi_edge.chunks import GELU_ROWS, NORM_ROWS
from wasi_edge.layers.activation import SavedGelu, gelu, gelu_backward, keep_gelu
from wasi_edge.layers.attention import _FUSED, attention_backward, attention_forward
from wasi_edge.layers.linear import DenseLinear, WasiLinear
from wasi_edge.layers.norm import LayerNorm, SavedNorm
from wasi_edge.layers.saving import Pass

BATCH, TOKENS, IN, OUT, RANK = 3, 5, 14, 18, 6


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-300))


def gradients(function, inputs: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    """Autograd's gradients of `function(*inputs)`."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    return torch.autograd.grad(function(*leaves), leaves, dy)


# ---------------------------------------------------------------------------------------------------- attention


def textbook(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head, photo by photo."""
    width = qkv.shape[-1] // 3
    size = width // heads
    photos = []
    for photo in qkv:
        parts = []
        for head in range(heads):
            q, k, v = (photo[:, i * width + head * size : i * width + (head + 1) * size] for i in range(3))
            parts.append(torch.softmax(q @ k.T / math.sqrt(size), 1) @ v)
        photos.append(torch.cat(parts, 1))
    return torch.stack(photos)


def run_attention(qkv: Tensor, dout: Tensor, heads: int, dtype: torch.dtype, fused: bool) -> tuple[Tensor, Tensor]:
    run = Pass()
    out, saved = attention_forward(qkv, heads, run, "attention", dtype, fused)
    assert saved is not None and (saved.lse is not None) == fused
    if dtype is qkv.dtype:
        assert saved.qkv.data_ptr() == qkv.data_ptr()  # no copy of what is kept as it is
    else:
        qkv.fill_(torch.nan)  # whoever read it again would notice
    out = out.clone()
    return out, attention_backward(saved, dout, heads, run)


fused_only = pytest.mark.skipif(not _FUSED, reason="this torch has no fused attention for CPUs")
FUSED = [pytest.param(True, marks=fused_only), False]


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(7, 3, 4), (1, 2, 8), (65, 1, 5), (40, 2, 64)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-5)])
def test_attention_equals_the_textbook_forward_and_backward(fused, tokens, heads, head_dim, dtype, tolerance):
    width = heads * head_dim
    qkv, dout = random(2, tokens, 3 * width, seed=0), random(2, tokens, width, seed=1)
    expected = textbook(qkv, heads)
    (expected_gradient,) = gradients(lambda value: textbook(value, heads), [qkv], dout)
    out, gradient = run_attention(qkv.to(dtype), dout.to(dtype), heads, dtype, fused)
    tolerance = tolerance if fused or dtype == torch.float32 else 1e-12
    assert relative_error(out, expected) < tolerance
    if tokens == 1:  # softmax over one: nothing flows to q and k
        assert float(gradient[..., : 2 * width].abs().max()) < tolerance
    assert relative_error(gradient, expected_gradient) < tolerance


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("queries", [1, 3])
def test_attention_of_the_first_tokens_alone(fused, dtype, queries):
    qkv, dout = random(2, 9, 24, seed=2), random(2, queries, 8, seed=3)
    expected = textbook(qkv, 2)[:, :queries]
    (expected_gradient,) = gradients(lambda value: textbook(value, 2)[:, :queries], [qkv], dout)
    run = Pass()
    run.workspace.take("block.qkv", (2, 9, 24)).fill_(torch.nan)  # nothing there may shine through
    out, saved = attention_forward(qkv.to(dtype), 2, run, "attention", dtype, fused, queries)
    assert saved is not None and saved.out.shape == (2, queries, 8)
    assert relative_error(out, expected) < 1e-5
    assert relative_error(attention_backward(saved, dout.to(dtype), 2, run), expected_gradient) < 1e-5


@pytest.mark.parametrize("fused", FUSED)
def test_attention_of_large_scores_does_not_overflow(fused):
    qkv, dout = 60 * random(1, 9, 24, seed=2), random(1, 9, 8, seed=3)
    (expected,) = gradients(lambda value: textbook(value, 2), [qkv], dout)
    out, gradient = run_attention(qkv.float(), dout.float(), 2, torch.float32, fused)
    assert bool(out.isfinite().all() and gradient.isfinite().all())
    assert relative_error(gradient, expected) < 1e-2  # scores of 3600 in float32


@pytest.mark.parametrize("fused", FUSED)
def test_attention_kept_in_16_bits_stays_within_their_rounding(fused):
    qkv, dout = random(2, 30, 48, seed=4), random(2, 30, 16, seed=5)
    (expected,) = gradients(lambda value: textbook(value, 4), [qkv], dout)
    _, gradient = run_attention(qkv.float(), dout.float(), 4, torch.float16, fused)
    assert 1e-6 < relative_error(gradient, expected) < 2e-3


@fused_only
def test_attention_output_is_not_transposed_in_memory():
    out, _ = attention_forward(random(2, 9, 24, seed=6), 2, Pass(), None, torch.float64)
    assert out.is_contiguous()
    q, k, v = random(2, 9, 24, seed=6).view(2, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)
    raw, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    assert raw.transpose(1, 2).is_contiguous()  # so that the reshape above is a view


# ---------------------------------------------------------------------------------------------------- layer norm


def norm_inputs(dtype: torch.dtype = torch.float64) -> tuple[LayerNorm, Tensor, Tensor]:
    weight, bias = 1 + 0.2 * random(IN, seed=7), random(IN, seed=8)
    x = 5 + 3 * random(BATCH * TOKENS, IN, seed=9)
    x[3] *= 1e-3  # a token of tiny variance
    dy = random(BATCH * TOKENS, IN, seed=10)
    return LayerNorm(weight.to(dtype), bias.to(dtype), 1e-6), x.to(dtype), dy.to(dtype)


def norm_autograd(layer: LayerNorm, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    weight, bias = layer.params["weight"], layer.params["bias"]
    return gradients(lambda a, w, b: F.layer_norm(a, (IN,), w, b, layer.eps), [x, weight, bias], dy)


def test_layer_norm_equals_autograd():
    layer, x, dy = norm_inputs()
    run = Pass()
    y, saved = layer.forward(x, run, "norm")
    assert saved is not None
    assert relative_error(y, F.layer_norm(x, (IN,), layer.params["weight"], layer.params["bias"], layer.eps)) < 1e-14
    assert relative_error(layer.forward(x, run, None)[0], y) < 1e-14
    dx, grads = layer.backward(saved, dy, run)
    expected = norm_autograd(layer, x, dy)
    for actual, wanted in zip((dx, grads["weight"], grads["bias"]), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-12


def test_layer_norm_saved_in_16_bits_stays_within_their_rounding():
    layer, x, dy = norm_inputs(torch.float32)
    run = Pass()
    _, saved = layer.forward(x, run, "norm", torch.float16)
    assert saved is not None and saved.x_hat.dtype == torch.float16 and saved.rstd.dtype == torch.float32
    dx, grads = layer.backward(saved, dy, run)
    expected = norm_autograd(layer, x, dy)
    for actual, wanted in zip((dx, grads["weight"]), expected[:2], strict=True):
        assert 1e-6 < relative_error(actual, wanted) < 2e-3
    # the token of tiny variance has an rstd of a few hundred: the error of its own row is no larger
    assert relative_error(dx[3], expected[0][3]) < 5e-3
    assert relative_error(grads["bias"], expected[2]) < 1e-6


def test_layer_norm_saves_no_infinity_in_16_bits_for_an_outlier_that_float16_cannot_hold():
    layer, x, dy = norm_inputs(torch.float32)
    x[2, 4] = 1e6
    _, saved = layer.forward(x, Pass(), "norm", torch.float16)
    assert saved is not None and float(saved.x_hat.abs().max()) <= math.sqrt(IN)
    assert bool(layer.backward(saved, dy, Pass())[0].isfinite().all())


def test_layer_norm_changes_neither_its_input_nor_dy():
    layer, x, dy = norm_inputs()
    x_before, dy_before = x.clone(), dy.clone()
    run = Pass()
    _, saved = layer.forward(x, run, "norm")
    assert saved is not None
    kept = saved.x_hat.clone()
    layer.backward(saved, dy, run)
    assert torch.equal(x, x_before) and torch.equal(dy, dy_before) and torch.equal(saved.x_hat, kept)


# ---------------------------------------------------------------------------------------------------- gelu


def gelu_derivative(a: Tensor) -> Tensor:
    """Phi(a) + a phi(a)."""
    a = a.double()
    return 0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * torch.exp(-a.square() / 2) / math.sqrt(2 * math.pi)


def gelu_forward(a: Tensor, run: Pass, save_as: str | None, compact: bool) -> tuple[Tensor, SavedGelu | None]:
    """As a block does it."""
    saved = keep_gelu(a, run, save_as, compact)
    return gelu(a, saved, run), saved


def test_gelu_backward_equals_autograd():
    a, dy = 3 * random(300, 7, seed=11), random(300, 7, seed=12)
    (expected,) = gradients(F.gelu, [a], dy)
    run = Pass()
    y, saved = gelu_forward(a.clone(), run, "gelu", compact=False)
    assert saved is not None
    assert relative_error(y, F.gelu(a)) < 1e-14
    assert relative_error(gelu_backward(saved, dy, run), expected) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gelu_derivative_in_8_bits_is_within_its_rounding_everywhere(dtype):
    a = torch.cat([torch.linspace(-9, 9, 17_996), torch.tensor([0.0, -0.0, 1e4, -1e4, 1e30, -1e30, 1e-30, -1.4142])])
    a = a.to(dtype).view(-1, 7)  # 2572 rows: ten whole chunks and a part of one
    run = Pass()
    _, saved = gelu_forward(a.clone(), run, "gelu", compact=True)
    assert saved is not None
    actual = gelu_backward(saved, torch.ones_like(a), run)
    assert float((actual.double() - gelu_derivative(a)).abs().max()) < 0.0026


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 600])
def test_gelu_keeps_one_byte_per_element_and_its_scratch_does_not_grow_with_the_tokens(rows):
    a = random(rows, 12, seed=13).float()
    run = Pass()
    y, saved = gelu_forward(a, run, "gelu", compact=True)
    assert saved is not None and saved.inputs is None and saved.derivative is not None
    assert saved.derivative.nbytes == rows * 12
    assert run.workspace.held_bytes() == rows * 12 + 2 * min(rows, GELU_ROWS) * 12 * 4
    assert y.data_ptr() == a.data_ptr()


def test_gelu_works_in_place_unless_its_input_is_kept_and_what_it_kept_survives():
    a, dy = random(20, 6, seed=14), random(20, 6, seed=15)
    for save_as, compact in ((None, False), ("full", False), ("compact", True)):
        buffer, run = a.clone(), Pass()
        y, saved = gelu_forward(buffer, run, save_as, compact)
        assert (y.data_ptr() == buffer.data_ptr()) == (save_as != "full")
        assert relative_error(y, F.gelu(a)) < 1e-14
        if saved is not None:
            y.fill_(torch.nan)  # the next layer is free to overwrite it
            target = dy.clone()
            gradient = gelu_backward(saved, target, run)
            assert gradient.data_ptr() == target.data_ptr()
            assert relative_error(gradient, dy * gelu_derivative(a)) < (0.01 if compact else 1e-13)


# ---------------------------------------------------------------------------------------------------- linears


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
    assert relative_error(y, twin(named, x)) < 1e-13
    assert relative_error(dx, expected[0]) < 1e-12
    assert set(grads) == set(keys)
    for key, wanted in zip(keys, expected[1:], strict=True):
        assert relative_error(grads[key], wanted) < 1e-12, key


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


def test_norm_attention_and_gelu_pass_gradcheck():
    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            ctx.layer, ctx.run = LayerNorm(weight.detach(), bias.detach(), 1e-6), Pass()
            y, ctx.saved = ctx.layer.forward(x.detach(), ctx.run, "norm")
            return y.clone()

        @staticmethod
        def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
            dx, grads = ctx.layer.backward(ctx.saved, dy.contiguous(), ctx.run)
            return dx.clone(), grads["weight"], grads["bias"]

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv: Tensor) -> Tensor:
            ctx.run = Pass()
            out, ctx.saved = attention_forward(qkv.detach(), 2, ctx.run, "attention", torch.float64, fused=False)
            return out.clone()

        @staticmethod
        def backward(ctx, dout: Tensor) -> Tensor:
            return attention_backward(ctx.saved, dout.contiguous(), 2, ctx.run).clone()

    class Gelu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a: Tensor) -> Tensor:
            ctx.run = Pass()
            y, ctx.saved = gelu_forward(a.detach().clone(), ctx.run, "gelu", compact=False)
            return y

        @staticmethod
        def backward(ctx, dy: Tensor) -> Tensor:
            return gelu_backward(ctx.saved, dy.clone(), ctx.run)

    x, weight, bias = random(4, 6, seed=30), random(6, seed=31), random(6, seed=32)
    qkv = random(2, 3, 12, seed=33)
    for function, inputs in ((Norm, (x, weight, bias)), (Attention, (qkv,)), (Gelu, (3 * x,))):
        leaves = tuple(value.detach().clone().requires_grad_() for value in inputs)
        assert torch.autograd.gradcheck(function.apply, leaves), function.__name__


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
            assert relative_error(layer.basis @ layer.basis.T, slow.projector()) < 1e-9, (step, part)
            assert relative_error(grads["projected"] @ layer.basis.T, expected) < 1e-9, (step, part)
            slow.learn(dy)
            assert layer.token_weight is not None
            assert relative_error(layer.token_weight, slow.weight) < 1e-13
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
    assert relative_error(total, exact @ first_basis) < 1e-13
    run.refresh_basis = True
    layer.forward(uneven(99, IN).flatten(0, 1), TOKENS, run, "linear")
    assert relative_error(layer.basis, first_basis) > 1e-3  # the next step does refresh


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
    assert relative_error(layer.basis.T @ layer.basis, torch.eye(8)) < 1e-12
    rows = uneven(102, IN, photos=2)[:, 0]
    assert relative_error(rows @ layer.basis @ layer.basis.T, rows) < 1e-9  # and holds what matters


def test_norm_backward_reads_only_what_was_saved():
    layer, x, dy = norm_inputs()
    run = Pass()
    _, saved = layer.forward(x, run, "norm")
    assert isinstance(saved, SavedNorm)
    expected = norm_autograd(layer, x, dy)[0]
    x.fill_(torch.nan)
    assert relative_error(layer.backward(saved, dy, run)[0], expected) < 1e-12


# ------------------------------------------------------------------------------------ what is rebuilt of a norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float16, 1e-3)])
@pytest.mark.parametrize("tokens", [3, NORM_ROWS + 5])
def test_a_norm_gives_its_output_and_its_input_again_from_what_it_kept(dtype, tolerance, tokens):
    x, weight, bias = 300 + 50 * random(tokens, 8, seed=40), random(8, seed=41), random(8, seed=42)
    norm, run = LayerNorm(weight, bias, 1e-6), Pass()
    y, saved = norm.forward(x, run, "norm", dtype, with_mean=True)
    assert saved is not None and saved.x_hat.dtype is dtype
    expected = y.clone()
    assert relative_error(norm.again(saved, run), expected) < tolerance
    spread = (x - x.mean(1, keepdim=True)).norm()
    assert float((norm.inputs(saved, torch.empty_like(x)) - x).norm() / spread) < tolerance
    _, saved = norm.forward(x, run, "norm", dtype)
    with pytest.raises(AssertionError, match="mean"):
        norm.inputs(saved, torch.empty_like(x))
