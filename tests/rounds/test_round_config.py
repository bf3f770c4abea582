"""How many clients a round asks, waits for and needs."""

from typing import Any

import pytest

from fedlora.errors import ConfigError
from fedlora.rounds.round_config import RoundConfig


def rules(**more: Any) -> RoundConfig:
    return RoundConfig(rounds=1, seed=0, **more)


@pytest.mark.parametrize("n", [1, 7, 10])
@pytest.mark.parametrize("more", [0.0, 0.1, 0.3, 1.0])
def test_a_round_asks_more_than_it_waits_for_and_waits_for_what_was_meant(n: int, more: float) -> None:
    found = rules(clients_per_round=n, over_select=more)
    asked = found.sampled(100)
    assert asked - 1 < n * (1 + more) <= asked  # the smallest whole number that is enough
    assert found.enough(asked) == n
    assert found.sampled(n - 1) == n - 1  # there are no more
    assert found.enough(n - 1) == n - 1


def test_all_are_asked_and_waited_for_where_nothing_is_said() -> None:
    assert (rules().sampled(12), rules().enough(12), rules().least(12)) == (12, 12, 1)


@pytest.mark.parametrize(("share", "needed"), [(0.0, 1), (0.5, 4), (0.51, 4), (0.6, 5), (1.0, 7)])
def test_the_share_needed_is_of_those_waited_for_and_rounded_up(share: float, needed: int) -> None:
    found = rules(clients_per_round=7, over_select=1.0, min_replies=share)
    assert found.least(found.sampled(100)) == needed
    assert rules(clients_per_round=7, min_replies=share, min_updates=6).least(7) == max(6, needed)


@pytest.mark.parametrize("bad", [{"timeout": 0}, {"over_select": -0.1}, {"min_replies": 1.1}, {"wait": -1}])
def test_what_cannot_be_is_refused_by_its_key(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.{next(iter(bad))}"):
        rules(**bad)
