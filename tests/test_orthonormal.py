import pytest
import torch
from reference import generator, one_thread, plain_qr, random, subspace_difference  # noqa: F401

from wasi_edge.subspace.orthonormal import gram, orthonormalise

SHAPES = [(1, 1), (5, 1), (4, 4), (40, 7), (600, 32), (1536, 32)]


def orthonormality_error(basis):
    return float((gram(basis) - torch.eye(basis.shape[1], dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_are_orthonormal_and_span_the_input(shape, dtype):
    matrix = random(*shape, seed=1, dtype=dtype)
    basis = orthonormalise(matrix)
    limit = 200 * torch.finfo(dtype).eps
    assert basis.dtype == dtype and basis.shape == shape
    assert orthonormality_error(basis) < limit
    assert subspace_difference(basis, plain_qr(matrix.double())) < limit * shape[1]


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e7, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ill_conditioned_input_still_gives_orthonormal_columns(condition, dtype):
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), 16, dtype=torch.float64)
    mix = plain_qr(random(16, 16, seed=2))
    matrix = plain_qr(random(300, 16, seed=3)) * values @ mix
    assert orthonormality_error(orthonormalise(matrix.to(dtype))) < 100 * torch.finfo(dtype).eps


def test_column_lengths_do_not_cost_accuracy():
    columns = random(200, 8, seed=4, dtype=torch.float32)
    graded = columns * torch.logspace(0, -20, 8)
    assert subspace_difference(orthonormalise(graded), plain_qr(columns.double())) < 1e-5


@pytest.mark.parametrize("zero", [[0], [3], [0, 7], list(range(8))])
def test_zero_columns_are_replaced_by_orthonormal_ones(zero):
    matrix = random(50, 8, seed=5, dtype=torch.float32)
    matrix[:, zero] = 0.0
    basis = orthonormalise(matrix)
    assert bool(basis.isfinite().all())
    assert orthonormality_error(basis) < 1e-5
    residual = matrix - basis @ (basis.T @ matrix)
    assert float(residual.norm()) < 1e-5 * max(1.0, float(matrix.norm()))


def test_repeated_columns_leave_the_span_intact():
    matrix = random(50, 6, seed=6, dtype=torch.float32)
    matrix[:, 5] = matrix[:, 0]
    basis = orthonormalise(matrix)
    assert orthonormality_error(basis) < 1e-5
    assert float((matrix - basis @ (basis.T @ matrix)).norm()) < 1e-5 * float(matrix.norm())


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e15])
def test_extreme_scales_neither_overflow_nor_vanish(scale):
    basis = orthonormalise(random(60, 5, seed=7, dtype=torch.float32) * scale)
    assert orthonormality_error(basis) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_input_keeps_its_dtype(dtype):
    basis = orthonormalise(random(64, 4, seed=8, dtype=dtype))
    assert basis.dtype == dtype
    assert orthonormality_error(basis) < 4 * torch.finfo(dtype).eps


def test_input_is_not_changed():
    matrix = random(30, 4, seed=9, dtype=torch.float32)
    before = matrix.clone()
    orthonormalise(matrix)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("shape", [(3, 4), (3, 0), (3,), (2, 3, 4)])
def test_wide_empty_or_misshapen_input_is_refused(shape):
    with pytest.raises(ValueError, match="m >= r >= 1"):
        orthonormalise(torch.zeros(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_is_refused(bad):
    matrix = random(20, 3, seed=10, dtype=torch.float32)
    matrix[4, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        orthonormalise(matrix)


def test_chunked_gram_equals_the_float64_product():
    matrix = random(1300, 9, seed=11, dtype=torch.float32)
    expected = matrix.double().T @ matrix.double()
    assert float((gram(matrix) - expected).abs().max()) < 1e-11


def test_global_generator_is_untouched():
    before = torch.random.get_rng_state()
    orthonormalise(torch.randn(20, 3, generator=generator(0)))
    orthonormalise(torch.zeros(20, 3))
    assert torch.equal(torch.random.get_rng_state(), before)
