"""What a run says of its privacy: what it promises, what was spent, and what no epsilon covers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedlora.privacy import DPSGD, ClientLevel, Ledger, Plan, Privacy, worst
from fedlora.privacy.ledger import Unit
from fedlora.runner.privacy_checks import planned
from fedlora.storage.run_folder import SERVER


def opening(privacy: Privacy, plans: Sequence[Plan]) -> str:
    """What is promised, in a line; a second one where it is not."""
    sigmas = [plan.sigma for plan in plans]
    low, high = min(sigmas), max(sigmas)
    noise = f", sigma {high:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f", sigma {low:.3f} to {high:.3f}"
    if privacy.hides_counts:  # it follows from how many records a client has
        noise = ""
    if isinstance(privacy, ClientLevel) and plans[0].unit == "contribution":
        whom = "over the whole run, for the updates of one client, whose presence is known"
        rest = f"clients of a round are known under masks, for {privacy.planned} rounds"
    elif isinstance(privacy, ClientLevel):
        whom = "over the whole run, for one client more or less"
        rest = f"each client in a round with probability {plans[0].q:.3g}, for {privacy.planned} rounds"
    else:
        whom = "a client over the whole run, for one record more or less"
        rest = f"Poisson batches, for {planned(privacy)} rounds a client"
    text = f"privacy: epsilon {privacy.epsilon:g} {whom}; clip {privacy.clip:g}{noise}, {rest}"
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
    unit: Unit = "contribution" if isinstance(privacy, ClientLevel) and secure_sum else privacy.unit
    form = Ledger(1.0, accountant=privacy.accountant, unit=unit).record()
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
    found = [
        "settings that were chosen by looking at the private rows",
        "that a client failed or refused, from which follows whether all of its rows have the columns and "
        "labels that the run names",
        "how long the run and its rounds take and how much memory, which grow with the rows",
        "digests of the rows, in checkpoint/inputs.json",
        "the test rows, on which the model is measured without noise",
    ]
    if isinstance(privacy, DPSGD) and privacy.public_counts:
        found.append("how many records a client has (privacy.public_counts)")
    elif isinstance(privacy, DPSGD):
        found.append(
            "how many records a client has, as far as the strength of its noise, the time it takes and what "
            "it refuses tell it (privacy.public_counts=false keeps it out of messages alone)"
        )
        found.append("the clients' own ledgers, which in a simulation lie in checkpoint/ and tell their rows")
    if isinstance(privacy, DPSGD) and privacy.public_metrics:
        found.append("training losses and shares of clipped records (privacy.public_metrics)")
    if isinstance(privacy, ClientLevel):
        found.append(
            "who took part, with losses, numbers of rows and why a client failed, in clients.jsonl, "
            "report.html and warnings"
        )
        found.append(
            "how many took part, and the bytes they sent, in metrics.jsonl, summary.json and trackers"
        )
        found.append(
            "that a sum under masks was not known, which tells how many were there and delivered"
            if secure_sum
            else "what the server itself sees: every update in the clear (secure_sum=true hides them)"
        )
    return found


def closing(summary: Mapping[str, Any]) -> str:
    """What a finished run has spent, for the terminal."""
    ledger = summary["ledger"]
    whose = "the largest of all clients" if ledger["unit"] == "record" else "of the server's releases"
    drawn = "" if ledger["unit"] == "contribution" else "; Poisson samples"
    text = (
        f"epsilon {summary['epsilon']:.3f} of {ledger['budget']:g} at delta {summary['delta']:g}, {whose}; "
        f"to {ledger['adjacency']}{drawn}"
    )
    text = text if ledger["valid"] else f"{text}; NOT VALID, the noise came from insecure_test_seed"
    return f"{text}\nnot covered: {'; '.join(ledger['not_covered'])}"
