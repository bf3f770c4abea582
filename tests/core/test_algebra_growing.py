"""Sums that grow round by round, dense matrices as pairs, and negatives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core import algebra
from fedlora.core.adapter import Adapter, Pair

F64 = torch.float64
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
dims, ranks, seeds = st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**32 - 1)
scales = st.floats(0.05, 20).flatmap(lambda s: st.sampled_from([s, -s]))


def bits(pair: Pair) -> str:
    return Adapter({"": pair}).digest()


@given(seed=seeds, d_out=dims, d_in=dims, gains=st.lists(st.tuples(ranks, scales), min_size=1, max_size=5))
def test_accumulate_is_the_sum_and_never_outgrows_the_layer(make, np64, seed, d_out, d_in, gains):
    rng = np.random.default_rng(seed)
    total, want, rank = None, np.zeros((d_out, d_in)), 0
    for r, s in gains:
        gain = make.pair(rng, d_out, d_in, r, s)
        total, want = algebra.accumulate(total, gain), want + np64.delta(gain)
        assert total.scale == 1.0
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
