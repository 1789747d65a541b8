import pytest
import torch
from reference import (
    dense_wsi_step,
    matrix_with_spectrum,
    naive_factored_step,
    one_thread,  # noqa: F401
    plain_qr,
    random,
    relative_difference,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wasi_edge.subspace.factors import (
    MAX_CONDITION,
    condition_estimate,
    make_orthonormal,
    orthonormal_pair,
    weight_factors,
)
from wasi_edge.subspace.orthonormal import orthonormalise
from wasi_edge.subspace.weight import update_weight

O, I, K, R = 48, 40, 12, 4  # noqa: E741
FLOAT32_BOUND = 4e-6  # measured 2e-6 at worst; the naive factored step leaves 1.1e-5 or far more


def spectrum(ratio, rank=K):
    return torch.logspace(0, -torch.tensor(float(ratio)).log10().item(), rank, dtype=torch.float64)


def state(
    ratio: float = 10.0, rank: int = K, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    left, right = matrix_with_spectrum(O, I, spectrum(ratio, rank), seed)
    return left.to(dtype), right.to(dtype)


def gradient(step: int, rank: int = R, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A gradient P U^T of norm 1, different each step."""
    left = random(O, rank, seed=1000 + step)
    basis = orthonormalise(random(I, rank, seed=5000 + step))
    return (left / left.norm()).to(dtype), basis.to(dtype)


def dense(factors):
    return factors.left.double() @ factors.right.double()


def copied(factors):
    return [t.clone() for t in (factors.left, factors.right, factors.carried)]


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(("rank", "gradient_rank"), [(12, 4), (1, 1), (1, 4), (4, 12), (12, 1), (39, 40)])
def test_fifty_steps_equal_the_dense_oracle_in_float64(rank, gradient_rank, decay):
    left, right = state(rank=rank)
    factors = weight_factors(left.clone(), right.clone())
    weight = left @ right
    for step in range(50):
        P, U = gradient(step, gradient_rank)
        weight, left = dense_wsi_step(weight, left, P @ U.T, 0.05, decay)
        update_weight(factors, P, U, 0.05, decay)
        assert relative_difference(dense(factors), weight) < 1e-12


def expected_inverses(factors):
    """By definition, in float64."""
    left, right = factors.left.double(), factors.right.double() / factors.scale.double()[:, None]
    return torch.linalg.inv(left.T @ left), torch.linalg.inv(right @ right.T)


def test_what_is_carried_stays_that_of_the_factors_over_fifty_steps():
    factors = weight_factors(*state())
    for step in range(50):
        update_weight(factors, *gradient(step), 0.05, 0.3)
        left_inverse, right_inverse = expected_inverses(factors)
        assert relative_difference(factors.left_inverse, left_inverse) < 1e-11
        assert relative_difference(factors.right_inverse, right_inverse) < 1e-11
        assert relative_difference(factors.left_squares, factors.left.square().sum(0)) < 1e-12
        scaled = factors.right / factors.scale[:, None]
        assert relative_difference(factors.right_squares, scaled.square().sum(1)) < 1e-12


def test_left_spans_the_oracles_subspace():
    left, right = state()
    factors, weight = weight_factors(left.clone(), right), left @ right
    for step in range(3):
        P, U = gradient(step)
        weight, left = dense_wsi_step(weight, left, P @ U.T, 0.05, 0.0)
        update_weight(factors, P, U, 0.05, 0.0)
        assert float((factors.left - left @ (left.T @ factors.left)).norm()) < 1e-12


def test_carried_inverses_stay_symmetric_over_hundreds_of_steps():
    factors = weight_factors(*state(dtype=torch.float32))
    for step in range(300):
        update_weight(factors, *gradient(step, dtype=torch.float32), 0.003, 0.1)
    for inverse in (factors.left_inverse, factors.right_inverse):
        assert relative_difference(inverse, inverse.T) < 1e-5


def test_update_happens_in_the_tensors_given():
    factors = weight_factors(*state(dtype=torch.float32))
    held = (factors.left, factors.right, factors.carried)
    before = copied(factors)
    update_weight(factors, *gradient(0, dtype=torch.float32), 0.05, 0.0)
    now = (factors.left, factors.right, factors.carried)
    assert all(a is b for a, b in zip(held, now, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, held, strict=True))


def test_zero_gradient_leaves_only_decay():
    left, right = state()
    factors = weight_factors(left.clone(), right.clone())
    for _ in range(3):
        update_weight(factors, torch.zeros(O, R, dtype=torch.float64), gradient(0)[1], 0.1, 0.5)
    assert relative_difference(dense(factors), 0.95**3 * left @ right) < 1e-13


def test_zero_learning_rate_changes_nothing():
    factors = weight_factors(*state())
    before = dense(factors)
    update_weight(factors, *gradient(0), 0.0, 0.5)
    assert relative_difference(dense(factors), before) < 1e-13


def run_float32(step_function, ratio, relative_step):
    """Fifty steps of eta * ||P|| = relative_step * s_K in float32; the error against the float64 oracle."""
    left, right = state(ratio, dtype=torch.float32)
    weight, oracle_left = left.double() @ right.double(), left.double()
    learning_rate = relative_step * float(spectrum(ratio)[-1])
    for step in range(50):
        P, U = gradient(step, dtype=torch.float32)
        product = P.double() @ U.double().T
        weight, oracle_left = dense_wsi_step(weight, oracle_left, product, learning_rate, 0.01)
        left, right = step_function(left, right, P, U, learning_rate, 0.01)
    return relative_difference(left.double() @ right.double(), weight)


@pytest.mark.parametrize("ratio", [10, 90, 1000])
@pytest.mark.parametrize("relative_step", [0.5, 2.0, 10.0])
def test_float32_follows_the_float64_oracle_for_spread_spectra(ratio, relative_step):
    factors = orthonormal_pair(*state(ratio, dtype=torch.float32))
    steps = iter(range(50))

    def step_function(left, right, P, U, learning_rate, decay):
        nonlocal factors
        condition = update_weight(factors, P, U, learning_rate, decay)
        if condition > MAX_CONDITION or next(steps) % 20 == 19:
            factors = orthonormal_pair(factors.left, factors.right)
        return factors.left, factors.right

    # steps as long as the layer itself leave 2.4e-5
    bound = FLOAT32_BOUND if relative_step < ratio else 5e-5
    assert run_float32(step_function, ratio, relative_step) < bound


@pytest.mark.parametrize("ratio", [10, 90, 1000])
def test_the_float32_bound_rejects_the_naive_factored_step(ratio):
    assert not run_float32(naive_factored_step, ratio, 2.0) < FLOAT32_BOUND


@pytest.mark.parametrize("ratio", [10, 1000])
@pytest.mark.parametrize("relative_step", [2e1, 1e2, 1e3, 1e4])
def test_one_violent_step_is_as_near_to_its_aim_as_the_oracles(ratio, relative_step):
    factors = orthonormal_pair(*state(ratio, dtype=torch.float32))
    P, U = gradient(0, dtype=torch.float32)
    learning_rate, product = relative_step * float(spectrum(ratio)[-1]), P.double() @ U.double().T
    aim = dense(factors) - learning_rate * product
    oracle, _ = dense_wsi_step(dense(factors), factors.left.double(), product, learning_rate, 0.0)
    update_weight(factors, P, U, learning_rate, 0.0)
    assert relative_difference(dense(factors), aim) < relative_difference(oracle, aim) + 2e-6


@pytest.mark.parametrize("ratio", [1, 90, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormal_pair_is_the_svd_of_the_product(ratio, dtype):
    left, right = state(ratio, dtype=dtype)
    skew = random(K, K, seed=9).to(dtype)
    left, right = left @ skew, torch.linalg.solve(skew.double(), right.double()).to(dtype)
    factors = orthonormal_pair(left, right)
    eps = torch.finfo(dtype).eps
    values = torch.linalg.svdvals(left.double() @ right.double())[:K]
    left_gram = factors.left.double().T @ factors.left.double()
    right_gram = factors.right.double() @ factors.right.double().T
    lengths = right_gram.diagonal().sqrt()
    correlation = right_gram / lengths.outer(lengths)
    eye = torch.eye(K, dtype=torch.float64)
    product = left.double() @ right.double()
    cancelled = float(left.norm() * right.norm() / product.norm())  # by the skew, before we start
    assert relative_difference(dense(factors), product) < 10 * eps * (cancelled if dtype == eye.dtype else 1)
    assert float((left_gram - eye).abs().max()) < 20 * eps
    assert float((factors.scale / lengths - 1).abs().max()) < max(10 * eps, 1e-9)
    assert torch.equal(factors.left_inverse.double(), eye) and torch.equal(factors.right_inverse.double(), eye)
    assert float((correlation - eye).abs().max()) < max(10 * eps, 1e-9)
    assert float((lengths / values - 1).abs().max()) < max(10 * eps, 1e-9)
    assert bool((lengths[:-1] >= lengths[1:] * (1 - 10 * eps)).all())


@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-7, 0.0])
def test_orthonormal_pair_survives_a_nearly_dependent_left(scale):
    left, right = state(dtype=torch.float32)
    left[:, 1] = left[:, 0] + scale * left[:, 1]
    factors = orthonormal_pair(left, right)
    assert relative_difference(dense(factors), left.double() @ right.double()) < 1e-5
    assert relative_difference(factors.left.T @ factors.left, torch.eye(K)) < 1e-5


def test_make_orthonormal_gives_the_same_pair_in_place_and_leaves_what_it_refuses_alone():
    left, right = state(90, dtype=torch.float32)
    expected = orthonormal_pair(left, right)
    pointers = left.data_ptr(), right.data_ptr()
    factors = make_orthonormal(left, right)
    assert (factors.left.data_ptr(), factors.right.data_ptr()) == pointers
    assert torch.equal(factors.left, expected.left) and torch.equal(factors.right, expected.right)
    left[0, 0] = torch.nan
    before = right.clone()
    with pytest.raises(ValueError, match="NaN"):
        make_orthonormal(left, right)
    assert torch.equal(right, before)


def test_orthonormal_pair_of_a_zero_layer_is_finite_and_zero():
    factors = orthonormal_pair(torch.zeros(O, K), torch.zeros(K, I))
    assert relative_difference(factors.left.T @ factors.left, torch.eye(K)) < 1e-6
    assert not dense(factors).any()


def test_orthonormal_pair_leaves_its_arguments_alone():
    left, right = state(dtype=torch.float32)
    before = left.clone(), right.clone()
    orthonormal_pair(left, right)
    assert torch.equal(left, before[0]) and torch.equal(right, before[1])


def best_approximation(matrix, rank):
    outer, values, inner = torch.linalg.svd(matrix, full_matrices=False)
    return outer[:, :rank] * values[:rank] @ inner[:rank]


@pytest.mark.parametrize("kind", ["zero layer", "zero right", "zero left", "zero row", "equal rows"])
@pytest.mark.parametrize("gradient_rank", [4, 20])
def test_singular_layers_step_to_the_best_approximation(kind, gradient_rank):
    left, right = state()
    if kind in ("zero layer", "zero right"):
        right.zero_()
    if kind in ("zero layer", "zero left"):
        left.zero_()
    if kind == "zero row":
        right[3] = 0.0
    if kind == "equal rows":
        right[3] = right[2]
    factors = weight_factors(left.clone(), right.clone())
    P, U = gradient(0, gradient_rank)
    update_weight(factors, P, U, 0.1, 0.5)
    expected = best_approximation(0.95 * left @ right - 0.1 * P @ U.T, K)
    assert relative_difference(dense(factors), expected) < 1e-12
    left_inverse, right_inverse = expected_inverses(factors)
    assert relative_difference(factors.left_inverse, left_inverse) < 1e-12
    assert relative_difference(factors.right_inverse, right_inverse) < 1e-9


def test_a_zero_layer_goes_on_training_after_its_first_step():
    factors = weight_factors(orthonormalise(random(O, K, seed=0)), torch.zeros(K, I, dtype=torch.float64))
    target = random(O, 3, seed=1) @ random(3, I, seed=2)
    basis = plain_qr(target.T)[:, :3]  # rank of the target
    for _ in range(60):
        update_weight(factors, (dense(factors) - target) @ basis, basis, 0.3, 0.0)
    assert relative_difference(dense(factors), target) < 1e-6


class Shapes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("singular", [False, True])
def test_no_dense_weight_is_ever_made(singular):
    factors = weight_factors(*state(dtype=torch.float32))
    if singular:
        factors = weight_factors(factors.left, factors.right.zero_())
    P, U = gradient(0, dtype=torch.float32)
    with Shapes() as shapes:
        update_weight(factors, P, U, 0.05, 0.1)
        orthonormal_pair(factors.left, factors.right)
    assert (K, K) in shapes.seen  # it did record
    assert not {(O, I), (I, O), (O, O), (I, I)} & shapes.seen


def test_factors_are_never_copied_whole_into_float64():
    """Chunks of 512 rows only, for factors larger than that."""

    class Float64(Shapes):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                self.seen.add(tuple(result.shape))
            return result

    factors = weight_factors(random(1100, 6, seed=0).float(), random(6, 1200, seed=1).float())
    P, U = random(1100, 3, seed=2).float(), orthonormalise(random(1200, 3, seed=3).float())
    with Float64() as shapes:
        update_weight(factors, P, U, 1e-3, 0.1)
        orthonormal_pair(factors.left, factors.right)
    assert shapes.seen and max(max(shape, default=0) for shape in shapes.seen) <= 512


def test_norm_of_the_factored_gradient_is_that_of_its_left_part():
    P, U = gradient(0)
    assert abs(float((P @ U.T).norm()) - float(P.norm())) < 1e-14


def test_condition_estimate_reads_the_cholesky_diagonal():
    assert condition_estimate(torch.diag(torch.tensor([4.0, 1.0, 0.01], dtype=torch.float64))) == pytest.approx(400)
    assert condition_estimate(torch.zeros(3, 3, dtype=torch.float64)) == float("inf")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["gradient", "basis"])
def test_non_finite_gradient_is_refused_and_leaves_the_state(bad, where):
    factors = weight_factors(*state(dtype=torch.float32))
    before = copied(factors)
    P, U = gradient(0, dtype=torch.float32)
    (P if where == "gradient" else U)[2, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        update_weight(factors, P, U, 0.1, 0.0)
    after = (factors.left, factors.right, factors.carried)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("rows", "columns"), [((O, 3), (I, 4)), ((I, 4), (I, 4)), ((O, 41), (I, 41)), ((O, 0), (I, 0))]
)
def test_gradient_that_does_not_fit_is_refused(rows, columns):
    with pytest.raises(ValueError, match="expected a gradient"):
        update_weight(weight_factors(*state()), torch.zeros(rows), torch.zeros(columns), 0.1, 0.0)


@pytest.mark.parametrize("make", [weight_factors, orthonormal_pair])
def test_sixteen_bit_factors_are_refused(make):
    left, right = state(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="widen"):
        make(left, right)


def test_factors_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="expected factors"):
        weight_factors(torch.zeros(4, 2), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="exceeds"):
        orthonormal_pair(torch.zeros(2, 3), torch.zeros(3, 5))


def test_global_generator_is_untouched():
    before = torch.random.get_rng_state()
    factors = orthonormal_pair(*state())
    update_weight(factors, *gradient(0), 0.1, 0.1)
    assert torch.equal(torch.random.get_rng_state(), before)
