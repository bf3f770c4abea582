"""Pairs with a core M between their factors, and sums that grow round by round."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core import algebra
from fedlora.core.adapter import Adapter, Pair
from fedlora.errors import IncompatibleUpdates

F64 = torch.float64
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
dims, ranks, seeds = st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**32 - 1)
scales = st.floats(0.05, 20).flatmap(lambda s: st.sampled_from([s, -s]))


def with_core(make, rng, *shape: int, scale: float = 0.7, dtype: torch.dtype = F64) -> Pair:
    pair = make.pair(rng, *shape, scale, dtype)
    return replace(pair, M=make.tensor(rng, pair.rank, pair.rank, dtype=dtype))


def bits(pair: Pair) -> str:
    return Adapter({"": pair}).digest()


# --- cores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [torch.eye(3), torch.eye(2)[:1], torch.ones(2), torch.eye(2).double()])
def test_a_core_that_does_not_fit_is_refused(M):
    with pytest.raises(IncompatibleUpdates, match=r"core M \(2, 2\)"):
        Pair(torch.ones(2, 4), torch.ones(5, 2), 1.0, M)


def test_a_core_is_one_of_the_factors_and_in_the_digest(make, rng):
    pair = with_core(make, rng, 5, 4, 2)
    assert [name for name, _ in pair.factors()] == ["A", "B", "M"]
    assert [name for name, _ in replace(pair, M=None).factors()] == ["A", "B"]
    adapter = Adapter({"m": pair}, {"head": pair.A})
    assert [name for name, _ in adapter.tensors()] == ["m.A", "m.B", "m.M", "head"]
    one = replace(pair, M=torch.eye(2, dtype=F64))
    assert len({bits(pair), bits(replace(pair, M=None)), bits(one), bits(replace(pair, M=2 * pair.M))}) == 4


@given(seed=seeds, d_out=dims, d_in=dims, rank=ranks, scale=scales)
def test_every_function_sees_B_M_A(make, np64, seed, d_out, d_in, rank, scale):
    rng = np.random.default_rng(seed)
    pair = with_core(make, rng, d_out, d_in, rank, scale=scale)
    other = make.pair(rng, d_out, d_in, 2, 0.5)
    want = scale * (pair.B @ pair.M @ pair.A).numpy()
    plain = pair.plain()
    assert plain.M is None
    assert plain.scale == scale
    full = min(d_out, d_in)
    same = {
        "plain": plain,
        "rescale": algebra.rescale(pair, -3.0),
        "pad": algebra.pad(pair, rank + 2),
        "truncate": algebra.truncate(pair, rank),
        "refill": algebra.refill(pair, rank + 2, rng),
        "stack": algebra.stack([pair], [1.0]),
        "accumulate": algebra.accumulate(None, pair),
        "compress": algebra.compress(pair),
        "weighted_sum": algebra.weighted_sum([pair], [1.0]),
        "mean_factors": algebra.mean_factors([pair], [1.0], 2.0),
        "residual": algebra.residual([pair], [1.0], replace(other, B=0 * other.B)),
    }
    for name, found in same.items():
        assert np64.close(np64.delta(found), want, 1e-11), name
    assert np64.close(algebra.dense(pair), want, 1e-12)
    assert np64.close(np64.delta(algebra.negative(pair)), -want, 1e-12)
    length = np.linalg.norm(want)
    assert algebra.norm(pair) == pytest.approx(length, rel=1e-10)
    sigma = np.linalg.svd(want, compute_uv=False)[: min(rank, full)]
    assert np64.close(algebra.singular_values(pair), sigma, 1e-10)
    assert algebra.effective_rank(pair) == pytest.approx(algebra.effective_rank(plain), rel=1e-8)
    error, size = algebra.error_and_norm([pair, other], [0.3, 0.7], other)
    rest = 0.3 * (want - np64.delta(other))
    assert error == pytest.approx(np.linalg.norm(rest), rel=1e-9, abs=1e-12)
    assert size == pytest.approx(np.linalg.norm(rest + np64.delta(other)), rel=1e-9)


def test_a_cut_through_a_core_is_that_of_the_product(make, np64, rng):
    pair = with_core(make, rng, 6, 5, 4)
    left, A = (pair.B @ pair.M).numpy(), pair.A.numpy()
    first, rest = algebra.truncate(pair, 2), algebra.beyond(pair, 2)
    assert (first.M, rest.M) == (None, None)
    assert np64.close(np64.delta(first), 0.7 * left[:, :2] @ A[:2])
    assert np64.close(np64.delta(first) + np64.delta(rest), np64.delta(pair))
    assert np64.close(np64.delta(algebra.stack([pair, pair], [0.25, 0.75])), np64.delta(pair))


@DTYPES
def test_a_core_is_absorbed_in_float64_and_rounded_once(make, rng, dtype):
    pair = with_core(make, rng, 30, 4, 5, dtype=dtype)
    assert torch.equal(pair.plain().B, (pair.B.double() @ pair.M.double()).to(dtype))
    assert pair.plain().A.dtype == pair.plain().B.dtype == dtype


# --- sums that grow -----------------------------------------------------------------------------------------


@given(seed=seeds, d_out=dims, d_in=dims, gains=st.lists(st.tuples(ranks, scales), min_size=1, max_size=5))
def test_accumulate_is_the_sum_and_never_outgrows_the_layer(make, np64, seed, d_out, d_in, gains):
    rng = np.random.default_rng(seed)
    total, want, rank = None, np.zeros((d_out, d_in)), 0
    for r, s in gains:
        gain = make.pair(rng, d_out, d_in, r, s)
        total, want = algebra.accumulate(total, gain), want + np64.delta(gain)
        assert (total.scale, total.M) == (1.0, None)
        assert np64.close(np64.delta(total), want, 1e-12)
        rank = min(rank + r, d_out, d_in)
        assert total.rank == rank  # factors while they are smaller, then the sum itself


def test_accumulate_is_a_stack_below_the_smaller_side_and_the_sum_from_there(make, rng):
    one, two = make.pair(rng, 7, 4, 2, 3.0), make.pair(rng, 7, 4, 1, 0.5)
    first = algebra.accumulate(None, one)
    assert bits(first) == bits(algebra.stack([one], [1.0]))
    assert bits(algebra.accumulate(first, two)) == bits(algebra.stack([first, two], [1.0, 1.0]))
    third = algebra.accumulate(algebra.accumulate(first, two), two)
    assert torch.equal(third.A, torch.eye(4, dtype=F64))
    torch.testing.assert_close(third.B, 3 * one.B @ one.A + 2 * 0.5 * two.B @ two.A, rtol=1e-12, atol=1e-12)


@DTYPES
def test_accumulate_keeps_the_dtype_and_depends_on_bits_alone(make, rng, dtype):
    for r in (1, 5):
        total, gain = make.pair(rng, 7, 4, r, 2.0, dtype), make.pair(rng, 7, 4, 2, 1.0, dtype)
        copies = [replace(p, A=p.A.clone(), B=p.B.T.contiguous().T) for p in (total, gain)]
        found = algebra.accumulate(total, gain)
        assert found.A.dtype == found.B.dtype == dtype
        assert bits(found) == bits(algebra.accumulate(*copies))


@DTYPES
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 4), (4, 1)])
def test_a_dense_matrix_is_a_pair_bit_for_bit(make, rng, shape, dtype):
    matrix = make.tensor(rng, *shape, dtype=dtype)
    pair = algebra.of_dense(matrix)
    assert (pair.shape, pair.rank, pair.scale) == (shape, min(shape), 1.0)
    assert torch.equal(algebra.dense(pair), matrix)
    assert torch.equal(pair.B @ pair.A, matrix)


@DTYPES
def test_a_pair_and_its_negative_cancel_to_the_last_bit(make, rng, dtype):
    pair = make.pair(rng, 5, 6, 2, 0.5, dtype)
    gone = algebra.negative(pair)
    assert (gone.scale, gone.A.dtype, gone.B.dtype) == (1.0, dtype, dtype)
    assert torch.equal(algebra.dense(gone), -algebra.dense(pair))
    assert not (algebra.dense(pair) + algebra.dense(gone)).any()
    gone.A.zero_()
    assert pair.A.any()
