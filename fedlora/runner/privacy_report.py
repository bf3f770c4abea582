"""What a run reports about its privacy: the guarantee, the epsilon spent, and what epsilon does not cover."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedlora.privacy import DPSGD, ClientLevel, Ledger, Plan, Privacy, worst
from fedlora.privacy.ledger import Unit
from fedlora.runner.privacy_checks import planned
from fedlora.storage.run_folder import SERVER


def opening(privacy: Privacy, plans: Sequence[Plan]) -> str:
    """The guarantee in one line; a second line where the noise is not random."""
    sigmas = [plan.sigma for plan in plans]
    low, high = min(sigmas), max(sigmas)
    noise = f", sigma {high:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f", sigma {low:.3f} to {high:.3f}"
    if privacy.hides_counts:  # sigma depends on how many records a client has
        noise = ""
    if isinstance(privacy, ClientLevel) and plans[0].unit == "contribution":
        whom = "over the whole run for the updates of one client, whose presence is public"
        rest = f"the clients of a round are public under secure_sum, noise for {privacy.planned} rounds"
    elif isinstance(privacy, ClientLevel):
        whom = "over the whole run for adding or removing one client"
        rest = f"Poisson-sampled clients, rate {plans[0].q:.3g}, noise for {privacy.planned} rounds"
    else:
        whom = "for each client over the whole run, for adding or removing one record"
        rest = f"Poisson-sampled batches, noise for {planned(privacy)} rounds of a client"
    text = f"privacy: epsilon {privacy.epsilon:g} {whom}; clip {privacy.clip:g}{noise}, {rest}"
    return text if privacy.valid else f"{text}\nprivacy: NOT VALID, the noise comes from insecure_test_seed"


def spent(privacy: Privacy, ledgers: Iterable[Ledger]) -> dict[str, Any]:
    """What was spent, for the line of a round: the largest epsilon of all clients, not their mean."""
    found = list(ledgers)
    top = worst(found)
    epsilon, delta = 0.0 if top is None else top.epsilon, privacy.delta
    if found:
        delta = max(ledger.delta for ledger in found)
    line: dict[str, Any] = {"epsilon": epsilon, "delta": delta}
    if privacy.hides_counts:
        line = {"epsilon": privacy.epsilon, "delta": 1e-5 if privacy.delta is None else privacy.delta}
    elif found:
        line["sigma"] = min((e.sigma for ledger in found for e in ledger.entries), default=None)
    valid = privacy.valid and all(ledger.valid for ledger in found)
    return line | {"clip": privacy.clip, "epsilon_valid": valid}


def summary(privacy: Privacy, ledgers: Mapping[int, Ledger], secure_sum: bool) -> dict[str, Any]:
    """What was spent, and the definition of what it bounds, for the summary of a run.

    Args:
        privacy: the settings.
        ledgers: by client; under client-level privacy the server's alone.
        secure_sum: whether the run used secure aggregation.
    """
    totals = spent(privacy, ledgers.values())
    unit: Unit = "contribution" if isinstance(privacy, ClientLevel) and secure_sum else privacy.unit
    form = Ledger(1.0, accountant=privacy.accountant, unit=unit).record()
    names = ("epsilon", "delta", "valid", "entries")
    each = {str(k): {n: ledger.record()[n] for n in names} for k, ledger in ledgers.items()}
    server = each.pop(str(SERVER), None)
    return {
        "epsilon": totals["epsilon"],
        "delta": totals["delta"],
        "epsilon_valid": totals["epsilon_valid"],
        "ledger": {
            "budget": privacy.epsilon,
            "clip": privacy.clip,
            "valid": totals["epsilon_valid"],
            **{name: form[name] for name in ("unit", "adjacency", "mechanism", "accountant")},
            "not_covered": not_covered(privacy, secure_sum),
            **({"server": server} if server else {}),
            "clients": {} if privacy.hides_counts else each,
        },
    }


def not_covered(privacy: Privacy, secure_sum: bool = False) -> list[str]:
    """What a run reveals that its epsilon does not bound, a phrase each."""
    found = [
        "hyperparameters that were chosen by looking at private rows, also by earlier runs on them",
        "that a client failed or refused, which shows whether all of its rows have the columns and labels "
        "that the run names",
        "how long the run and its rounds take, and how much memory they use: both depend on the rows",
        "digests of the rows, which are in checkpoint/inputs.json",
        "the test rows, on which the model is evaluated without noise",
    ]
    if isinstance(privacy, DPSGD):
        found.append("a person with records at several clients, whose epsilons add up")
    if isinstance(privacy, DPSGD) and privacy.public_counts:
        found.append("how many records a client has, which is public (privacy.public_counts=true)")
    elif isinstance(privacy, DPSGD):
        found.append(
            "how many records a client has: no message contains it (privacy.public_counts=false), but the "
            "strength of the client's noise, its time and its refusals depend on it"
        )
        found.append(
            "the clients' own ledgers, from which their numbers of records follow; a simulation keeps them "
            "in checkpoint/"
        )
    if isinstance(privacy, DPSGD) and privacy.public_metrics:
        found.append(
            "training losses and shares of clipped records, which have no noise (privacy.public_metrics=true)"
        )
    if isinstance(privacy, ClientLevel):
        found.append(
            "who took part, with losses, numbers of rows and reasons of failures: clients.jsonl, report.html "
            "and warnings show it"
        )
        found.append(
            "how many took part, and the bytes they sent: metrics.jsonl, summary.json and trackers show it"
        )
        found.append(
            "whether the sum under masks was known, which shows how many clients were present and delivered"
            if secure_sum
            else "what the server itself sees: every update without noise (secure_sum=true hides the updates)"
        )
    return found


def closing(summary: Mapping[str, Any]) -> str:
    """What a finished run has spent and what that bounds, for the terminal."""
    ledger = summary["ledger"]
    whose = ", the largest of all clients" if ledger["unit"] == "record" else ""
    drawn = "" if ledger["unit"] == "contribution" else "; samples are Poisson samples"
    text = f"epsilon {summary['epsilon']:.3f} of {ledger['budget']:g} at delta {summary['delta']:g}{whose}"
    text = text if ledger["valid"] else f"{text}; NOT VALID, the noise came from insecure_test_seed"
    bounds = f"definition: {ledger['adjacency']}{drawn}"
    return f"{text}\n{bounds}\nepsilon does not cover: {'; '.join(ledger['not_covered'])}"
