"""What sites tell of their spending, and what nobody may learn from a refusal."""

import math
from typing import Any

import pytest

from fedlora.config.composition import compose
from fedlora.config.translate import run_spec
from fedlora.errors import ConfigError
from fedlora.privacy import DPSGD, Entry, Ledger
from fedlora.runner.assemble import assemble
from fedlora.runner.privacy_checks import reported_ledgers

ENTRY = Entry(0.9, 0.1, 8)


def line(round: int, epsilon: float, **more: Any) -> dict[str, Any]:
    numbers = {"sigma": ENTRY.sigma, "q": ENTRY.q, "steps": float(ENTRY.steps), "delta": 1e-5}
    return (
        {"round": round, "client": 3, "status": "ok", "epsilon": epsilon, "epsilon_valid": 1.0}
        | numbers
        | more
    )


def after(rounds: int) -> Ledger:
    ledger = Ledger(1e-5, accountant="rdp")
    for _ in range(rounds):
        ledger = ledger.plus(ENTRY)
    return ledger


@pytest.mark.parametrize("heard", [[1, 2, 3], [1, 3], [3], [1, 4, 7]])
def test_rounds_whose_reply_was_lost_are_counted_by_what_the_client_tells_later(heard: list[int]) -> None:
    lines = [line(n, after(n).epsilon) for n in heard]
    assert reported_ledgers(lines, "rdp") == {3: after(heard[-1])}


@pytest.mark.parametrize(
    "wrong",
    [
        {"sigma": -1.0},
        {"q": 0.0},
        {"steps": -2.0},
        {"steps": math.nan},
        {"delta": 0.0},
        {"epsilon": math.inf},
    ],
    ids=str,
)
def test_numbers_that_cannot_be_do_not_end_the_run(wrong: dict[str, float]) -> None:
    honest = line(1, after(1).epsilon)
    found = reported_ledgers([honest, line(2, 1.0) | {"client": 4} | wrong], "rdp")
    assert found[3] == after(1)
    assert 4 not in found or found[4].epsilon < 10


def test_an_epsilon_out_of_the_air_costs_no_more_than_two_for_each_round() -> None:
    assert reported_ledgers([line(5, 1e290)], "rdp")[3].entries == (
        Entry(ENTRY.sigma, ENTRY.q, 11 * ENTRY.steps),
    )


@pytest.mark.parametrize("public", [True, False])
def test_a_refusal_tells_numbers_only_where_counts_are_public(public: bool) -> None:
    privacy = DPSGD(participations=1, epsilon=3.0, public_counts=public, accountant="rdp")
    plan = privacy.plan(1234, 8, 4)
    why = plan.refusal(plan.after(None))
    assert why is not None
    assert why.startswith("the privacy budget is spent")
    assert any(c.isdigit() for c in why) is public
    for wrong in (
        lambda: privacy.plan(7, 8, 4),
        lambda: DPSGD(delta=0.5, participations=1, public_counts=public).plan(1234, 8, 4),
        lambda: DPSGD(participations=1, epsilon=1e-9, public_counts=public).plan(1234, 8, 4),
    ):
        with pytest.raises(ConfigError) as caught:
            wrong()
        shown = any(n in str(caught.value) for n in ("1234", " 7 ", f"{8 / 1234:.3g}"))
        assert shown is public


def test_a_round_waits_for_all_of_a_poisson_sample_whatever_its_size() -> None:
    words = ["model=tiny", "data=tiny", "clients=6", "clients_per_round=2"]
    plain = assemble(run_spec(compose(words)))
    whole = assemble(run_spec(compose([*words, "privacy=client_level", "privacy.accountant=rdp"])))
    assert [plain.enough(n) for n in (1, 2, 5)] == [1, 2, 2]
    assert [whole.enough(n) for n in (0, 1, 2, 5)] == [0, 1, 2, 5]
