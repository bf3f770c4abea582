import json
import math
import random
import warnings

import pytest
from opacus.accountants import PRVAccountant, RDPAccountant

from fedlora.errors import CheckpointError, ConfigError
from fedlora.privacy import Entry, Ledger, epsilon, worst
from fedlora.privacy import ledger as module


def prv(*entries: Entry, delta: float = 1e-5) -> float:
    found = PRVAccountant()
    found.history = [(e.sigma, e.q, e.steps) for e in entries]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(found.get_epsilon(delta))


# dp.md §3.1, by three accountants of other people: Opacus' Rényi, and MS PRV's certified lower bound.
TABLE = [
    (Entry(1.0, 0.01, 1000), 1.818, 2.1014),
    (Entry(1.0, 0.1, 100), 7.037, 7.8993),
    (Entry(0.7, 0.05, 300), 12.734, 14.312),
    (Entry(2.0, 0.25, 400), 14.457, 15.568),
    (Entry(4.0, 1.0, 50), 8.585, 9.2350),
    (Entry(1.0, 1.0, 1), 4.367, 4.7285),
    (Entry(1.1, 256 / 60000, 14062), 2.371, 2.5966),
]


@pytest.mark.parametrize(("entry", "low", "renyi"), TABLE, ids=str)
def test_epsilon_is_above_the_certified_bound_and_not_above_the_renyi_one(
    entry: Entry, low: float, renyi: float
) -> None:
    found = epsilon((entry,), 1e-5)
    assert low < found < renyi
    assert found == pytest.approx(prv(entry))
    assert epsilon((entry,), 1e-5, "rdp") == pytest.approx(renyi, rel=1e-4)


def test_a_ledger_over_rounds_is_the_accountant_on_the_whole_history() -> None:
    ledger = Ledger(1e-5)
    for _ in range(10):
        ledger = ledger.plus(Entry(1.0, 0.1, 10))
    assert ledger.entries == (Entry(1.0, 0.1, 100),)
    assert ledger.epsilon == pytest.approx(7.0571, abs=1e-3)
    assert epsilon((Entry(1.0, 0.1, 10),), 1e-5) < 4  # what a ledger that forgets would say
    other = Entry(1.5, 0.08, 30)
    assert ledger.plus(other).epsilon == pytest.approx(prv(Entry(1.0, 0.1, 100), other))


def test_the_order_of_steps_and_how_they_are_counted_do_not_matter() -> None:
    steps = [Entry(1.0, 0.05, 3), Entry(1.5, 0.08, 7), Entry(1.0, 0.05, 4), Entry(1.0, 0.08, 1)]
    found = []
    for seed in range(3):
        random.Random(seed).shuffle(steps)
        ledger = Ledger(1e-5)
        for entry in steps:
            ledger = ledger.plus(entry)
        found.append(ledger)
    assert found[0] == found[1] == found[2]
    assert len(found[0].entries) == 3


def test_nothing_costs_nothing_and_no_noise_costs_all() -> None:
    assert Ledger(1e-5).epsilon == 0
    assert Ledger(1e-5).plus(Entry(1.0, 0.1, 0)).epsilon == 0
    assert Ledger(1e-5).plus(Entry(0.0, 0.1, 1)).epsilon == math.inf
    assert Ledger(1e-5).plus(Entry(1.0, 0.1, 10)).plus(Entry(0.0, 0.1, 1)).record()["epsilon"] is None


def test_epsilon_grows_with_steps_and_shares_and_falls_with_noise() -> None:
    def at(sigma: float, q: float, steps: int) -> float:
        return epsilon((Entry(sigma, q, steps),), 1e-5)

    assert at(1.0, 0.1, 10) < at(1.0, 0.1, 50) < at(1.0, 0.2, 50) < at(0.8, 0.2, 50)
    assert epsilon((Entry(1.0, 0.1, 10),), 1e-5) < epsilon((Entry(1.0, 0.1, 10),), 1e-7)


