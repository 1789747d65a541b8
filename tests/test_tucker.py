import itertools

import pytest
import torch
from reference import (
    dense_asi_refresh,
    dense_reconstruction,
    dense_weight_gradient,
    generator,
    one_thread,  # noqa: F401
    plain_qr,
    random,
    relative_difference,
    subspace_difference,
    unfold,
)
from torch.utils._python_dispatch import TorchDispatchMode

from wasi_edge.subspace.ranks import rank_for_explained_variance
from wasi_edge.subspace.tucker import (
    compress,
    gradient_error,
    initial_basis,
    mode_ranks,
    reconstruct,
    refresh_basis,
    refresh_factors,
    saved_bytes,
    weight_gradient,
)

THREE, FOUR = (3, 9, 14), (2, 5, 6, 11)
SUBSETS = [
    (shape, subset)
    for shape in (THREE, FOUR)
    for size in range(len(shape) + 1)
    for subset in itertools.combinations(range(len(shape)), size)
]


def bases(shape, subset, rank=3):
    return tuple(
        initial_basis(size, min(rank, size), generator(mode), torch.float64) if mode in subset else None
        for mode, size in enumerate(shape)
    )


@pytest.mark.parametrize(("shape", "subset"), SUBSETS)
def test_weight_gradient_equals_that_of_the_reconstructed_input(shape, subset):
    x, dy = random(*shape, seed=1), random(*shape[:-1], 7, seed=2)
    factors = bases(shape, subset)
    gradient = weight_gradient(dy, compress(x, factors))
    last = factors[-1]
    product = gradient if last is None else gradient @ last.T
    expected = dense_weight_gradient(dy, dense_reconstruction(x, factors))
    assert gradient.shape == (7, shape[-1] if last is None else last.shape[1])
    assert relative_difference(product, expected) < 1e-13


@pytest.mark.parametrize("out_features", [1, 200])
def test_either_order_of_contraction_gives_the_same_gradient(out_features):
    x, dy = random(*THREE, seed=1), random(*THREE[:-1], out_features, seed=2)
    factors = bases(THREE, (0, 1, 2), rank=2)
    expected = dense_weight_gradient(dy, dense_reconstruction(x, factors)) @ factors[-1]
    assert relative_difference(weight_gradient(dy, compress(x, factors)), expected) < 1e-13


@pytest.mark.parametrize(("shape", "subset"), SUBSETS)
def test_reconstruction_is_the_projection_onto_every_factor(shape, subset):
    x, factors = random(*shape, seed=1), bases(shape, subset)
    tucker = compress(x, factors)
    assert relative_difference(reconstruct(tucker), dense_reconstruction(x, factors)) < 1e-13
    assert saved_bytes(tucker) == 8 * (tucker.core.numel() + sum(f.numel() for f in factors if f is not None))


@pytest.mark.parametrize("shape", [THREE, FOUR])
def test_compression_at_full_rank_loses_nothing(shape):
    x = random(*shape, seed=1)
    full = tuple(plain_qr(random(size, size, seed=size)) for size in shape)
    assert relative_difference(reconstruct(compress(x, full)), x) < 1e-13


@pytest.mark.parametrize(("shape", "subset"), SUBSETS)
def test_three_warm_refreshes_equal_the_dense_iteration_on_unfoldings(shape, subset):
    factors = expected = bases(shape, subset)
    for step in range(3):
        x = random(*shape, seed=10 + step)
        factors = refresh_factors(x, factors)
        expected = tuple(None if f is None else dense_asi_refresh(x, mode, f) for mode, f in enumerate(expected))
        for ours, dense in zip(factors, expected, strict=True):
            assert (ours is None) == (dense is None)
            assert ours is None or subspace_difference(ours, dense) < 1e-11


@pytest.mark.parametrize("rank", [1, 4, 14])
def test_three_refreshes_of_a_basis_equal_the_dense_iteration_with_weights(rank):
    basis = dense = initial_basis(14, rank, generator(0), torch.float64)
    for step in range(3):
        x, weight = random(27, 14, seed=step), random(27, seed=50 + step).square()
        basis = refresh_basis(x, basis, weight)
        dense = plain_qr(x.T @ torch.diag(weight) @ x @ dense)
        assert subspace_difference(basis, dense) < 1e-11
        assert float((basis.T @ basis - torch.eye(rank, dtype=torch.float64)).abs().max()) < 1e-13


