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


@given(seed=seeds, d_out=dims, d_in=st.integers(1, 9), rank=ranks, target=st.integers(1, 16))
def test_pad_orthonormal_adds_orthonormal_rows_and_keeps_the_update(
    make, np64, seed, d_out, d_in, rank, target
):
    rng = np.random.default_rng(seed)
    pair = algebra.compress(make.pair(rng, d_out, d_in, rank, 2.0))
    full = algebra.pad_orthonormal(pair, target, rng)
    assert full.rank == max(target, pair.rank)
    assert full.scale == 2.0
    assert torch.equal(full.A[: pair.rank], pair.A)
    assert torch.equal(full.B[:, : pair.rank], pair.B)
    assert not full.B[:, pair.rank :].any()
    assert np64.close(np64.delta(full), np64.delta(pair), 1e-12)
    assert np64.orthonormal_rows(full.A[:d_in])
    assert np64.close(full.A.norm(dim=1), np.ones(full.rank), 1e-12)


def test_pad_orthonormal_is_orthogonal_to_any_rows_also_dependent_or_zero_ones(make, rng, np64):
    A = make.tensor(rng, 3, 10)
    A[1], A[2] = 2 * A[0], 0
    full = algebra.pad_orthonormal(Pair(A, make.tensor(rng, 4, 3)), 7, rng)
    assert (full.A[3:] @ A.T).abs().max() < 1e-12
    assert np64.orthonormal_rows(full.A[3:])


def test_pad_orthonormal_depends_on_the_generator_alone(make, rng):
    pair = make.pair(rng, 5, 9, 2)
    one, two, other = (algebra.pad_orthonormal(pair, 12, np.random.default_rng(seed)).A for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@DTYPES
def test_pad_orthonormal_keeps_the_dtype(make, rng, dtype):
    full = algebra.pad_orthonormal(make.pair(rng, 5, 4, 2, dtype=dtype), 6, rng)
    assert full.A.dtype == full.B.dtype == dtype
