import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core import algebra
from fedlora.core.adapter import Adapter
from fedlora.errors import IncompatibleUpdates

F64 = torch.float64
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
dims, ranks, seeds = st.integers(1, 12), st.integers(1, 16), st.integers(0, 2**32 - 1)
scales = st.floats(0.05, 20).flatmap(lambda s: st.sampled_from([s, -s]))


# --- weights ------------------------------------------------------------------------------------------------


@given(
    st.lists(st.just(0.0) | st.floats(1e-3, 1e6), min_size=1, max_size=8).filter(any), st.floats(0.01, 1e3)
)
def test_normalised_weights_sum_to_one_and_know_no_unit(weights, unit):
    shares = algebra.normalised(weights)
    assert math.fsum(shares) == pytest.approx(1, abs=1e-14)
    assert shares == pytest.approx(algebra.normalised([unit * w for w in weights]), abs=1e-14)
    assert [s == 0 for s in shares] == [w == 0 for w in weights]


@pytest.mark.parametrize(
    "weights",
    [
        [],
        [0.0],
        [0.0, 0.0],
        [1.0, -0.5],
        [2.0, -1.0, 1.0],
        [1.0, math.nan],
        [math.inf, 1.0],
        [math.inf, -math.inf],
    ],
    ids=str,
)
def test_weights_that_are_no_weights_are_refused(weights):
    with pytest.raises(IncompatibleUpdates, match="weights >= 0"):
        algebra.normalised(weights)


# --- means --------------------------------------------------------------------------------------------------


@DTYPES
def test_mean_tensors_is_summed_in_float64_and_rounded_once(make, rng, dtype):
    tensors, weights = [make.tensor(rng, 5, 4, dtype=dtype) for _ in range(40)], rng.random(40) * 100
    mean = algebra.mean_tensors(tensors, list(weights))
    want = sum(w * t.double() for w, t in zip(weights, tensors, strict=True))
    assert mean.dtype == dtype
    assert torch.allclose(mean.double(), want.to(dtype).double(), rtol=1e-12, atol=0)


def test_mean_tensors_takes_weights_as_they_are():
    assert algebra.mean_tensors([torch.ones(2), torch.ones(2)], [2.0, 3.0]).tolist() == [5.0, 5.0]


@pytest.mark.parametrize(
    "shapes",
    [((4, 3), (1, 3)), ((1, 3), (4, 3)), ((4, 3), (4, 1)), ((4, 3), (3,)), ((3,), ()), ((4, 3), (3, 4))],
)
def test_mean_tensors_never_broadcasts(shapes):
    # Flower broadcasts ranks (8, 1) in one order and raises in the other (peers.md, 10).
    with pytest.raises((IncompatibleUpdates, RuntimeError)):
        algebra.mean_tensors([torch.ones(shape) for shape in shapes], [0.5, 0.5])


def test_mean_extras_averages_every_name_by_itself():
    extras = [
        {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(4.0)},
        {"b": torch.tensor(8.0), "w": torch.zeros(2)},
    ]
    mean = algebra.mean_extras(extras, [0.25, 0.75])
    assert mean["w"].tolist() == [0.25, 0.5]
    assert mean["b"].item() == 7.0
    assert algebra.mean_extras([{}, {}], [0.5, 0.5]) == {}


@given(seed=seeds, d_out=dims, d_in=dims, rank=ranks, clients=st.integers(1, 4))
def test_mean_factors_of_one_scale_averages_each_factor(make, np64, seed, d_out, d_in, rank, clients):
    rng = np.random.default_rng(seed)
    pairs, w = (
        [make.pair(rng, d_out, d_in, rank, 3.0) for _ in range(clients)],
        list(rng.dirichlet([1] * clients)),
    )
    mean = algebra.mean_factors(pairs, w)
    assert mean.scale == 3.0
    assert np64.close(mean.A, sum(x * p.A.numpy() for x, p in zip(w, pairs, strict=True)), 1e-14)
    assert np64.close(mean.B, sum(x * p.B.numpy() for x, p in zip(w, pairs, strict=True)), 1e-14)


def test_mean_factors_puts_another_scale_on_B(make, np64, rng):
    one, two = make.pair(rng, 5, 7, 3, 2.0), make.pair(rng, 5, 7, 3, 8.0)
    mean = algebra.mean_factors([one, two], [0.25, 0.75])
    assert mean.scale == 2.0
    assert np64.close(mean.A, 0.25 * one.A + 0.75 * two.A, 1e-14)
    assert np64.close(mean.B, 0.25 * one.B + 0.75 * 4 * two.B, 1e-14)