@pytest.mark.parametrize(
    "entries",
    [
        (Entry(0.2, 0.05, 1000),),  # PRV: 45 s and 3.9 GB
        (Entry(0.5, 0.5, 5000),),  # PRV: more than 11 GB
        tuple(Entry(1 + i / 50, 0.01, 10) for i in range(20)),  # PRV: seconds, and more with each
        (Entry(5.0, 0.01, 10**6),),
    ],
    ids=["little noise", "half of all", "many kinds", "many steps"],
)
def test_prv_is_left_out_where_it_takes_minutes_and_renyi_holds(
    entries: tuple[Entry, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_prv", lambda *_: pytest.fail("PRV was asked"))
    epsilon.cache_clear()
    renyi = RDPAccountant()
    renyi.history = [(e.sigma, e.q, e.steps) for e in entries]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the best Rényi order
        most = renyi.get_epsilon(1e-5)
    assert 0 < epsilon(tuple(sorted(entries)), 1e-5) <= most * (1 + 1e-9)
    epsilon.cache_clear()


def test_a_prv_that_fails_leaves_the_renyi_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PRVAccountant, "get_epsilon", lambda *_, **__: 1 / 0)
    epsilon.cache_clear()
    assert epsilon((Entry(1.0, 0.1, 100),), 1e-5) == pytest.approx(7.8993, rel=1e-3)
    epsilon.cache_clear()


def test_a_ledger_survives_json_and_says_what_it_means() -> None:
    ledger = Ledger(1e-6, accountant="rdp").plus(Entry(0.9, 1 / 3, 7)).plus(Entry(1.1, 0.5, 2), valid=False)
    assert Ledger.load(ledger.dump()) == ledger
    read = json.loads(ledger.dump())
    assert read["unit"] == "record"
    assert "adding or removing one record" in read["adjacency"]
    assert "Poisson" in read["mechanism"]
    assert (read["delta"], read["valid"], read["accountant"]) == (1e-6, False, "rdp")
    assert read["epsilon"] == ledger.epsilon


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"entries": []}',
        Ledger(1e-5).dump().replace('"record"', '"person"'),
        Ledger(1e-5).plus(Entry(1.0, 0.1, 3)).dump().replace('"q": 0.1', '"q": 7'),
        Ledger(1e-5).plus(Entry(1.0, 0.1, 3)).dump().replace('"steps": 3', '"steps": -3'),
        Ledger(1e-5).dump()[:-9],
    ],
)
def test_a_damaged_ledger_is_no_ledger(text: str) -> None:
    with pytest.raises(CheckpointError, match="no ledger"):
        Ledger.load(text)


def test_a_ledger_covers_what_it_grew_from_and_nothing_else() -> None:
    old = Ledger(1e-5).plus(Entry(1.0, 0.1, 10))
    new = old.plus(Entry(1.0, 0.1, 5)).plus(Entry(2.0, 0.1, 5))
    assert new.covers(old)
    assert old.covers(old)
    assert not old.covers(new)
    assert not Ledger(1e-5).covers(old)
    assert not new.covers(old.plus(Entry(1.0, 0.1, 1), valid=False))  # what was invalid stays so
    assert new.plus(Entry(1.0, 0.1, 0), valid=False).covers(old)


def test_the_worst_is_the_largest_never_the_mean() -> None:
    ledgers = [Ledger(1e-5).plus(Entry(sigma, 0.1, 10)) for sigma in (2.0, 0.8, 1.2)]
    assert worst(ledgers) == ledgers[1]
    assert worst([]) is None


@pytest.mark.parametrize(
    "entry", [(-1.0, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 0.1, -1), (1.0, 0.1, 1.5)]
)
def test_an_entry_that_cannot_be_is_refused(entry: tuple[float, float, int]) -> None:
    with pytest.raises(ConfigError, match="entry"):
        Entry(*entry)
