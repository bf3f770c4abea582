"""What privacy asks of a run before it starts, and what the ledgers of a run hold."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from fedlora.core.messages import Task
from fedlora.core.strategy import Strategy
from fedlora.errors import CheckpointError, ConfigError
from fedlora.models import Base
from fedlora.privacy import DPSGD, ClientLevel, Entry, Ledger, Privacy, self_test
from fedlora.privacy.ledger import Accountant
from fedlora.storage.run_folder import SERVER, RunFolder
from fedlora.training.client import Client
from fedlora.training.rules.base import check_private, rules_of


def try_out(
    client: Client, base: Base, strategy: Strategy, tasks: Sequence[Task], sizes: Sequence[int]
) -> None:
    """Plan every client's noise, and test that its records' gradients are its own.

    Raises:
        ConfigError: a client's records are too few, no noise is enough, or the strategy brings a local rule
            that privacy does not cover.
        ModelError: the model mixes records.
    """
    if not all(task.adapter.parametrization.by_row for task in tasks):
        raise ConfigError(
            f"privacy: the sparse rounds of {type(strategy).__name__} have no gradient for each record; say "
            "strategy.sparse_rounds=0, or privacy=none"
        )
    for task in tasks:
        check_private(rules_of(task))
    for number, size in sorted(enumerate(sizes), key=lambda found: found[1]):
        try:
            client.plan(size)
        except ConfigError as error:
            raise ConfigError(f"client {number}: {error}") from error
    for task in tasks:
        self_test(base, task)


def check_ledgers(privacy: Privacy | None, folder: RunFolder) -> None:
    """Refuse to go on with a run that has let out more than its ledgers say.

    Raises:
        CheckpointError: a ledger was deleted or put back to an older one, or there is one and no privacy.
    """
    let_out: dict[int, float] = {}
    if privacy is None and folder.ledgers():
        raise CheckpointError(
            "resume: this run was private, as its ledgers in checkpoint/ show, and would go on without "
            "noise; put its config.yaml back"
        )
    if isinstance(privacy, ClientLevel):
        # A round that released nothing, such as one whose sum was not known, has cost nothing.
        epsilons = [0.0, *(line["epsilon"] for line in folder.rounds())]
        let_out[SERVER] = sum(after > before for before, after in pairwise(epsilons))
    elif privacy is not None:
        for line in folder.clients():
            if line["status"] == "ok":  # where counts are no one's business, no less than a step
                let_out[line["client"]] = let_out.get(line["client"], 0) + line.get("steps", 1)
    ledgers = folder.ledgers()
    for client, steps in let_out.items():
        known = sum(e.steps for e in ledgers[client].entries) if client in ledgers else 0
        if known < steps:
            who = "the server" if client == SERVER else f"client {client}"
            raise CheckpointError(
                f"resume: {who} has let out {steps:g} private steps, its ledger knows of {known}; put the "
                "ledgers in checkpoint/ back, or start the run again on other rows"
            )


def reported_ledgers(lines: Iterable[Mapping[str, Any]], accountant: Accountant) -> dict[int, Ledger]:
    """What clients on other machines say they have spent, by their lines of clients.jsonl.

    A round whose reply was lost is in the client's own ledger only. The epsilon that it tells from then on
    holds it, so that its entry is counted again until it is accounted for. Numbers that cannot be, which an
    honest client does not send, are nobody's spending.
    """
    found: dict[int, Ledger] = {}
    for line in lines:
        if line["status"] != "ok" or not line.keys() >= {"sigma", "q", "steps", "delta", "epsilon"}:
            continue
        try:
            entry = Entry(line["sigma"], line["q"], int(line["steps"]))
        except (ConfigError, ValueError, OverflowError):
            continue
        if not 0 < line["delta"] < 1:
            continue
        ledger = found.get(line["client"], Ledger(line["delta"], accountant=accountant))
        ledger = ledger.plus(entry, valid=bool(line["epsilon_valid"]))
        found[line["client"]] = _with_lost(ledger, entry, line["epsilon"], 2 * line["round"])
    return found


def _with_lost(ledger: Ledger, entry: Entry, epsilon: float, most: int) -> Ledger:
    """The ledger with as many more rounds of an entry as it takes to reach the epsilon that is told."""

    def more(rounds: int) -> Ledger:
        return ledger.plus(replace(entry, steps=rounds * entry.steps))

    if not epsilon < math.inf or ledger.epsilon >= epsilon * (1 - 1e-9):
        return ledger
    return more(bisect_left(range(most), epsilon * (1 - 1e-9), key=lambda rounds: more(rounds).epsilon))


def planned(privacy: Privacy) -> int:
    """For how many rounds the noise is made: of a client, or of the run."""
    assert isinstance(privacy, DPSGD | ClientLevel)
    return privacy.planned


def check_more_rounds(privacy: Privacy | None, before: int, rounds: int) -> None:
    """Refuse to add rounds to a run whose noise was made for fewer.

    Args:
        privacy: the run's; None for none.
        before: the rounds that the run was to have.
        rounds: those that it is to have now.

    Raises:
        ConfigError: more than the noise was made for.
    """
    if privacy is not None and rounds > max(planned(privacy), before):
        raise ConfigError(
            f"resume: the noise of this run is for {planned(privacy)} rounds, more would break its epsilon "
            f"of {privacy.epsilon:g}; start a new run with rounds={rounds}"
        )
