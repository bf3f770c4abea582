import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora import algebra
from fedlora.adapter import Adapter, Pair
from fedlora.errors import IncompatibleUpdates

F64 = torch.float64
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
dims, ranks, seeds = st.integers(1, 12), st.integers(1, 16), st.integers(0, 2**32 - 1)
scales = st.floats(0.05, 20).flatmap(lambda s: st.sampled_from([s, -s]))

some = st.lists(st.tuples(ranks, scales), min_size=1, max_size=4)

# (d_out, d_in, rank): thin QRs where the rank is small, the dense matrix where it is not.
SHAPES = {
    "thin wide": (30, 50, 4),
    "thin tall": (50, 30, 4),
    "thin square": (40, 40, 5),
    "dense wide": (6, 9, 5),
    "dense tall": (9, 6, 5),
    "rank of d": (9, 6, 6),
    "rank over d": (6, 9, 17),
    "rank one": (7, 5, 1),
    "row": (1, 8, 3),
    "column": (8, 1, 3),
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def rows_are_orthonormal(A: torch.Tensor, tol: float = 1e-12) -> bool:
    return bool((A.double() @ A.double().T - torch.eye(len(A), dtype=F64)).abs().max() < tol)


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


def test_mean_factors_absorbs_another_scale_by_its_root_on_both_factors(make, np64, rng):
    one, two = make.pair(rng, 5, 7, 3, 2.0), make.pair(rng, 5, 7, 3, 8.0)
    mean = algebra.mean_factors([one, two], [0.25, 0.75])
    assert mean.scale == 2.0
    assert np64.close(mean.A, 0.25 * one.A + 0.75 * 2 * two.A, 1e-14)
    assert np64.close(mean.B, 0.25 * one.B + 0.75 * 2 * two.B, 1e-14)


@pytest.mark.parametrize("scale", [0.3, 2.0, 5.0, -5.0, 0.0])
def test_one_pair_with_all_the_weight_keeps_its_product_in_any_scale(make, np64, rng, scale):
    other, pair = make.pair(rng, 5, 7, 3, 2.0), make.pair(rng, 5, 7, 3, scale)
    assert np64.close(np64.delta(algebra.mean_factors([other, pair], [0.0, 1.0])), np64.delta(pair), 1e-14)


def test_mean_factors_of_other_scales_rounds_once_too(make, rng):
    pairs = [make.pair(rng, 40, 50, 8, scale, torch.bfloat16) for scale in (1.0, 3.0, 0.7)]
    want = sum(w * math.sqrt(p.scale) * p.A.double() for w, p in zip((0.2, 0.3, 0.5), pairs, strict=True))
    assert torch.equal(algebra.mean_factors(pairs, [0.2, 0.3, 0.5]).A, want.to(torch.bfloat16))


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
    assert rows_are_orthonormal(total.A)
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


@EVERY_SHAPE
def test_singular_values_are_those_of_the_dense_update(make, np64, rng, shape):
    pair = make.pair(rng, *shape, -0.7)
    got = algebra.singular_values(pair)
    want = np.linalg.svd(np64.delta(pair), compute_uv=False)
    assert got.dtype == F64
    assert list(got) == sorted(got, reverse=True)
    assert np64.close(np.pad(got, (0, len(want) - len(got))), want, 1e-12)


@EVERY_SHAPE
def test_there_are_at_most_as_many_singular_values_as_rank_and_sides(make, rng, shape):
    assert len(algebra.singular_values(make.pair(rng, *shape))) <= min(shape)


def test_no_more_singular_values_than_the_rank_where_the_dense_path_is_cheaper(make, rng):
    assert len(algebra.singular_values(make.pair(rng, 16, 16, 15))) == 15


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


# --- the best approximation ---------------------------------------------------------------------------------


@EVERY_SHAPE
@pytest.mark.parametrize("keep", [1, 2, 4, 100])
def test_compress_is_the_dense_svd_truncated(make, np64, rng, shape, keep):
    pair = make.pair(rng, *shape, 0.6)
    D = np64.delta(pair)
    sigma = np.linalg.svd(D, compute_uv=False)
    best = algebra.compress(pair, keep)
    assert best.rank == min(keep, *shape)
    assert best.scale == 0.6
    assert np64.close(np64.delta(best), np64.best(D, keep))
    assert np64.close(algebra.singular_values(best)[: best.rank], sigma[: best.rank])
    tail = math.sqrt((sigma[keep:] ** 2).sum())
    assert np.linalg.norm(D - np64.delta(best)) == pytest.approx(tail, abs=1e-10)


@EVERY_SHAPE
def test_compress_splits_as_US_and_V_with_orthonormal_rows(make, np64, rng, shape):
    best = algebra.compress(make.pair(rng, *shape, 3.0), scale=0.5)
    sigma = algebra.singular_values(best)[: best.rank]
    assert best.scale == 0.5
    assert rows_are_orthonormal(best.A)
    # Columns of B are orthogonal, of length σ/s, the largest first.
    assert np64.close(best.B.T @ best.B, torch.diag((sigma / 0.5) ** 2))


@given(seed=seeds, d_out=dims, d_in=dims, rank=ranks, keep=ranks, old=scales, new=scales)
def test_compress_is_optimal_for_any_shape_rank_and_scale(
    make, np64, seed, d_out, d_in, rank, keep, old, new
):
    pair = make.pair(np.random.default_rng(seed), d_out, d_in, rank, old)
    best = algebra.compress(pair, keep, new)
    assert best.scale == new
    assert best.rank <= min(keep, rank, d_out, d_in)
    assert best.shape == pair.shape
    assert rows_are_orthonormal(best.A)
    assert np64.close(np64.delta(best), np64.best(np64.delta(pair), keep))


def test_compress_without_a_rank_keeps_the_update(make, np64, rng):
    for shape in SHAPES.values():
        pair = make.pair(rng, *shape)
        assert np64.close(np64.delta(algebra.compress(pair)), np64.delta(pair), 1e-12)


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (5, 4)])
@pytest.mark.parametrize("copies", [2, 8])
def test_compress_of_a_rank_deficient_stack_keeps_only_what_there_is(make, np64, shape, copies):
    for seed in range(20):
        pair = make.pair(np.random.default_rng(seed), *shape, 3)
        best = algebra.compress(algebra.stack([pair] * copies, [1 / copies] * copies))
        assert best.rank == 3
        assert np64.close(np64.delta(best), np64.delta(pair), 1e-12)