@pytest.mark.parametrize("scale", [0.3, 2.0, 5.0, -5.0, 0.0])
def test_one_pair_with_all_the_weight_keeps_its_product_in_any_scale(make, np64, rng, scale):
    other, pair = make.pair(rng, 5, 7, 3, 2.0), make.pair(rng, 5, 7, 3, scale)
    assert np64.close(np64.delta(algebra.mean_factors([other, pair], [0.0, 1.0])), np64.delta(pair), 1e-14)


def test_mean_factors_of_other_scales_rounds_once_too(make, rng):
    pairs = [make.pair(rng, 40, 50, 8, scale, torch.bfloat16) for scale in (1.0, 3.0, 0.7)]
    want = sum(w * p.scale * p.B.double() for w, p in zip((0.2, 0.3, 0.5), pairs, strict=True))
    assert torch.equal(algebra.mean_factors(pairs, [0.2, 0.3, 0.5]).B, want.to(torch.bfloat16))


# --- one pair in other clothes ------------------------------------------------------------------------------


@given(seed=seeds, d_out=dims, d_in=dims, rank=ranks, scale=scales)
def test_dense_is_scale_times_B_times_A(make, np64, seed, d_out, d_in, rank, scale):
    pair = make.pair(np.random.default_rng(seed), d_out, d_in, rank, scale)
    assert np64.close(algebra.dense(pair), np64.delta(pair), 1e-14)


@DTYPES
def test_dense_is_computed_in_float64_and_rounded_once(make, np64, rng, dtype):
    pair = make.pair(rng, 20, 30, 12, 0.3, dtype)
    got = algebra.dense(pair)
    assert got.dtype == dtype
    assert torch.equal(got, (0.3 * (pair.B.double() @ pair.A.double())).to(dtype))


@given(seed=seeds, d_out=dims, d_in=dims, rank=ranks, old=scales, new=scales)
def test_rescale_keeps_the_update_and_A(make, np64, seed, d_out, d_in, rank, old, new):
    pair = make.pair(np.random.default_rng(seed), d_out, d_in, rank, old)
    other = algebra.rescale(pair, new)
    assert other.scale == new
    assert torch.equal(other.A, pair.A)
    assert np64.close(np64.delta(other), np64.delta(pair), 1e-13)


@DTYPES
def test_rescale_is_computed_in_float64_and_rounded_once(make, rng, dtype):
    pair = make.pair(rng, 200, 30, 12, 1.0, dtype)
    got = algebra.rescale(pair, 3.0)
    assert got.B.dtype == dtype
    assert torch.equal(got.B, (pair.B.double() * (1 / 3)).to(dtype))


def test_no_update_can_be_expressed_with_scale_zero(make, rng):
    pair = make.pair(rng, 4, 3, 2)
    for express in (algebra.rescale, lambda p, s: algebra.compress(p, scale=s)):
        with pytest.raises(IncompatibleUpdates, match="scale 0"):
            express(pair, 0.0)


@given(seed=seeds, d_out=dims, d_in=dims, rank=ranks, more=st.integers(0, 9), scale=scales)
def test_truncate_undoes_pad_and_pad_keeps_the_update(make, np64, seed, d_out, d_in, rank, more, scale):
    pair = make.pair(np.random.default_rng(seed), d_out, d_in, rank, scale)
    padded = algebra.pad(pair, rank + more)
    assert (padded.rank, padded.scale, padded.shape) == (rank + more, scale, (d_out, d_in))
    assert not padded.A[rank:].any()
    assert not padded.B[:, rank:].any()
    assert np64.close(np64.delta(padded), np64.delta(pair), 1e-14)
    assert Adapter({"m": algebra.truncate(padded, rank)}).digest() == Adapter({"m": pair}).digest()


def test_truncate_keeps_the_first_directions_and_at_most_all(make, rng):
    pair = make.pair(rng, 5, 6, 4, 2.0)
    cut = algebra.truncate(pair, 3)
    assert torch.equal(cut.A, pair.A[:3])
    assert torch.equal(cut.B, pair.B[:, :3])
    assert cut.scale == 2.0
    assert algebra.truncate(pair, 9).rank == 4


def test_padding_to_a_smaller_rank_is_refused(make, rng):
    with pytest.raises(IncompatibleUpdates, match="rank 4 to the smaller rank 3"):
        algebra.pad(make.pair(rng, 5, 6, 4), 3)
