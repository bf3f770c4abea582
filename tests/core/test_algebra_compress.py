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


# --- singular values ----------------------------------------------------------------------------------------


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
    assert np64.orthonormal_rows(best.A)
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
    assert np64.orthonormal_rows(best.A)
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
def test_compress_of_nothing_is_one_direction_that_can_learn(make, rng, shape, zero, np64):
    pair = make.pair(rng, *shape)
    nothing = Pair(pair.A * (zero == "B"), pair.B * (zero == "A"))
    best = algebra.compress(nothing)
    assert best.rank == 1
    assert np64.orthonormal_rows(best.A)
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
def test_compress_drops_what_is_below_float32s_rounding_and_nothing_else(make, rng, dtype):
    eps = torch.finfo(torch.float32).eps
    eye = torch.eye(6, 8, dtype=dtype)
    B = torch.diag(torch.tensor([1.0, 0.5, 4 * eps, 2 * eps, eps / 4, 0.0], dtype=dtype))
    assert algebra.compress(Pair(eye, B)).rank == 4


@pytest.mark.parametrize("call", ["compress", "weighted_sum"])
def test_a_bfloat16_adapter_keeps_its_small_directions(make, np64, rng, call):
    # bfloat16 rounds at 0.4 %, yet holds a direction of 0.1 % of the largest to 0.4 % of its own size.
    exact = make.spectrum(rng, 30, 40, [1.0, 1e-2, 1e-3, 1e-5])
    pair = Pair(exact.A.bfloat16(), exact.B.bfloat16())
    sigma = np.linalg.svd(np64.delta(pair), compute_uv=False)[:4]
    best = algebra.compress(pair) if call == "compress" else algebra.weighted_sum([pair, pair], [0.5, 0.5])
    assert (best.rank, best.A.dtype) == (4, torch.bfloat16)
    assert best.B.double().norm(dim=0).tolist() == pytest.approx(sigma, rel=1e-2)


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


@EVERY_SHAPE
def test_every_direction_can_learn_after_compress_and_pad_orthonormal(make, rng, shape):
    d_out, d_in, rank = shape
    start = algebra.pad_orthonormal(algebra.compress(make.pair(rng, *shape), 2), rank + 2, rng)
    A, B = start.A.clone().requires_grad_(), start.B.clone().requires_grad_()
    ((B @ A) * make.tensor(rng, d_out, d_in)).sum().backward()
    assert (B.grad.norm(dim=0) > 1e-6).all()
