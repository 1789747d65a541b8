"""Attention, norms and GELU against torch's autograd: values, gradients, what is overwritten; linears are in
test_linears.py."""

from __future__ import annotations

import math

import pytest
import torch
from reference import gradients, one_thread, random, relative_difference  # noqa: F401
from torch import Tensor
from torch.nn import functional as F

from wasi_edge.chunks import GELU_ROWS, NORM_ROWS
from wasi_edge.layers.activation import SavedGelu, gelu, gelu_backward, keep_gelu
from wasi_edge.layers.attention import _FUSED, attention_backward, attention_forward
from wasi_edge.layers.norm import LayerNorm, SavedNorm
from wasi_edge.layers.saving import Pass

BATCH, TOKENS, IN = 3, 5, 14


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
    assert relative_difference(out, expected) < tolerance
    if tokens == 1:  # softmax over one: nothing flows to q and k
        assert float(gradient[..., : 2 * width].abs().max()) < tolerance
    assert relative_difference(gradient, expected_gradient) < tolerance


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
    assert relative_difference(out, expected) < 1e-5
    assert relative_difference(attention_backward(saved, dout.to(dtype), 2, run), expected_gradient) < 1e-5


@pytest.mark.parametrize("fused", FUSED)
def test_attention_of_large_scores_does_not_overflow(fused):
    qkv, dout = 60 * random(1, 9, 24, seed=2), random(1, 9, 8, seed=3)
    (expected,) = gradients(lambda value: textbook(value, 2), [qkv], dout)
    out, gradient = run_attention(qkv.float(), dout.float(), 2, torch.float32, fused)
    assert bool(out.isfinite().all() and gradient.isfinite().all())
    assert relative_difference(gradient, expected) < 1e-2  # scores of 3600 in float32


@pytest.mark.parametrize("fused", FUSED)
def test_attention_kept_in_16_bits_stays_within_their_rounding(fused):
    qkv, dout = random(2, 30, 48, seed=4), random(2, 30, 16, seed=5)
    (expected,) = gradients(lambda value: textbook(value, 4), [qkv], dout)
    _, gradient = run_attention(qkv.float(), dout.float(), 4, torch.float16, fused)
    assert 1e-6 < relative_difference(gradient, expected) < 2e-3


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
    assert (
        relative_difference(y, F.layer_norm(x, (IN,), layer.params["weight"], layer.params["bias"], layer.eps)) < 1e-14
    )
    assert relative_difference(layer.forward(x, run, None)[0], y) < 1e-14
    dx, grads = layer.backward(saved, dy, run)
    expected = norm_autograd(layer, x, dy)
    for actual, wanted in zip((dx, grads["weight"], grads["bias"]), expected, strict=True):
        assert relative_difference(actual, wanted) < 1e-12


def test_layer_norm_saved_in_16_bits_stays_within_their_rounding():
    layer, x, dy = norm_inputs(torch.float32)
    run = Pass()
    _, saved = layer.forward(x, run, "norm", torch.float16)
    assert saved is not None and saved.x_hat.dtype == torch.float16 and saved.rstd.dtype == torch.float32
    dx, grads = layer.backward(saved, dy, run)
    expected = norm_autograd(layer, x, dy)
    for actual, wanted in zip((dx, grads["weight"]), expected[:2], strict=True):
        assert 1e-6 < relative_difference(actual, wanted) < 2e-3
    # the token of tiny variance has an rstd of a few hundred: the error of its own row is no larger
    assert relative_difference(dx[3], expected[0][3]) < 5e-3
    assert relative_difference(grads["bias"], expected[2]) < 1e-6


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
    assert relative_difference(y, F.gelu(a)) < 1e-14
    assert relative_difference(gelu_backward(saved, dy, run), expected) < 1e-13


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
        assert relative_difference(y, F.gelu(a)) < 1e-14
        if saved is not None:
            y.fill_(torch.nan)  # the next layer is free to overwrite it
            target = dy.clone()
            gradient = gelu_backward(saved, target, run)
            assert gradient.data_ptr() == target.data_ptr()
            assert relative_difference(gradient, dy * gelu_derivative(a)) < (0.01 if compact else 1e-13)


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


def test_norm_backward_reads_only_what_was_saved():
    layer, x, dy = norm_inputs()
    run = Pass()
    _, saved = layer.forward(x, run, "norm")
    assert isinstance(saved, SavedNorm)
    expected = norm_autograd(layer, x, dy)[0]
    x.fill_(torch.nan)
    assert relative_difference(layer.backward(saved, dy, run)[0], expected) < 1e-12


# ------------------------------------------------------------------------------------ what is rebuilt of a norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float16, 1e-3)])
@pytest.mark.parametrize("tokens", [3, NORM_ROWS + 5])
def test_a_norm_gives_its_output_and_its_input_again_from_what_it_kept(dtype, tolerance, tokens):
    x, weight, bias = 300 + 50 * random(tokens, 8, seed=40), random(8, seed=41), random(8, seed=42)
    norm, run = LayerNorm(weight, bias, 1e-6), Pass()
    y, saved = norm.forward(x, run, "norm", dtype, with_mean=True)
    assert saved is not None and saved.x_hat.dtype is dtype
    expected = y.clone()
    assert relative_difference(norm.again(saved, run), expected) < tolerance
    spread = (x - x.mean(1, keepdim=True)).norm()
    assert float((norm.inputs(saved, torch.empty_like(x)) - x).norm() / spread) < tolerance
    _, saved = norm.forward(x, run, "norm", dtype)
    with pytest.raises(AssertionError, match="mean"):
        norm.inputs(saved, torch.empty_like(x))
