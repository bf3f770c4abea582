"""What privacy asks of a run before it starts, and what a run says of what was spent."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from fedlora.client import Client
from fedlora.engine import Rules
from fedlora.errors import ConfigError
from fedlora.models import Base
from fedlora.privacy import DPSGD, Ledger, self_test, worst
from fedlora.protocol import Task
from fedlora.strategy import Strategy


def check(strategy: Strategy, rules: Rules, dora: bool) -> None:
    """Refuse what cannot be done under differential privacy of records, or would not be covered by it.

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
    if dora:
        raise ConfigError(
            "lora.dora: has no gradient for each record here; leave it out, or use privacy=none"
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


def opening(privacy: DPSGD, sigmas: Sequence[float]) -> str:
    """What is promised, in a line."""
    low, high = min(sigmas), max(sigmas)
    noise = f"{high:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"
    text = (
        f"privacy: epsilon {privacy.epsilon:g} a client over the whole run, for one record more or less; "
        f"clip {privacy.clip:g}, sigma {noise}, Poisson batches, for {privacy.participations} rounds a client"
    )
    return text if privacy.valid else f"{text}\nprivacy: NOT VALID, the noise comes from insecure_test_seed"


def spent(privacy: DPSGD, ledgers: Mapping[int, Ledger]) -> dict[str, Any]:
    """What all clients have spent, for the line of a round: the largest epsilon, never the mean."""
    found = worst(ledgers.values())
    epsilon, delta = 0.0 if found is None else found.epsilon, privacy.delta
    if ledgers:
        delta = max(ledger.delta for ledger in ledgers.values())
    if not privacy.public_counts:
        epsilon, delta = privacy.epsilon, 1e-5 if privacy.delta is None else privacy.delta
    valid = privacy.valid and all(ledger.valid for ledger in ledgers.values())
    return {"epsilon": epsilon, "delta": delta, "epsilon_valid": valid}


def summary(privacy: DPSGD, ledgers: Mapping[int, Ledger]) -> dict[str, Any]:
    """What all clients have spent and what it means, for the summary of a run."""
    told = spent(privacy, ledgers)
    clients: dict[str, Any] = {}
    if privacy.public_counts:
        names = ("epsilon", "delta", "valid", "entries")
        clients = {str(k): {n: ledger.record()[n] for n in names} for k, ledger in ledgers.items()}
    form = Ledger(1.0, accountant=privacy.accountant).record()
    rest = {name: form[name] for name in ("unit", "adjacency", "mechanism", "accountant")}
    return {
        **told,
        "ledger": {"budget": privacy.epsilon, "clip": privacy.clip, "valid": told["epsilon_valid"], **rest}
        | {"clients": clients},
    }


def closing(summary: Mapping[str, Any]) -> str:
    """What a finished run has spent, for the terminal."""
    ledger = summary["ledger"]
    text = (
        f"epsilon {summary['epsilon']:.3f} of {ledger['budget']:g} at delta {summary['delta']:g}, the "
        f"largest of all clients; to {ledger['adjacency']}; Poisson batches"
    )
    return text if ledger["valid"] else f"{text}; NOT VALID, the noise came from insecure_test_seed"


def more_rounds(config: DictConfig, rounds: int) -> None:
    """Refuse to add rounds to a run whose noise was made for fewer."""
    planned = (config.get("privacy") or {}).get("participations")
    if planned is not None and rounds > max(planned, config.rounds):
        raise ConfigError(
            f"resume: the noise of this run is for {planned} rounds a client, more would break its epsilon "
            f"of {config.privacy.epsilon:g}; start a new run with rounds={rounds}"
        )
