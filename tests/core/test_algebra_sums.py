import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core import algebra
from fedlora.core.adapter import Pair

F64 = torch.float64
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
dims, ranks, seeds = st.integers(1, 12), st.integers(1, 16), st.integers(0, 2**32 - 1)
scales = st.floats(0.05, 20).flatmap(lambda s: st.sampled_from([s, -s]))
some = st.lists(st.tuples(ranks, scales), min_size=1, max_size=4)


# --- sums ---------------------------------------------------------------------------------------------------


@given(seed=seeds, d_out=dims, d_in=dims, many=st.lists(st.tuples(ranks, scales), min_size=1, max_size=5))
def test_stack_is_the_weighted_sum_for_any_ranks_and_scales(make, np64, seed, d_out, d_in, many):
    rng = np.random.default_rng(seed)
    pairs, w = [make.pair(rng, d_out, d_in, r, s) for r, s in many], list(rng.standard_normal(len(many)))
    tall = algebra.stack(pairs, w)
    assert (tall.rank, tall.scale) == (sum(r for r, _ in many), 1.0)
    assert np64.close(np64.delta(tall), np64.sum(pairs, w), 1e-12)


def test_stack_puts_weight_and_scale_on_B_alone(make, rng):
    one, two = make.pair(rng, 3, 4, 1, 2.0), make.pair(rng, 3, 4, 2, 0.5)
    tall = algebra.stack([one, two], [0.25, 0.75])
    assert torch.equal(tall.A, torch.cat([one.A, two.A]))
    assert torch.equal(tall.B, torch.cat([0.5 * one.B, 0.375 * two.B], dim=1))


@DTYPES
def test_stack_keeps_the_dtype_and_rounds_once(make, rng, dtype):
    pair = make.pair(rng, 30, 4, 5, 3.0, dtype)
    tall = algebra.stack([pair, pair], [1 / 3, 0.7])
    assert tall.A.dtype == tall.B.dtype == dtype
    assert torch.equal(tall.B[:, 5:], (pair.B.double() * (0.7 * 3.0)).to(dtype))


def test_a_sum_needs_one_weight_a_pair(make, rng):
    pair = make.pair(rng, 3, 4, 1)
    for combine in (algebra.stack, algebra.mean_factors):
        with pytest.raises(ValueError, match="zip"):
            combine([pair, pair], [1.0])


@given(
    seed=seeds,
    d_out=dims,
    d_in=dims,
    many=some,
    last=ranks,
)
def test_residual_is_the_sum_less_the_approximation(make, np64, seed, d_out, d_in, many, last):
    rng = np.random.default_rng(seed)
    pairs, w = [make.pair(rng, d_out, d_in, r, s) for r, s in many], list(rng.random(len(many)))
    approximation = make.pair(rng, d_out, d_in, last, -1.5)
    want = np64.sum(pairs, w) - np64.delta(approximation)
    assert np64.close(np64.delta(algebra.residual(pairs, w, approximation)), want, 1e-12)


@given(
    seed=seeds,
    d_out=dims,
    d_in=dims,
    many=some,
    last=ranks,
)
def test_relative_error_is_the_norm_of_the_difference_and_of_the_sum(
    make, np64, seed, d_out, d_in, many, last
):
    rng = np.random.default_rng(seed)
    pairs, w = [make.pair(rng, d_out, d_in, r, s) for r, s in many], list(rng.random(len(many)))
    result, total = make.pair(rng, d_out, d_in, last, 0.5), np64.sum(pairs, w)
    want = np.linalg.norm(total - np64.delta(result)), np.linalg.norm(total)
    assert algebra.error_and_norm(pairs, w, result) == pytest.approx(want, rel=1e-12, abs=1e-12)