@pytest.mark.parametrize("shape", [(30, 50, 4), (6, 9, 17)], ids=["thin", "dense"])
@pytest.mark.parametrize("zero", ["A", "B", "both"])
def test_compress_of_nothing_is_one_direction_that_can_learn(make, rng, shape, zero):
    pair = make.pair(rng, *shape)
    nothing = Pair(pair.A * (zero == "B"), pair.B * (zero == "A"))
    best = algebra.compress(nothing)
    assert best.rank == 1
    assert rows_are_orthonormal(best.A)
    assert not best.B.any()


@DTYPES
@pytest.mark.parametrize("shape", [(30, 50, 4), (9, 6, 17)], ids=["thin", "dense"])
def test_compress_keeps_the_dtype_and_is_as_good_as_it_allows(make, np64, rng, dtype, shape):
    pair = make.pair(rng, *shape, 0.5, dtype)
    best = algebra.compress(pair, 3)
    assert best.A.dtype == best.B.dtype == dtype
    assert np64.close(
        np64.delta(best), np64.best(np64.delta(pair), 3), max(1e-12, 4 * torch.finfo(dtype).eps)
    )


def test_compress_of_float32_is_computed_in_float64(make, np64, rng):
    # float32 would lose the small σ in the rounding of the largest.
    exact = make.spectrum(rng, 30, 40, [1.0, 1e-3, 1e-6])
    pair = Pair(exact.A.float(), exact.B.float())
    sigma = np.linalg.svd(np64.delta(pair), compute_uv=False)[:3]
    best = algebra.compress(pair)
    assert best.B.double().norm(dim=0).tolist() == pytest.approx(sigma, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compress_drops_what_the_dtype_cannot_hold_and_nothing_else(make, rng, dtype):
    eps = torch.finfo(dtype).eps
    eye = torch.eye(6, 8, dtype=dtype)
    B = torch.diag(torch.tensor([1.0, 0.5, 4 * eps, 2 * eps, eps / 4, 0.0], dtype=dtype))
    assert algebra.compress(Pair(eye, B)).rank == 4


@DTYPES
def test_what_compress_drops_is_below_the_rounding_also_together(make, np64, dtype):
    # One direction under eps·σ_1 is noise; four hundred are a seventh of an update in bfloat16.
    eps = torch.finfo(dtype).eps
    sigma = torch.tensor([1.0] + [0.9 * eps] * 400, dtype=dtype)
    pair = Pair(torch.eye(401, dtype=dtype), torch.diag(sigma))
    error, size = algebra.error_and_norm([pair], [1.0], algebra.compress(pair))
    assert error <= max(2 * eps, 1e-14) * size


@EVERY_SHAPE
def test_compress_returns_tensors_that_can_be_saved(make, rng, shape):
    best = algebra.compress(make.pair(rng, *shape), 3)
    assert best.A.is_contiguous()
    assert best.B.is_contiguous()


@given(seed=seeds, many=st.lists(st.tuples(st.integers(1, 5), scales), min_size=1, max_size=4), keep=ranks)
def test_the_gauge_of_the_clients_factors_changes_nothing(make, np64, seed, many, keep):
    rng = np.random.default_rng(seed)
    pairs, w = [make.pair(rng, 7, 9, r, s) for r, s in many], list(rng.dirichlet([1] * len(many)))
    turned = []
    for pair in pairs:
        G = make.tensor(rng, pair.rank, pair.rank) + 4 * torch.eye(pair.rank, dtype=F64)
        turned.append(Pair(torch.linalg.solve(G, pair.A), pair.B @ G, pair.scale))
    sigma = np.linalg.svd(np64.sum(pairs, w), compute_uv=False)
    if keep < len(sigma) and sigma[keep - 1] - sigma[keep] < 1e-3 * sigma[0]:
        return  # a tie at the cut: the best approximation is not one
    one, two = (algebra.compress(algebra.stack(those, w), keep) for those in (pairs, turned))
    assert np64.close(np64.delta(one), np64.delta(two), 1e-9)


def test_a_huge_layer_is_compressed_without_its_dense_matrix(make, rng):
    d = 2_000_000  # its dense matrix would take 32 TB
    pair = make.pair(rng, d, d, 1)
    best = algebra.compress(algebra.stack([pair, pair], [0.5, 0.5]), 1)
    assert algebra.norm(best) == pytest.approx(float(pair.A.norm() * pair.B.norm()), rel=1e-12)


def test_a_stack_as_wide_as_the_layer_takes_the_cheaper_dense_path(make, np64, rng, monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("a QR of a stack that is wider than the layer")

    monkeypatch.setattr(torch.linalg, "qr", refused)
    pair = make.pair(rng, 6, 50, 7)
    assert np64.close(np64.delta(algebra.compress(pair, 3)), np64.best(np64.delta(pair), 3))


@pytest.mark.parametrize("shape", [(30, 50, 4), (6, 9, 17)], ids=["thin", "dense"])
def test_an_svd_that_does_not_converge_is_tried_once_more(make, np64, rng, monkeypatch, shape):
    svd, calls = torch.linalg.svd, []

    def stubborn(matrix, **kwargs):
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(matrix, **kwargs)

    pair = make.pair(rng, *shape)
    monkeypatch.setattr(torch.linalg, "svd", stubborn)
    best = algebra.compress(pair)
    assert len(calls) == 2
    assert not torch.equal(*calls)
    assert np64.close(np64.delta(best), np64.delta(pair), 1e-11)


# --- room to learn ------------------------------------------------------------------------------------------


@given(seed=seeds, d_out=dims, d_in=st.integers(1, 9), rank=ranks, target=st.integers(1, 16))
def test_refill_adds_orthonormal_rows_and_keeps_the_update(make, np64, seed, d_out, d_in, rank, target):
    rng = np.random.default_rng(seed)
    pair = algebra.compress(make.pair(rng, d_out, d_in, rank, 2.0))
    full = algebra.refill(pair, target, rng)
    assert full.rank == max(target, pair.rank)
    assert full.scale == 2.0
    assert torch.equal(full.A[: pair.rank], pair.A)
    assert torch.equal(full.B[:, : pair.rank], pair.B)
    assert not full.B[:, pair.rank :].any()
    assert np64.close(np64.delta(full), np64.delta(pair), 1e-12)
    assert rows_are_orthonormal(full.A[:d_in])
    assert np64.close(full.A.norm(dim=1), np.ones(full.rank), 1e-12)


def test_refill_is_orthogonal_to_any_rows_also_dependent_or_zero_ones(make, rng):
    A = make.tensor(rng, 3, 10)
    A[1], A[2] = 2 * A[0], 0
    full = algebra.refill(Pair(A, make.tensor(rng, 4, 3)), 7, rng)
    assert (full.A[3:] @ A.T).abs().max() < 1e-12
    assert rows_are_orthonormal(full.A[3:])


def test_refill_depends_on_the_generator_alone(make, rng):
    pair = make.pair(rng, 5, 9, 2)
    one, two, other = (algebra.refill(pair, 12, np.random.default_rng(seed)).A for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@DTYPES
def test_refill_keeps_the_dtype(make, rng, dtype):
    full = algebra.refill(make.pair(rng, 5, 4, 2, dtype=dtype), 6, rng)
    assert full.A.dtype == full.B.dtype == dtype


@EVERY_SHAPE
def test_every_direction_can_learn_after_compress_and_refill(make, rng, shape):
    d_out, d_in, rank = shape
    start = algebra.refill(algebra.compress(make.pair(rng, *shape), 2), rank + 2, rng)
    A, B = start.A.clone().requires_grad_(), start.B.clone().requires_grad_()
    ((B @ A) * make.tensor(rng, d_out, d_in)).sum().backward()
    assert (B.grad.norm(dim=0) > 1e-6).all()


# --- purity -------------------------------------------------------------------------------------------------

CALLS = {
    "mean_tensors": lambda p, q, rng: algebra.mean_tensors([p.A, q.A], [0.5, 0.5]),
    "mean_extras": lambda p, q, rng: algebra.mean_extras([{"w": p.A}, {"w": q.A}], [0.5, 0.5]),
    "mean_factors": lambda p, q, rng: algebra.mean_factors([p, q], [0.5, 0.5]),
    "rescale": lambda p, q, rng: algebra.rescale(p, 7.0),
    "stack": lambda p, q, rng: algebra.stack([p, q], [0.5, 0.5]),
    "residual": lambda p, q, rng: algebra.residual([p], [0.5], q),
    "error_and_norm": lambda p, q, rng: algebra.error_and_norm([p], [0.5], q),
    "weighted_sum": lambda p, q, rng: algebra.weighted_sum([p, q], [0.5, 0.5], 5.0),
    "dense": lambda p, q, rng: algebra.dense(p),
    "pad": lambda p, q, rng: algebra.pad(p, 9),
    "truncate": lambda p, q, rng: algebra.truncate(p, 1),
    "norm": lambda p, q, rng: algebra.norm(p),
    "singular_values": lambda p, q, rng: algebra.singular_values(p),
    "effective_rank": lambda p, q, rng: algebra.effective_rank(p),
    "compress": lambda p, q, rng: algebra.compress(p, 2, 5.0),
    "refill": lambda p, q, rng: algebra.refill(p, 9, rng),
}


@DTYPES
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_is_mutated_by(make, rng, call, dtype):
    both = Adapter({"p": make.pair(rng, 5, 6, 3, 2.0, dtype), "q": make.pair(rng, 5, 6, 3, 0.5, dtype)})
    before = both.digest()
    call(both.pairs["p"], both.pairs["q"], rng)
    assert both.digest() == before


def test_every_public_function_is_in_the_list_of_pure_ones():
    own = {
        n
        for n, f in vars(algebra).items()
        if callable(f) and getattr(f, "__module__", "") == algebra.__name__
    }
    assert {name for name in own if not name.startswith("_")} == {*CALLS, "normalised"}
