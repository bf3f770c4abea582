"""Refused pairings with schedulers that do not wait for all; `compatibility` lists them all."""

from fedlora.core.strategy import named as strategies
from fedlora.privacy import DPSGD, ClientLevel
from fedlora.schedulers import Buffered

from .dealt import Dealt
from .spec import RunSpec


def versions_of_strategy(spec: RunSpec) -> str | None:
    """A strategy that does not say what becomes of an update of an old version."""
    if spec.scheduler.mixes_versions and spec.strategy.staleness == "refused":
        able = strategies(lambda strategy: strategy.staleness != "refused")
        return (
            f"scheduler: under {type(spec.scheduler).__name__} updates answer to older states, and strategy "
            f"{spec.strategy_class} wants all of a round at the same stage (its `staleness` is refused); use "
            f"{able}, or scheduler=synchronous"
        )
    return None


def versions_under_masks(spec: RunSpec) -> str | None:
    """Masks cancel in the sum of all who agreed on them, and those need not come into one buffer."""
    if spec.scheduler.mixes_versions and spec.secure_sum:
        return (
            f"secure_sum: masks cancel in the sum of all clients that agreed on them, and under "
            f"{type(spec.scheduler).__name__} those come into different buffers; use scheduler=synchronous"
        )
    return None


def versions_under_robust_rule(spec: RunSpec) -> str | None:
    """A robust rule holds updates against one another, which must have started from the same state."""
    if spec.scheduler.mixes_versions and spec.robust is not None:
        return (
            f"robust: {type(spec.robust).__name__} compares updates, and under "
            f"{type(spec.scheduler).__name__} they start from different states, so that an old one looks "
            "like a bad one; use scheduler=synchronous, or steps=[Clip], which looks at each by itself"
        )
    return None


def ledgers_of_sites(spec: RunSpec) -> str | None:
    """What sites have spent that are still at work when the last buffer is full."""
    if spec.scheduler.mixes_versions and spec.engine.sites and isinstance(spec.privacy, DPSGD):
        return (
            f"scheduler: when the last buffer of {type(spec.scheduler).__name__} is full, other sites are "
            "still at work, and what that costs them is in their own ledgers and not in the epsilon that the "
            "run reports; use scheduler=synchronous, or privacy=none"
        )
    return None


def absences_of_clients(spec: RunSpec) -> str | None:
    """A client that makes a round longer decides with it who is absent from the next one."""
    speeds = spec.engine.speeds
    absent = isinstance(speeds, str) or bool(speeds and (speeds.get("absent") or speeds.get("trace")))
    if absent and isinstance(spec.privacy, ClientLevel):
        return (
            "engine.speeds: a slow client makes a round longer, and so decides who is absent from the next "
            "one; under privacy=client_level nobody may change who else takes part; leave absences out"
        )
    return None


def recorded_versions(spec: RunSpec) -> str | None:
    """Recorded updates are aggregated again as those of one version."""
    if spec.scheduler.mixes_versions and spec.record_updates:
        return (
            f"record_updates: fedlora replay aggregates the updates of a round anew, and under "
            f"{type(spec.scheduler).__name__} the server adds changes by their age instead; leave it out, or "
            "use scheduler=synchronous"
        )
    return None


def full_buffer(known: Dealt) -> str | None:
    """A buffer that no number of clients could fill, since each is in it once."""
    scheduler, clients = known.spec.scheduler, known.spec.clients_per_round or known.clients
    buffer = scheduler.size(clients) if isinstance(scheduler, Buffered) else 1
    if scheduler.mixes_versions and buffer > known.clients:
        return (
            f"scheduler.buffer: expected at most {known.clients}, the number of clients, each of whom is in "
            f"a buffer once; got {buffer}"
        )
    if scheduler.mixes_versions and known.spec.min_updates > buffer:
        return (
            f"min_updates: expected at most {buffer}, the updates of a buffer; got {known.spec.min_updates}"
        )
    return None
