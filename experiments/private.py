"""What privacy asks of a run before it starts, and what a run says of what was spent."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from fedlora.client import Client
from fedlora.engine import SERVER, Rules, RunFolder
from fedlora.engine.secure import LEAST
from fedlora.errors import CheckpointError, ConfigError
from fedlora.models import Base
from fedlora.privacy import DPSGD, ClientLevel, Entry, Ledger, Plan, Privacy, self_test, worst
from fedlora.privacy.ledger import Accountant
from fedlora.protocol import Task
from fedlora.strategy import Strategy

from .targets import named


def check(privacy: Privacy, strategy: Strategy, rules: Rules, dora: bool) -> None:
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


def _check_central(privacy: ClientLevel, strategy: Strategy, rules: Rules) -> None:
    name = type(strategy).__name__
    if not (strategy.linear or strategy.products):
        raise ConfigError(
            f"privacy: strategy {name} needs more of its clients' updates than their mean, such as norms or "
            "which directions each has, and one client could change that without bound; use ffalora, fedit, "
            "fedsvd, rolora, slora or flexlora, or privacy=dp_sgd, for which one global model is enough"
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


def check_sum(strategy: Strategy, rules: Rules, clients: int) -> None:
    """Refuse secure sums where a sum is not enough, or would show what it should hide.

    Args:
        strategy: the algorithm.
        rules: those of the run.
        clients: how many there are.

    Raises:
        ConfigError: says what, and why.
    """
    if strategy.personal or not strategy.linear:
        raise ConfigError(
            f"secure_sum: strategy {type(strategy).__name__} needs more of its clients' updates than the "
            "mean of their factors, which is all that such a sum shows; use ffalora, fedit, fedsvd, rolora, "
            "slora or privatelora"
        )
    if rules.evaluate_updates:
        raise ConfigError("evaluate.updates: under secure_sum nobody sees a single update; leave it out")
    if (sampled := min(rules.clients_per_round or clients, clients)) < LEAST:
        raise ConfigError(
            f"secure_sum: expected at least {LEAST} clients a round, got {sampled}: of two clients each "
            "knows the other's update from the sum; raise clients and clients_per_round"
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
        let_out[SERVER] = min(len(folder.rounds()), privacy.rounds)
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


def opening(privacy: Privacy, plans: Sequence[Plan]) -> str:
    """What is promised, in a line; a second one where it is not."""
    sigmas = [plan.sigma for plan in plans]
    low, high = min(sigmas), max(sigmas)
    noise = f"{high:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"
    if isinstance(privacy, ClientLevel):
        whom = "over the whole run, for one client more or less"
        rest = f"each client in a round with probability {plans[0].q:.3g}, for {planned(privacy)} rounds"
    else:
        whom = "a client over the whole run, for one record more or less"
        rest = f"Poisson batches, for {planned(privacy)} rounds a client"
    text = f"privacy: epsilon {privacy.epsilon:g} {whom}; clip {privacy.clip:g}, sigma {noise}, {rest}"
    return text if privacy.valid else f"{text}\nprivacy: NOT VALID, the noise comes from insecure_test_seed"


def spent(privacy: Privacy, ledgers: Iterable[Ledger]) -> dict[str, Any]:
    """What was spent, for the line of a round: the largest epsilon of all clients, never the mean."""
    found = list(ledgers)
    top = worst(found)
    epsilon, delta = 0.0 if top is None else top.epsilon, privacy.delta
    if found:
        delta = max(ledger.delta for ledger in found)
    told: dict[str, Any] = {"epsilon": epsilon, "delta": delta}
    if privacy.hides_counts:
        told = {"epsilon": privacy.epsilon, "delta": 1e-5 if privacy.delta is None else privacy.delta}
    elif found:
        told["sigma"] = min((e.sigma for ledger in found for e in ledger.entries), default=None)
    valid = privacy.valid and all(ledger.valid for ledger in found)
    return told | {"clip": privacy.clip, "epsilon_valid": valid}


def summary(privacy: Privacy, ledgers: Mapping[int, Ledger], secure_sum: bool) -> dict[str, Any]:
    """What was spent and what it means, for the summary of a run.

    Args:
        privacy: the settings.
        ledgers: by client; for client-level privacy the server's alone.
        secure_sum: whether the server saw sums only.
    """
    told = spent(privacy, ledgers.values())
    form = Ledger(1.0, accountant=privacy.accountant, unit=privacy.unit).record()
    names = ("epsilon", "delta", "valid", "entries")
    each = {str(k): {n: ledger.record()[n] for n in names} for k, ledger in ledgers.items()}
    server = each.pop(str(SERVER), None)
    return {
        "epsilon": told["epsilon"],
        "delta": told["delta"],
        "epsilon_valid": told["epsilon_valid"],
        "ledger": {
            "budget": privacy.epsilon,
            "clip": privacy.clip,
            "valid": told["epsilon_valid"],
            **{name: form[name] for name in ("unit", "adjacency", "mechanism", "accountant")},
            "not_covered": not_covered(privacy, secure_sum),
            **({"server": server} if server else {}),
            "clients": {} if privacy.hides_counts else each,
        },
    }


def not_covered(privacy: Privacy, secure_sum: bool = False) -> list[str]:
    """What a run lets out beside what its epsilon is of."""
    found = ["settings that were chosen by looking at the private rows", "that a client failed"]
    if isinstance(privacy, DPSGD) and privacy.public_counts:
        found.append("how many records a client has (privacy.public_counts)")
    elif isinstance(privacy, DPSGD):
        found.append(
            "how many records a client has, as far as the strength of its noise, the time it takes and what "
            "it refuses tell it (privacy.public_counts=false keeps it out of messages alone)"
        )
    if isinstance(privacy, DPSGD) and privacy.public_metrics:
        found.append("training losses and shares of clipped records (privacy.public_metrics)")
    if isinstance(privacy, ClientLevel):
        found.append("who took part, with losses and numbers of rows, in clients.jsonl and report.html")
        found.append("how many took part, in metrics.jsonl")
        if not secure_sum:
            found.append(
                "what the server itself sees: every update in the clear (secure_sum=true hides them)"
            )
    return found


def closing(summary: Mapping[str, Any]) -> str:
    """What a finished run has spent, for the terminal."""
    ledger = summary["ledger"]
    whose = "of the server's releases" if ledger["unit"] == "client" else "the largest of all clients"
    text = (
        f"epsilon {summary['epsilon']:.3f} of {ledger['budget']:g} at delta {summary['delta']:g}, {whose}; "
        f"to {ledger['adjacency']}; Poisson samples"
    )
    text = text if ledger["valid"] else f"{text}; NOT VALID, the noise came from insecure_test_seed"
    return f"{text}\nnot covered: {'; '.join(ledger['not_covered'])}"


def more_rounds(config: DictConfig, rounds: int) -> None:
    """Refuse to add rounds to a run whose noise was made for fewer."""
    privacy: Privacy | None = named(config, "privacy", Privacy)
    if privacy is not None and rounds > max(planned(privacy), config.rounds):
        raise ConfigError(
            f"resume: the noise of this run is for {planned(privacy)} rounds, more would break its epsilon "
            f"of {privacy.epsilon:g}; start a new run with rounds={rounds}"
        )
