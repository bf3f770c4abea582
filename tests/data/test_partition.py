import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data import Part, Row, partition
from fedlora.errors import ConfigError, DataError
from fedlora.tasks import Instruction

ROWS = [Row(str(i), "abcde"[i % 5], f"site {i % 7}") for i in range(200)]


def sizes(parts: list[Part]) -> list[int]:
    return [len(part.rows) for part in parts]


@settings(max_examples=60, deadline=None)
@given(
    how=st.sampled_from(["iid", "dirichlet", "shards", "natural"]),
    clients=st.integers(1, 7),
    alpha=st.floats(0.3, 100),
    max_rows=st.none() | st.integers(1, 50),
    seed=st.integers(0, 5),
)
def test_parts_are_disjoint_seeded_and_leave_nobody_empty(
    how: str, clients: int, alpha: float, max_rows: int | None, seed: int
) -> None:
    parts = partition(ROWS, how, clients, alpha, max_rows=max_rows, seed=seed)
    dealt = np.concatenate([part.rows for part in parts])
    assert len(parts) == clients
    assert len(set(dealt.tolist())) == len(dealt)
    assert set(dealt.tolist()) <= set(range(len(ROWS)))
    assert all(part.rows.dtype == np.int64 for part in parts)
    assert min(sizes(parts)) >= 1
    assert max_rows is None or max(sizes(parts)) <= max_rows
    if max_rows is None and (how != "natural" or clients == 7):
        assert len(dealt) == len(ROWS)
    again = partition(ROWS, how, clients, alpha, max_rows=max_rows, seed=seed)
    assert [p.name for p in parts] == [p.name for p in again]
    assert all((one.rows == other.rows).all() for one, other in zip(parts, again, strict=True))


@pytest.mark.parametrize("how", ["iid", "dirichlet", "shards", "natural"])
def test_another_seed_gives_another_order(how: str) -> None:
    one, other = (np.concatenate([p.rows for p in partition(ROWS, how, 4, seed=seed)]) for seed in (0, 1))
    assert one.tolist() != other.tolist()


@pytest.mark.parametrize("how", ["iid", "dirichlet", "shards", "natural"])
def test_a_cap_keeps_a_subset_of_the_uncapped_part(how: str) -> None:
    for whole, capped in zip(partition(ROWS, how, 4), partition(ROWS, how, 4, max_rows=5), strict=True):
        assert capped.rows.tolist() == whole.rows[:5].tolist()


