"""What privacy asks of a run before it starts, and what the ledgers of a run hold."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from omegaconf import DictConfig

from fedlora.config.instantiate import named
from fedlora.core.messages import Task
from fedlora.core.strategy import Strategy
from fedlora.core.strategy import named as strategies
from fedlora.data import Dataset
from fedlora.errors import CheckpointError, ConfigError
from fedlora.models import Base
from fedlora.privacy import DPSGD, ClientLevel, Entry, Ledger, Privacy, self_test
from fedlora.privacy.ledger import Accountant
from fedlora.rounds.round_config import RoundConfig
from fedlora.secure_aggregation.protocol import LEAST
from fedlora.storage.run_folder import SERVER, RunFolder
from fedlora.training.client import Client

LARGEST_SUM = 2.0**31  # what the fixed-point numbers of fedlora.secure_aggregation.crypto hold


def check(privacy: Privacy, strategy: Strategy, rules: RoundConfig, dora: bool) -> None:
    """Refuse what cannot be done under differential privacy, or would not be covered by it.

    Raises:
        ConfigError: says what, and why.
    """
    name = type(strategy).__name__
    if strategy.personal:
        raise ConfigError(
            f"privacy: strategy {name} leaves clients a part of their own, and is measured on their own "
            "rows, without noise; use a strategy with one global model, or privacy=none"
        )
    if rules.evaluate_clients:
        raise ConfigError(
            "evaluate.clients: what clients measure on their own rows is not covered by epsilon; leave it "
            "out, or use privacy=none"
        )
    if isinstance(privacy, DPSGD) and dora:
        raise ConfigError(
            "lora.dora: has no gradient for each record here; leave it out, or use privacy=none"
        )
    if isinstance(privacy, ClientLevel):
        _check_central(privacy, strategy, rules)


def _check_central(privacy: ClientLevel, strategy: Strategy, rules: RoundConfig) -> None:
    name = type(strategy).__name__
    if not (strategy.linear or strategy.products):
        raise ConfigError(
            f"privacy: strategy {name} needs more of its clients' updates than their mean, such as norms or "
            "which directions each has, and one client could change that without bound; use "
            f"{strategies(lambda s: (s.linear or s.products) and not s.personal)}, or privacy=dp_sgd, for "
            "which one global model is enough"
        )
    if rules.evaluate_updates:
        raise ConfigError(
            "evaluate.updates: what a client would have reached alone is not covered by epsilon; leave it "
            "out, or use privacy=none"
        )
    if rules.min_updates > 1:
        raise ConfigError(
            f"min_updates: under client-level privacy every round is released, however few took part, got "
            f"{rules.min_updates}; leave it out"
        )
    if rules.rounds > privacy.rounds:
        raise ConfigError(
            f"privacy.rounds: expected at least the run's {rules.rounds}, for which noise has to be enough, "
            f"got {privacy.rounds}; leave it out"
        )


def check_rows(dataset: Dataset) -> None:
    """Refuse a data set of which private rows would decide something in the open.

    Published rows have nothing to hide. Of other rows one record more could add a label, and so a row to the
    classifier, unless all labels are named (`data.labels`) or stand in the test rows. Test rows are measured
    exactly in every round, so they must not be cut from the private rows: whoever names a test file says that
    its rows may be seen.

    Raises:
        ConfigError: says what decides, and what to name.
    """
    if dataset.published or not dataset.train:
        return
    if dataset.cut:
        raise ConfigError(
            "privacy: the rows to evaluate on are cut from the private training rows, and every round tells "
            "the accuracy on them without noise; say evaluate.rows=test, and name rows that may be seen: "
            "data.test=FILE, or data.test_split of data=hub"
        )
    if not dataset.declared and {*dataset.labels} > {row.target for row in dataset.test}:
        raise ConfigError(
            "privacy: the training rows have labels that no test row has, and a private record must not "
            "decide which labels there are; name all of them with data.labels=[...]"
        )


def check_sum(privacy: Privacy | None, strategy: Strategy, rules: RoundConfig, clients: int) -> None:
    """Refuse secure sums where a sum is not enough, or would show what it should hide.

    Args:
        privacy: the run's; None for none.
        strategy: the algorithm.
        rules: those of the run.
        clients: how many there are.

    Raises:
        ConfigError: says what, and why.
    """
    if strategy.personal or not strategy.linear:
        raise ConfigError(
            f"secure_sum: strategy {type(strategy).__name__} needs more of its clients' updates than the "
            "mean of their factors, which is all that such a sum shows; use "
            f"{strategies(lambda s: s.linear and not s.personal)}"
        )
    if rules.evaluate_updates:
        raise ConfigError("evaluate.updates: under secure_sum nobody sees a single update; leave it out")
    if (sampled := min(rules.clients_per_round or clients, clients)) < LEAST:
        raise ConfigError(
            f"secure_sum: expected at least {LEAST} clients a round, got {sampled}: of two clients each "
            "knows the other's update from the sum; raise clients and clients_per_round"
        )
    if isinstance(privacy, ClientLevel) and privacy.clip * clients >= LARGEST_SUM:
        raise ConfigError(
            f"privacy.clip: under secure_sum expected less than {LARGEST_SUM / clients:g}, so that a sum of "
            f"{clients} clients fits into the masked numbers, got {privacy.clip:g}"
        )


def try_out(
    client: Client, base: Base, strategy: Strategy, tasks: Sequence[Task], sizes: Sequence[int]
) -> None:
    """Plan every client's noise, and test that its records' gradients are its own.

    Raises:
        ConfigError: a client's records are too few, or no noise is enough.
        ModelError: the model mixes records.
    """
    if any(task.mask is not None for task in tasks):
        raise ConfigError(
            f"privacy: the sparse rounds of {type(strategy).__name__} have no gradient for each record; say "
            "strategy.sparse_rounds=0, or privacy=none"
        )
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
        CheckpointError: a ledger was deleted or put back to an older one.
    """
    let_out: dict[int, float] = {}
    if isinstance(privacy, ClientLevel):
        # A round that released nothing, such as one whose sum was not known, has cost nothing.
        told = [0.0, *(line["epsilon"] for line in folder.rounds())]
        let_out[SERVER] = sum(after > before for before, after in pairwise(told))
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


def told_ledgers(lines: Iterable[Mapping[str, Any]], accountant: Accountant) -> dict[int, Ledger]:
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


def _with_lost(ledger: Ledger, entry: Entry, told: float, most: int) -> Ledger:
    """The ledger with as many more rounds of an entry as it takes to reach the epsilon that is told."""

    def more(rounds: int) -> Ledger:
        return ledger.plus(replace(entry, steps=rounds * entry.steps))

    if not told < math.inf or ledger.epsilon >= told * (1 - 1e-9):
        return ledger
    return more(bisect_left(range(most), told * (1 - 1e-9), key=lambda rounds: more(rounds).epsilon))


def planned(privacy: Privacy) -> int:
    """For how many rounds the noise is made: of a client, or of the run."""
    if isinstance(privacy, DPSGD):
        return privacy.participations
    assert isinstance(privacy, ClientLevel)
    return privacy.rounds


def more_rounds(config: DictConfig, rounds: int) -> None:
    """Refuse to add rounds to a run whose noise was made for fewer."""
    privacy: Privacy | None = named(config, "privacy", Privacy)
    if privacy is not None and rounds > max(planned(privacy), config.rounds):
        raise ConfigError(
            f"resume: the noise of this run is for {planned(privacy)} rounds, more would break its epsilon "
            f"of {privacy.epsilon:g}; start a new run with rounds={rounds}"
        )
