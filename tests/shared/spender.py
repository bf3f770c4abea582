"""A client without a model that spends a privacy budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedlora.privacy import DPSGD, Plan
from fedlora.training.client import Client, TrainRequest, TrainResult


@dataclass(frozen=True)
class Spender(Client):
    """The engine's client without a model, under a budget of three rounds; fails where it is told to."""

    inner: Any
    fail: tuple[int, ...] = ()
    participations: int = 3

    def plan(self, rows: int) -> Plan | None:
        privacy = DPSGD(epsilon=5.0, participations=self.participations, accountant="rdp")
        return privacy.plan(100, 10, 10)

    def train(self, base: Any, assignments: Sequence[TrainRequest]) -> list[TrainResult]:
        found = []
        for a, outcome in zip(assignments, self.inner.train(base, assignments), strict=True):
            plan = self.plan(len(a.rows))
            assert plan is not None
            assert plan.refusal(a.ledger) is None
            if a.client in self.fail:
                raise RuntimeError("no luck")
            ledger = plan.after(a.ledger)
            found.append(
                replace(
                    outcome, metrics=DPSGD(participations=1).report(plan, ledger), ledger=ledger, examples=1
                )
            )
        return found

    def step_tokens(self, rows: Sequence[Any]) -> int:
        return 10