@pytest.mark.slow
def test_every_process_deals_alike_whatever_its_hash_seed() -> None:
    code = (
        "from fedlora.data import Row, partition\n"
        "rows = [Row(str(i), 'abcde'[i % 5], f'site {i % 7}') for i in range(200)]\n"
        "for how in ('iid', 'dirichlet', 'shards', 'natural'):\n"
        "    print([(p.name, p.rows.tolist()) for p in partition(rows, how, 5, seed=3)])\n"
    )
    here = "".join(
        f"{[(p.name, p.rows.tolist()) for p in partition(ROWS, how, 5, seed=3)]}\n"
        for how in ("iid", "dirichlet", "shards", "natural")
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == here


def test_the_deal_is_pinned() -> None:
    """Golden: printed by this code with numpy 2.4.6; a change would change every recorded run."""
    assert sizes(partition(ROWS, "dirichlet", 5, alpha=0.5, seed=0)) == [58, 24, 24, 35, 59]
    assert partition(ROWS, "iid", 5, seed=0)[0].rows[:5].tolist() == [50, 186, 138, 162, 168]


def test_iid_parts_are_equal_up_to_one_row() -> None:
    assert Counter(sizes(partition(ROWS, "iid", 7))) == {29: 4, 28: 3}


def skew(parts: list[Part]) -> float:
    """The mean share of a client's commonest label."""
    shares = [
        Counter(ROWS[i].target for i in part.rows).most_common(1)[0][1] / len(part.rows) for part in parts
    ]
    return float(np.mean(shares))


def test_a_small_alpha_is_skewed_and_a_large_one_is_not() -> None:
    assert skew(partition(ROWS, "dirichlet", 4, alpha=0.1)) > 0.5
    assert skew(partition(ROWS, "dirichlet", 4, alpha=1000)) < 0.25


def test_dirichlet_shares_have_the_expected_spread() -> None:
    """The share of a client in one label has variance (1/K)(1-1/K)/(Kα+1)."""
    rows = [Row("", "x")] * 1000
    shares = [
        len(part.rows) / 1000
        for seed in range(200)
        for part in partition(rows, "dirichlet", 4, 2.0, seed=seed)
    ]
    assert np.var(shares) == pytest.approx(0.25 * 0.75 / 9, rel=0.15)


def test_dirichlet_is_redrawn_until_every_client_has_enough() -> None:
    assert min(sizes(partition(ROWS, "dirichlet", 8, alpha=0.5, min_rows=10))) >= 10
    with pytest.raises(
        DataError, match=r"at least 40 rows.*5 clients.*smallest client of \d+ rows.*raise alpha=0.1"
    ):
        partition(ROWS, "dirichlet", 5, alpha=0.1, min_rows=40)


def test_a_client_of_two_shards_has_at_most_three_labels() -> None:
    parts = partition(ROWS, "shards", 5, shards=2)
    assert sizes(parts) == [40] * 5
    assert (
        max(len({ROWS[i].target for i in part.rows}) for part in parts) <= 2
    )  # 20 divides 40: no straddling
    assert sizes(partition(ROWS, "shards", 3, shards=3)) == pytest.approx([66.7] * 3, abs=2)


def test_shards_are_dealt_at_random() -> None:
    pairs = {
        frozenset(ROWS[i].target for i in part.rows)
        for seed in range(5)
        for part in partition(ROWS, "shards", 5, shards=2, seed=seed)
    }
    assert len(pairs) > 5


def test_natural_clients_keep_their_rows_and_the_largest_come_first() -> None:
    parts = partition(ROWS, "natural", None)
    assert [part.name for part in parts] == [f"site {i}" for i in range(7)]
    assert all({ROWS[i].client for i in part.rows} == {part.name} for part in parts)
    rows = [Row("", "x", name) for name in "abbccd"]
    assert [part.name for part in partition(rows, "natural", 3)] == ["a", "b", "c"]  # a ties with d


def test_instructions_are_dealt_by_their_client_field() -> None:
    parts = partition(ROWS, "shards", 7, shards=1, group=Instruction().group)
    commonest = [Counter(ROWS[i].client for i in part.rows).most_common(1)[0][1] for part in parts]
    assert min(commonest) > 20
    with pytest.raises(DataError, match=r"partition dirichlet: expected a client field.*row 0.*client="):
        partition([Row("q", "a")] * 9, "dirichlet", 2, group=Instruction().group)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"how": "random"}, "expected iid, dirichlet, shards or natural, got 'random'"),
        ({"clients": None}, "partition iid: expected a number of clients, got none"),
        ({"clients": 0}, "at least 1 client, got clients=0"),
        ({"how": "dirichlet", "alpha": 0.0}, "expected alpha above 0, got 0.0"),
        ({"how": "dirichlet", "alpha": float("nan")}, "expected alpha above 0, got nan"),
        ({"how": "shards", "shards": 0}, "at least 1 shard a client"),
        ({"min_rows": 0}, "min_rows of at least 1"),
        ({"min_rows": 5, "max_rows": 4}, "max_rows of min_rows=5 or more, got 4"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        partition(ROWS, **({"how": "iid", "clients": 4} | settings))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"clients": 201}, "a row for each of 201 clients, got 200 rows; lower clients"),
        ({"how": "shards", "clients": 101}, "a row for each of 202 shards"),
        ({"how": "natural", "clients": 8}, "at most 7 clients, as many as the data has, got clients=8"),
        ({"how": "natural", "clients": None, "min_rows": 29}, "got 4 clients with so many; lower min_rows"),
        ({"min_rows": 51}, "at least 51 rows (min_rows) for each of 4 clients, got 0"),
    ],
)
def test_rows_that_do_not_suffice_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(DataError) as caught:
        partition(ROWS, **({"how": "iid", "clients": 4} | settings))
    assert words in str(caught.value)


def test_no_rows_and_no_client_field_are_refused() -> None:
    with pytest.raises(DataError, match="got 0 rows"):
        partition([], "natural", None)
    with pytest.raises(
        DataError, match=r"partition natural: expected a client field in every row, got none in row 1"
    ):
        partition([Row("", "x", "a"), Row("", "x")], "natural", None)
