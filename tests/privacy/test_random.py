import math

import numpy as np
import pytest
import torch
from scipy import stats

from fedlora.privacy import Source
from fedlora.privacy.random import PAIRS


def test_normals_are_normal_and_uniforms_are_uniform() -> None:
    source = Source("one")
    z = source.normals(200_001).numpy()
    assert z.shape == (200_001,)
    assert z.dtype == np.float64
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(z.std() - 1) < 5 / math.sqrt(2 * len(z))
    tails = (np.abs(z) > 3).mean()
    assert tails == pytest.approx(0.0027, rel=0.2)
    u = source.uniforms(100_000).numpy()
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert u.min() > 0


def test_neither_halves_nor_neighbours_nor_calls_are_correlated() -> None:
    source = Source("two")
    z = source.normals(4 * PAIRS).view(4, PAIRS).numpy()
    again = source.normals(4 * PAIRS).view(4, PAIRS).numpy()
    limit = 5 / math.sqrt(PAIRS)
    rows = np.concatenate([z, again])
    assert np.abs(np.corrcoef(rows) - np.eye(8)).max() < limit
    assert np.abs(np.corrcoef(rows**2) - np.eye(8)).max() < limit  # nor are their sizes
    assert abs(np.corrcoef(z.ravel()[1:], z.ravel()[:-1])[0, 1]) < limit


def test_noise_has_more_digits_than_float32() -> None:
    z = Source("three").normals(200_000)
    assert len(z.unique()) == len(z)


def test_two_sources_never_agree_and_no_global_seed_changes_that() -> None:
    found = []
    for _ in range(3):
        torch.manual_seed(7)
        np.random.seed(7)
        found.append(Source().normals(64))
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[1], found[2])


def test_drawing_takes_nothing_from_global_state() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Source().normals(100)
    Source().chosen(100, 0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_test_seed_repeats_and_another_does_not() -> None:
    assert torch.equal(Source("a").normals(50), Source("a").normals(50))
    assert not torch.equal(Source("a").normals(50), Source("b").normals(50))
    assert Source("a").chosen(50, 0.3) == Source("a").chosen(50, 0.3)


@pytest.mark.parametrize("rate", [0.001, 8 / 240, 0.5, 1.0])
def test_each_record_is_drawn_by_itself_at_the_rate(rate: float) -> None:
    source, n, turns = Source(f"rate {rate}"), 50, 4000
    drawn = np.zeros((turns, n))
    for turn in drawn:
        turn[source.chosen(n, rate)] = 1
    assert abs(drawn.mean() - rate) <= 5 * math.sqrt(rate * (1 - rate) / drawn.size)
    spread = 5 * math.sqrt(rate * (1 - rate) / turns)
    assert np.abs(drawn.mean(0) - rate).max() <= spread  # no record more than another
    sizes = drawn.sum(1)
    assert sizes.var() == pytest.approx(
        n * rate * (1 - rate), rel=0.3, abs=1e-9
    )  # binomial, not a fixed size


def test_nothing_is_drawn_of_nothing() -> None:
    assert Source().chosen(0, 0.5) == []
    assert len(Source().normals(0)) == 0


def test_normals_are_those_of_box_and_muller_to_the_last_digit() -> None:
    z = Source("digits").normals(2 * PAIRS).numpy()
    u = Source("digits").uniforms(2 * PAIRS).numpy()
    radius, angle = np.sqrt(-2 * np.log(u[:PAIRS])), 2 * np.pi * u[PAIRS:]
    np.testing.assert_allclose(
        z, np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]), rtol=0, atol=1e-13
    )


class Fixed:
    """A stream of one 64-bit number."""

    def __init__(self, number: int) -> None:
        self.bytes = number.to_bytes(8, "little", signed=True)

    def update_into(self, zeros: bytes, into: bytearray) -> None:
        into[: len(zeros)] = self.bytes * (len(zeros) // 8)


@pytest.mark.parametrize("number", [-(2**63), -(2**63) + 2**11, 0, 2**63 - 1])
def test_no_number_of_the_stream_is_0_or_beyond_1(number: int) -> None:
    source = Source()
    source._stream = Fixed(number)  # type: ignore[assignment]
    (one,) = source.uniforms(1).tolist()
    assert 0 < one <= 1
    assert one == pytest.approx((number + 2**63) / 2**64, abs=2**-52)
    assert source.normals(4).isfinite().all()