def test_unit_weights_are_no_weights():
    x, basis = random(27, 14, seed=1), initial_basis(14, 4, generator(0), torch.float64)
    weighted = refresh_basis(x, basis, torch.ones(27, dtype=torch.float64))
    assert torch.equal(weighted, refresh_basis(x, basis))


def test_scale_of_the_weights_does_not_matter():
    x, basis = random(27, 14, seed=1), initial_basis(14, 4, generator(0), torch.float64)
    weight = random(27, seed=2).square()
    assert subspace_difference(refresh_basis(x, basis, weight), refresh_basis(x, basis, 1e-9 * weight)) < 1e-12


def test_tokens_of_weight_zero_are_ignored():
    x, basis = random(27, 14, seed=1), initial_basis(14, 4, generator(0), torch.float64)
    weight = torch.ones(27, dtype=torch.float64)
    weight[20:] = 0.0
    assert subspace_difference(refresh_basis(x, basis, weight), refresh_basis(x[:20], basis)) < 1e-12


def test_many_iterations_reach_the_dominant_subspace():
    values = torch.logspace(0, -3, 14, dtype=torch.float64)
    right = plain_qr(random(14, 14, seed=2))
    x = plain_qr(random(27, 14, seed=1)) * values @ right.T
    basis = refresh_basis(x, initial_basis(14, 4, generator(0), torch.float64), iterations=30)
    assert subspace_difference(basis, right[:, :4]) < 1e-12


def test_iterations_are_repeated_refreshes():
    x, basis = random(27, 14, seed=1), initial_basis(14, 4, generator(0), torch.float64)
    assert torch.equal(refresh_basis(x, basis, iterations=2), refresh_basis(x, refresh_basis(x, basis)))


def test_refresh_changes_neither_its_basis_nor_its_input():
    x, basis = random(27, 14, seed=1), initial_basis(14, 4, generator(0), torch.float64)
    before = x.clone(), basis.clone()
    refresh_basis(x, basis, torch.full((27,), 2.0, dtype=torch.float64))
    assert torch.equal(x, before[0]) and torch.equal(basis, before[1])


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_rank_still_give_an_orthonormal_basis(tokens):
    basis = initial_basis(14, 6, generator(0))
    basis = refresh_basis(random(tokens, 14, seed=1, dtype=torch.float32), basis)
    assert float((basis.T @ basis - torch.eye(6)).abs().max()) < 1e-5


def test_all_zero_activations_leave_an_orthonormal_basis():
    basis = refresh_basis(torch.zeros(20, 14), initial_basis(14, 6, generator(0)))
    assert float((basis.T @ basis - torch.eye(6)).abs().max()) < 1e-5


def test_token_weights_lower_the_gradients_error():
    x = random(200, 30, seed=1)
    weight = torch.where(torch.arange(200) < 10, 1.0, 1e-4).double()
    dy = random(200, 8, seed=2) * weight.sqrt()[:, None]
    start = initial_basis(30, 8, generator(0), torch.float64)
    plain = gradient_error(dy, x, refresh_basis(x, start, iterations=5))
    weighted = gradient_error(dy, x, refresh_basis(x, start, weight, iterations=5))
    assert weighted < 0.6 * plain


@pytest.mark.parametrize("out_features", [5, 300])
def test_gradient_error_equals_its_definition(out_features):
    x, dy = random(27, 14, seed=1), random(27, out_features, seed=2)
    basis = initial_basis(14, 4, generator(0), torch.float64)
    exact = dy.T @ x
    assert gradient_error(dy, x, basis) == pytest.approx(relative_difference(exact @ basis @ basis.T, exact), rel=1e-12)


