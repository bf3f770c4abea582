"""Local training by DP-SGD: what it draws, spends, tells and refuses."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedlora.clients import LocalTraining
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ConfigError
from fedlora.models import LoRA, fresh_adapter, targets
from fedlora.privacy import DPSGD, Entry, Ledger
from fedlora.training.client import TrainRequest
from fedlora.training.round_schedule import RoundSchedule
from fedlora.training.steps import FitJob
from fedlora.training.trainer import FitResult

PRIVACY = DPSGD(epsilon=8.0, participations=2, accountant="rdp")
CLIENT = LocalTraining(lr=0.1, batch_size=4, steps=200).privately(PRIVACY)


def assignment(base: Any, rows: int = 40, **more: Any) -> TrainRequest:
    modules = targets(base, "query")
    adapter = fresh_adapter(base, modules, LoRA().peer(0, 2, modules), base.heads)
    own = [Example([5 + i % 7, 6, 7 + i % 3], i % 2) for i in range(rows)]
    return replace(TrainRequest(0, 1, 0, Task(adapter), own), **more)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[FitJob]]:
    """The jobs that training would have done."""
    found: list[Sequence[FitJob]] = []

    def fit(
        base: Any, jobs: Sequence[FitJob], make: Any, schedule: Any, clip: Any, tokens: int
    ) -> list[FitResult]:
        assert clip is None  # the mechanism's own is the only one
        found.append(jobs)
        return [FitResult(job.task.adapter, 0.5, len(job.batches)) for job in jobs]

    monkeypatch.setattr(sys.modules[LocalTraining.__module__], "fit", fit)
    return found


def test_batches_are_poisson_draws_and_empty_ones_stay(base: Any, drawn: list[Any]) -> None:
    a = assignment(base)
    for _ in range(10):
        CLIENT.train(base, [a])
    batches = [batch for [job] in drawn for batch in job.batches]
    assert len(batches) == 2000
    sizes = np.array([len(batch) for batch in batches])
    assert abs(sizes.mean() - 4) < 5 * np.sqrt(4 * 0.9 / len(sizes))
    assert sizes.var() == pytest.approx(40 * 0.1 * 0.9, rel=0.2)
    assert (sizes == 0).sum() == pytest.approx(2000 * 0.9**40, rel=0.6)
    assert len({tuple(id(row) for row in batch) for batch in batches}) > 1500
    for batch in batches:
        assert len({id(row) for row in batch}) == len(batch)  # no row twice


def test_no_seed_of_the_run_repeats_a_draw(base: Any, drawn: list[Any]) -> None:
    a = assignment(base)
    CLIENT.train(base, [a, replace(a, client=1)])
    CLIENT.train(base, [a])
    kept = [[[id(row) for row in batch] for batch in job.batches] for jobs in drawn for job in jobs]
    assert kept[0] != kept[1]
    assert kept[0] != kept[2]


def test_what_is_spent_is_one_entry_a_step_and_what_is_told_is_no_loss(base: Any, drawn: list[Any]) -> None:
    spent = Ledger(1e-5, accountant="rdp").plus(Entry(3.0, 0.2, 5))
    [outcome] = CLIENT.train(base, [assignment(base, ledger=spent)])
    [[job]] = drawn
    [own] = [e for e in outcome.ledger.entries if e.q == 0.1]
    assert own.steps == len(job.batches) == 200
    assert own.sigma == job.mechanism.sigma
    assert (job.mechanism.clip, job.mechanism.batch_size) == (1.0, 4)
    assert outcome.ledger.covers(spent)
    assert outcome.metrics.keys() == {"epsilon", "delta", "epsilon_valid", "sigma", "q", "steps"}
    assert outcome.examples is None
    hidden = CLIENT.privately(replace(PRIVACY, public_counts=False))
    [outcome] = hidden.train(base, [assignment(base)])
    assert outcome.metrics.keys() == {"epsilon", "delta", "epsilon_valid"}
    assert outcome.examples == 1


def test_a_client_at_its_budget_does_not_train_whoever_asks(base: Any, drawn: list[Any]) -> None:
    a = assignment(base)
    [first] = CLIENT.train(base, [a])
    [second] = CLIENT.train(base, [replace(a, ledger=first.ledger)])
    assert second.ledger.epsilon <= 8
    done = replace(a, ledger=second.ledger)
    assert "budget is spent" in str(CLIENT.refusal(done))
    with pytest.raises(ConfigError, match="budget is spent"):
        CLIENT.train(base, [a, done])
    assert len(drawn) == 2


def test_without_privacy_nothing_changes(base: Any) -> None:
    plain = LocalTraining(lr=0.1, batch_size=4)
    [outcome] = plain.train(base, [assignment(base, 8)])
    assert outcome.ledger is None
    assert "loss" in outcome.metrics
    assert plain.plan(8) is None
    assert plain.refusal(assignment(base, 8)) is None


def test_rounds_have_their_rates_and_no_steps_of_their_own(base: Any, drawn: list[Any]) -> None:
    """The ledger is planned by one number of steps; a rate tells nothing of the rows."""
    own = replace(CLIENT, over_rounds=RoundSchedule("linear"))
    [found] = own.train(base, [assignment(base, round=3, rounds=4)])
    assert (drawn[0][0].rate, found.metrics["lr"]) == (0.5, 0.05)
    with pytest.raises(ConfigError, match=r"over_rounds.steps: under privacy=dp_sgd .* say client.steps"):
        LocalTraining(lr=0.1, over_rounds=RoundSchedule(steps={2: 5})).privately(PRIVACY)
