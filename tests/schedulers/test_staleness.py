"""What an update counts by its age, and what a buffer makes of the weights of its clients."""

import math
from typing import Any

import pytest

from fedlora.errors import ConfigError
from fedlora.schedulers import Asynchronous, Buffered
from fedlora.schedulers.staleness import Staleness


@pytest.mark.parametrize(
    ("staleness", "by_age"),
    [
        (Staleness("constant"), {0: 1, 7: 1}),
        (Staleness(), {0: 1, 1: 1 / math.sqrt(2), 3: 0.5, 8: 1 / 3}),  # FedBuff's 1/sqrt(1 + t)
        (Staleness("polynomial", exponent=1), {0: 1, 1: 0.5, 3: 0.25}),
        # FedAsync's a = 10, b = 4: 1 / (10 (5 - 4) + 1), and not 1 / (10 (5 + 4) + 1)
        (Staleness("hinge"), {0: 1, 4: 1, 5: 1 / 11, 6: 1 / 21}),
        (Staleness("hinge", slope=0.5, threshold=0), {0: 1, 1: 1 / 1.5, 2: 0.5}),
    ],
    ids=str,
)
def test_the_formulas(staleness: Staleness, by_age: dict[int, float]) -> None:
    assert {age: staleness.factor(age) for age in by_age} == pytest.approx(by_age, rel=1e-15)


@pytest.mark.parametrize("kind", ["constant", "polynomial", "hinge"])
def test_an_older_update_never_counts_more(kind: str) -> None:
    factors = [Staleness(kind).factor(age) for age in range(30)]
    assert factors[0] == 1
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] > 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Buffered(buffer=0), "scheduler.buffer"),
        (lambda: Buffered(staleness="linear"), "scheduler.staleness: expected polynomial, hinge or constant"),
        (lambda: Buffered(lr=0), "scheduler.lr"),
        (lambda: Buffered(cap=0.5), "scheduler.cap"),
        (lambda: Buffered(exponent=-1), "scheduler.exponent"),
        (lambda: Asynchronous(alpha=1.5), "scheduler.alpha"),
        (lambda: Asynchronous(concurrency=0), "scheduler.concurrency"),
        (lambda: Asynchronous(threshold=-1), "scheduler.threshold"),
        (lambda: Asynchronous(max_staleness=-1), "scheduler.max_staleness"),
    ],
)
def test_a_setting_that_cannot_be_is_named(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()