def test_gradient_error_is_zero_at_full_rank_and_for_no_gradient():
    x, dy = random(27, 14, seed=1), random(27, 5, seed=2)
    assert gradient_error(dy, x, plain_qr(random(14, 14, seed=3))) < 1e-14
    assert gradient_error(torch.zeros_like(dy), x, plain_qr(random(14, 4, seed=3))) == 0.0


@pytest.mark.parametrize("shape", [THREE, FOUR])
@pytest.mark.parametrize("epsilon", [0.4, 0.8, 0.99])
def test_mode_ranks_are_those_of_the_unfoldings(shape, epsilon):
    x = random(*shape, seed=1)
    expected = tuple(
        rank_for_explained_variance(torch.linalg.svdvals(unfold(x, mode)).numpy(), epsilon) for mode in range(x.ndim)
    )
    assert mode_ranks(x, epsilon) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mode_ranks_at_full_variance_are_the_multilinear_ranks(dtype):
    core = random(2, 3, 4, seed=1)
    x = torch.einsum("abc,ia,jb,kc->ijk", core, *(plain_qr(random(n, r, seed=n)) for n, r in ((6, 2), (7, 3), (8, 4))))
    assert mode_ranks(x.to(dtype), 1.0) == (2, 3, 4)


class Shapes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.sizes.add(result.numel())
        return result


@pytest.mark.parametrize("out_features", [2, 40])
def test_gradient_makes_nothing_as_large_as_the_input_or_the_weight(out_features):
    shape, rank = (4, 16, 50), 3
    tucker = compress(random(*shape, seed=1), bases(shape, (0, 1, 2), rank))
    dy = random(*shape[:-1], out_features, seed=2)
    with Shapes() as shapes:
        weight_gradient(dy, tucker)
    assert shapes.sizes and max(shapes.sizes) <= dy.numel() < 4 * 16 * 50
    assert out_features * 50 not in shapes.sizes


def test_refresh_never_forms_a_feature_by_feature_matrix():
    x, basis = random(8, 3, 90, seed=1), initial_basis(90, 4, generator(0), torch.float64)
    with Shapes() as shapes:
        refresh_factors(x, (None, None, basis))
        refresh_basis(x.reshape(24, 90), basis, torch.ones(24, dtype=torch.float64))
    assert shapes.sizes and max(shapes.sizes) <= x.numel() < 90 * 90


@pytest.mark.parametrize(("features", "rank"), [(5, 6), (5, 0)])
def test_rank_beyond_the_features_is_refused(features, rank):
    with pytest.raises(ValueError, match="rank between"):
        initial_basis(features, rank, generator(0))


@pytest.mark.parametrize(
    "factors",
    [
        (None, None),
        (None, None, torch.zeros(13, 2)),
        (None, torch.zeros(9, 10), None),
        (torch.zeros(3, 0), None, None),
    ],
)
def test_factors_that_do_not_fit_are_refused(factors):
    for function in (compress, refresh_factors):
        with pytest.raises(ValueError, match="expected a factor"):
            function(torch.zeros(THREE), factors)


def test_shapes_that_do_not_match_are_refused():
    basis = initial_basis(14, 4, generator(0))
    with pytest.raises(ValueError, match="expected x"):
        refresh_basis(torch.zeros(27, 13), basis)
    with pytest.raises(ValueError, match="weight for each"):
        refresh_basis(torch.zeros(27, 14), basis, torch.ones(26))
    with pytest.raises(ValueError, match="iteration"):
        refresh_basis(torch.zeros(27, 14), basis, iterations=0)
    with pytest.raises(ValueError, match="expected dy"):
        gradient_error(torch.zeros(26, 3), torch.zeros(27, 14), basis)
    with pytest.raises(ValueError, match="leading modes"):
        weight_gradient(torch.zeros(3, 8, 5), compress(torch.zeros(THREE), (None, None, basis)))


def test_initial_basis_depends_on_its_generator_alone():
    before = torch.random.get_rng_state()
    first, again, other = (initial_basis(20, 5, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.float32
    refresh_factors(random(2, 3, 20, seed=1, dtype=torch.float32), (None, None, first))
    assert torch.equal(torch.random.get_rng_state(), before)
