import subprocess
import sys

import numpy as np
import pytest

from wasi_edge.subspace.ranks import break_even_rank, is_factored_smaller, rank_for_explained_variance


def slow_rank(values, epsilon):
    squares = sorted((value**2 for value in values), reverse=True)
    kept = 0.0
    for rank, square in enumerate(squares, start=1):
        kept += square
        if kept >= epsilon * sum(squares):
            return rank
    return len(squares)


@pytest.mark.parametrize("epsilon", [1e-6, 0.4, 0.5, 0.8, 0.9, 0.999])
def test_rank_is_the_smallest_that_explains_epsilon(epsilon):
    draws = np.random.default_rng(0)
    for _ in range(20):
        values = np.exp(draws.normal(size=17))
        assert rank_for_explained_variance(values, epsilon) == slow_rank(values, epsilon)


def test_threshold_met_exactly_needs_no_further_rank():
    assert rank_for_explained_variance([1.0, 1.0, 1.0, 1.0], 0.5) == 2
    assert rank_for_explained_variance([1.0, 1.0, 1.0, 1.0], 0.51) == 3


def test_order_of_the_values_does_not_matter():
    assert rank_for_explained_variance([0.1, 3.0, 1.0], 0.8) == 1


def test_full_variance_keeps_all_but_trailing_zeros():
    assert rank_for_explained_variance([3.0, 2.0, 1.0, 0.0, 0.0], 1.0) == 3


def test_zero_matrix_has_rank_one():
    assert rank_for_explained_variance([0.0, 0.0], 0.9) == 1


def test_squares_neither_overflow_nor_vanish():
    assert rank_for_explained_variance([1e200, 1e200], 0.9) == 2
    assert rank_for_explained_variance([1e-200, 1e-200], 0.9) == 2


@pytest.mark.parametrize("epsilon", [0.0, -0.1, 1.0001, float("nan")])
def test_epsilon_outside_its_range_is_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        rank_for_explained_variance([1.0], epsilon)


@pytest.mark.parametrize("values", [[], [[1.0]], [float("nan")], [float("inf")]])
def test_values_that_are_no_spectrum_are_refused(values):
    with pytest.raises(ValueError, match="singular values"):
        rank_for_explained_variance(values, 0.5)


@pytest.mark.parametrize("out_features", [1, 2, 3, 7, 64, 768])
@pytest.mark.parametrize("in_features", [1, 2, 5, 64, 384])
def test_break_even_is_the_last_rank_that_saves(out_features, in_features):
    rank = break_even_rank(out_features, in_features)
    assert rank >= 1
    assert not is_factored_smaller(rank + 1, out_features, in_features)
    assert rank == 1 or is_factored_smaller(rank, out_features, in_features)


def test_equal_size_is_not_smaller():
    assert not is_factored_smaller(2, 4, 4)  # 2 * 8 == 16
    assert break_even_rank(4, 4) == 1


def test_break_even_refuses_an_empty_dimension():
    with pytest.raises(ValueError, match="positive"):
        break_even_rank(0, 3)


def test_module_does_not_import_torch():
    code = "import sys, wasi_edge.subspace.ranks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
