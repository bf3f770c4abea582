import math
from dataclasses import replace
from typing import Any

import pytest

from fedlora.errors import ConfigError
from fedlora.privacy import DPSGD, Entry, Ledger, calibrate, epsilon

pytestmark = pytest.mark.slow  # whole runs

QUICK = DPSGD(accountant="rdp", participations=1)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize(
    ("target", "q", "steps"),
    [
        (8.0, 8 / 240, 150),
        (3.0, 0.05, 1000),
        (1.0, 1.0, 5),
        (0.1, 0.1, 100),
        (20.0, 0.2, 40),
        (200.0, 0.2, 40),
    ],
)
def test_the_noise_keeps_the_promise_over_all_steps_and_wastes_little(
    target: float, q: float, steps: int, accountant: Any
) -> None:
    sigma = calibrate(target, 1e-5, q, steps, accountant)
    assert epsilon((Entry(sigma, q, steps),), 1e-5, accountant) <= target
    assert epsilon((Entry(0.9 * sigma, q, steps),), 1e-5, accountant) > target * 0.99


def test_a_run_of_a_hundred_rounds_is_three_not_eighteen() -> None:
    """dp.md §3.3: n = 1000, B = 50, 10 steps a round, epsilon 3; for one round's steps the sum is 18.3."""
    plan = DPSGD(epsilon=3.0, delta=1e-5, participations=100).plan(1000, 50, 10)
    assert plan.sigma == pytest.approx(2.363, rel=0.01)
    ledger = plan.after(None).plus(Entry(plan.sigma, plan.q, 980))
    assert plan.refusal(ledger) is None
    ledger = plan.after(ledger)
    assert 2.9 < ledger.epsilon <= 3
    assert ledger.entries == (Entry(plan.sigma, 0.05, 1000),)
    for _ in range(5):  # noise is a little more than is needed
        if plan.refusal(ledger) is None:
            ledger = plan.after(ledger)
    assert "budget is spent" in str(plan.refusal(ledger))
    assert ledger.epsilon <= 3
    assert ledger.entries[0].steps <= 1050
    one = DPSGD(participations=1, epsilon=3.0, delta=1e-5).plan(1000, 50, 10).sigma
    assert epsilon((Entry(one, 0.05, 1000),), 1e-5) == pytest.approx(18.3, rel=0.05)


def test_delta_is_ten_times_below_one_record() -> None:
    assert QUICK.plan(100, 10, 1).delta == 1e-5
    assert QUICK.plan(10**6, 10, 1).delta == 1e-7
    assert replace(QUICK, delta=1e-3).plan(100, 10, 1).delta == 1e-3
    for delta in (0.01, 0.02):
        with pytest.raises(ConfigError, match=r"expected less than 1/100"):
            DPSGD(delta=delta, participations=1).plan(100, 10, 1)


def test_the_share_is_the_batch_over_the_records_and_a_client_of_fewer_is_refused() -> None:
    assert QUICK.plan(103, 32, 1).q == 32 / 103
    assert QUICK.plan(8, 8, 1).q == 1
    with pytest.raises(
        ConfigError, match=r"7 records, expected at least those of a step, 8; lower client\.batch_size"
    ):
        DPSGD(participations=1).plan(7, 8, 1)


def test_what_no_noise_reaches_is_refused() -> None:
    with pytest.raises(ConfigError, match="no noise gives epsilon"):
        replace(QUICK, epsilon=1e-6).plan(100, 50, 10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": 0},
        {"epsilon": -1.0},
        {"epsilon": math.inf},
        {"epsilon": math.nan},
        {"epsilon": "8"},
        {"epsilon": 1e4},
        {"epsilon": True},
        {"delta": 0.0},
        {"delta": 1.0},
        {"clip": 0.0},
        {"clip": None},
        {"participations": 0},
        {"participations": 2.5},
        {"accountant": "gdp"},
        {"clip": 5e-45},
        {"clip": 1e-41},
        {"clip": 9.99e-10},
        {"clip": 1.01e9},
        {"clip": math.inf},
        {"clip": math.nan},
        {"clip": True},
        {"clip": "1"},
        {"insecure_test_seed": False},
        {"insecure_test_seed": "0"},
        {"insecure_test_seed": 0.0},
        {"public_counts": "no"},
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"privacy.{next(iter(wrong))}"):
        DPSGD(**wrong)


def test_a_budget_is_checked_with_all_that_was_spent_before() -> None:
    plan = replace(QUICK, participations=4).plan(100, 10, 10)
    spent = Ledger(plan.delta).plus(Entry(0.7, 0.1, 30))  # by other settings
    assert plan.refusal(None) is None
    why = plan.refusal(spent)
    assert why is not None
    assert f"{spent.epsilon:.3f} of 8" in why
    assert f"{plan.after(spent).epsilon:.3f}" in why


def test_a_test_seed_makes_the_ledger_invalid_for_good() -> None:
    plan = replace(QUICK, insecure_test_seed=0).plan(100, 10, 5)
    ledger = plan.after(None)
    assert not ledger.valid
    assert not QUICK.plan(100, 10, 5).after(ledger).valid
    assert QUICK.plan(100, 10, 5).after(None).valid
    assert QUICK.report(plan, ledger)["epsilon_valid"] == 0


def test_a_test_seed_is_of_one_client_and_round() -> None:
    plan = replace(QUICK, insecure_test_seed=5).plan(100, 10, 5)
    draws = [plan.mechanism(*key).source.normals(8).tolist() for key in ((0, 1), (0, 1), (1, 1), (0, 2))]
    assert draws[0] == draws[1]
    assert len({tuple(d) for d in draws}) == 3


def test_what_is_told_depends_on_no_count_unless_counts_are_public() -> None:
    def report(rows: int, public: bool) -> dict[str, float]:
        privacy = replace(QUICK, participations=3, public_counts=public)
        plan = privacy.plan(rows, 10, math.ceil(rows / 10))
        return privacy.report(plan, plan.after(None))

    assert report(100, False) == report(55, False) == {"epsilon": 8.0, "delta": 1e-5, "epsilon_valid": 1.0}
    public = report(100, True)
    assert public.keys() == {"epsilon", "delta", "epsilon_valid", "sigma", "q", "steps"}
    assert public["epsilon"] < 8
    assert public["q"] == 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 5000},  # fewer records than a batch
        {"delta": 0.9},  # a delta that gives one of them away
        {"epsilon": 1e-9},  # an epsilon that no noise reaches
    ],
    ids=str,
)
def test_why_there_is_no_plan_tells_the_count_only_where_it_is_public(wrong: dict[str, Any]) -> None:
    def said(rows: int, public: bool) -> str:
        settings = {name: value for name, value in wrong.items() if name != "batch_size"}
        privacy = DPSGD(
            **{"epsilon": 8.0, "participations": 1, "accountant": "rdp", "public_counts": public} | settings
        )
        with pytest.raises(ConfigError) as caught:
            privacy.plan(rows, wrong.get("batch_size", 10), math.ceil(rows / 10))
        return str(caught.value)

    assert said(1234, False) == said(4321, False)
    assert "1234" not in said(1234, False)
    assert said(1234, True) != said(4321, True)
