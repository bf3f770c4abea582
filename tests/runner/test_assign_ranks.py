from collections import Counter
from typing import Any

import pytest

from fedlora.errors import ConfigError
from fedlora.runner.assign_ranks import assign_ranks


def test_one_rank_for_all() -> None:
    assert assign_ranks(8, 3, 0) == [8, 8, 8]


def test_a_list_goes_round() -> None:
    assert assign_ranks([2, 4, 8], 7, 0) == [2, 4, 8, 2, 4, 8, 2]


@pytest.mark.parametrize(
    ("shares", "clients", "counts"),
    [
        ({8: 0.5, 2: 0.5}, 10, {8: 5, 2: 5}),
        ({8: 1, 2: 3}, 8, {8: 2, 2: 6}),
        ({4: 1.0}, 3, {4: 3}),
        ({16: 0.1, 8: 0.2, 2: 0.7}, 10, {16: 1, 8: 2, 2: 7}),
        ({8: 0.5, 2: 0.5}, 100, {8: 50, 2: 50}),
    ],
)
def test_shares_give_exact_counts(shares: Any, clients: int, counts: dict[int, int]) -> None:
    dealt = assign_ranks(shares, clients, 3)
    assert Counter(dealt) == counts
    assert dealt == assign_ranks(shares, clients, 3)


@pytest.mark.parametrize("clients", range(1, 30))
def test_shares_deal_every_client_within_one(clients: int) -> None:
    counts = Counter(assign_ranks({2: 0.31, 4: 0.27, 8: 0.42}, clients, 0))
    assert sum(counts.values()) == clients
    assert all(abs(counts[r] - s * clients) <= 1 for r, s in {2: 0.31, 4: 0.27, 8: 0.42}.items())


def test_the_deal_follows_the_seed() -> None:
    deals = {tuple(assign_ranks({8: 0.5, 2: 0.5}, 20, seed)) for seed in range(5)}
    assert len(deals) > 1


WRONG: list[Any] = [0, -1, 2.5, "x", None, [], [0], [2, None], [[2]], {}, {0: 1}, {8: 0}, {8: -1, 2: 3}]
WRONG += [{8: "x"}, {8: None}, float("inf"), float("nan"), {8: float("nan")}, {8: float("inf")}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_is_no_rank_is_named(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="ranks"):
        assign_ranks(wrong, 4, 0)
