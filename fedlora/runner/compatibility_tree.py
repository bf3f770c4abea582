"""Refused pairings with a tree of edges; `compatibility` lists them all."""

import math

from fedlora.core.bundle import bundled
from fedlora.core.strategy import named
from fedlora.engines.base import fans
from fedlora.privacy import ClientLevel
from fedlora.rounds.scheduling import Synchronous

from .dealt import Dealt
from .spec import RunSpec


def _edges(spec: RunSpec) -> bool:
    """Whether there is any edge between the server and the clients."""
    return len(fans(spec.engine.tree)) > 1


def strategy_over_a_tree(spec: RunSpec) -> str | None:
    """A strategy for which clients' updates do not add up."""
    if _edges(spec) and bundled(spec.strategy) is None:
        return (
            f"engine.tree: what {spec.strategy_class} makes of its clients is no weighted mean of what they "
            f"send, so that no edge can add them up; use {named(lambda cls: bundled(cls) is not None)}, or "
            "engine.tree=null"
        )
    return None


def single_updates_over_a_tree(spec: RunSpec) -> str | None:
    """What needs single updates at the server, which is sent sums."""
    if not _edges(spec):
        return None
    for what, asked in (
        (f"robust: {type(spec.robust).__name__}", spec.robust is not None),
        ("record_updates", spec.record_updates),
        ("evaluate.updates", spec.evaluate.updates),
        *((f"steps: {type(s).__name__}", s.at_server and not s.at_client) for s in spec.steps),
    ):
        if asked:
            return (
                f"{what}: the server needs each client's update for it, and the edges of engine.tree send "
                "sums; leave one of them out"
            )
    return None


def clipping_over_a_tree(spec: RunSpec) -> str | None:
    """Changes that the server itself must clip; under masks every client clips its own."""
    if _edges(spec) and isinstance(spec.privacy, ClientLevel) and not spec.secure_sum:
        return (
            "engine.tree: under privacy=client_level the server clips every client's change itself, and "
            "edges send sums; say secure_sum=true, where clients clip, or engine.tree=null"
        )
    return None


def scheduler_over_a_tree(spec: RunSpec) -> str | None:
    """Rounds that do not wait for all clients of an edge."""
    if _edges(spec) and type(spec.scheduler) is not Synchronous:
        return (
            f"scheduler: an edge of engine.tree forwards once a round, for all its clients, and under "
            f"{type(spec.scheduler).__name__} they answer one by one; use scheduler=synchronous"
        )
    return None


def room_of_a_tree(known: Dealt) -> str | None:
    """More clients than there are places below the last edges."""
    tree = fans(known.spec.engine.tree)
    if tree and math.prod(tree) < known.clients:
        above = tree[:-1]
        fits = math.ceil(known.clients / max(1, math.prod(above)))
        return (
            f"engine.tree: {list(tree)} has places for {math.prod(tree)} clients, the run has "
            f"{known.clients}; say {[*above, fits]}"
        )
    return None