def test_relative_error_is_computed_in_float64_whatever_comes_in(make, rng):
    pairs = [make.pair(rng, 30, 40, 3, s, torch.float32) for s in (1.0, 1 / 3)]
    exact = algebra.stack([Pair(p.A.double(), p.B.double(), p.scale) for p in pairs], [0.3, 0.7])
    error, size = algebra.error_and_norm(pairs, [0.3, 0.7], exact)
    assert error < 1e-13 * size


@given(
    seed=seeds,
    d_out=dims,
    d_in=dims,
    many=some,
    new=scales,
)
def test_weighted_sum_is_the_sum_in_the_fewest_directions(make, np64, seed, d_out, d_in, many, new):
    rng = np.random.default_rng(seed)
    pairs, w = [make.pair(rng, d_out, d_in, r, s) for r, s in many], list(rng.random(len(many)))
    total = algebra.weighted_sum(pairs, w, new)
    assert total.scale == new
    assert total.rank <= min(d_out, d_in, sum(r for r, _ in many))
    assert np64.orthonormal_rows(total.A)
    assert np64.close(np64.delta(total), np64.sum(pairs, w))
    assert algebra.weighted_sum(pairs, w).scale == pairs[0].scale


@pytest.mark.parametrize("shape", [(30, 40, 3), (6, 9, 5)], ids=["thin", "dense"])
def test_weighted_sum_does_not_round_before_the_columns_cancel(make, np64, rng, shape):
    one = make.pair(rng, *shape, 3.0, torch.float32)
    two = Pair(one.A, one.B + 1e-4 * make.tensor(rng, shape[0], shape[2], dtype=torch.float32), -3.0)
    want = np64.sum([one, two], [0.3, 0.3])
    got = np64.delta(algebra.weighted_sum([one, two], [0.3, 0.3], 1.0))
    assert np.linalg.norm(got - want) < 1e-6 * np.linalg.norm(want)


# --- size ---------------------------------------------------------------------------------------------------


@given(seed=seeds, d_out=dims, d_in=dims, rank=ranks, scale=scales)
def test_norm_is_that_of_the_dense_update(make, np64, seed, d_out, d_in, rank, scale):
    pair = make.pair(np.random.default_rng(seed), d_out, d_in, rank, scale)
    assert algebra.norm(pair) == pytest.approx(np.linalg.norm(np64.delta(pair)), rel=1e-12)


@pytest.mark.parametrize("shape", [(300, 200, 3), (9, 6, 5)], ids=["thin", "dense"])
def test_norm_stays_accurate_where_the_columns_cancel(make, np64, rng, shape):
    pair = make.pair(rng, *shape)
    step = 1e-9 * make.tensor(rng, shape[0], shape[2])
    moved = Pair(pair.A, pair.B + step)
    want = np.linalg.norm((moved.B - pair.B).numpy() @ pair.A.numpy())
    # The trace of Gram matrices would leave an error of √eps, ten times this norm.
    assert algebra.norm(algebra.stack([moved, pair], [1.0, -1.0])) == pytest.approx(want, rel=1e-5)
    assert algebra.norm(algebra.stack([pair, pair], [1.0, -1.0])) < 1e-13 * algebra.norm(pair)


def test_effective_rank_counts_equal_directions(make, rng):
    for k in (1, 3, 5):
        assert algebra.effective_rank(make.spectrum(rng, 9, 8, [0.3] * k)) == pytest.approx(k, rel=1e-12)


def test_effective_rank_is_exp_of_the_entropy_and_knows_no_unit(make, rng):
    pair = make.spectrum(rng, 9, 8, [3.0, 1.0])
    want = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert algebra.effective_rank(pair) == pytest.approx(want, rel=1e-12)
    assert algebra.effective_rank(Pair(pair.A, pair.B, 1e-30)) == pytest.approx(want, rel=1e-12)


def test_a_zero_update_has_no_size(make, rng):
    zero = Pair(make.tensor(rng, 3, 5), torch.zeros(4, 3, dtype=F64))
    assert algebra.effective_rank(zero) == 0.0
    assert algebra.norm(zero) == 0.0
    assert not algebra.singular_values(zero).any()
