"""Refused pairings with server optimizers; `compatibility` lists them all."""

from fedlora.core.strategy import named as strategies
from fedlora.engines.base import fans
from fedlora.privacy import ClientLevel

from .dealt import Dealt
from .spec import RunSpec


def server_without_space(spec: RunSpec) -> str | None:
    """A strategy of which nothing means the same from one state to the next, or that does not say what."""
    if spec.server is not None and not spec.strategy.server_space:
        return (
            f"server: strategy {spec.strategy_class} names no space in which what an optimizer remembers "
            f"means the same a round later; use {strategies(lambda s: bool(s.server_space))}, or server="
            "none; a strategy of your own names it by server_space"
        )
    return None


def server_over_a_tree(spec: RunSpec) -> str | None:
    """Edges, which forward sums: what each client was sent and has learned stays below them."""
    if spec.server is not None and len(fans(spec.engine.tree)) > 1:
        return (
            f"server: {type(spec.server).__name__} steps by what clients have learned of what each was sent, "
            f"and the edges of engine.tree forward sums alone; use server=none, or "
            "leave the tree out"
        )
    return None


def server_of_rebased_buffers(spec: RunSpec) -> str | None:
    """An optimizer of factors, where a buffer's sum is cut to a rank and so gets other factors."""
    strategy, scheduler = spec.strategy, spec.scheduler
    rebased = strategy.server_space == "factors" and strategy.staleness == "effective"
    if spec.server is not None and scheduler.mixes_versions and rebased:
        return (
            f"server: under {type(scheduler).__name__} {spec.strategy_class} cuts what a buffer makes to its "
            "rank, which gives it other factors, and what an optimizer remembers of the old ones is no "
            "change of the new ones; use scheduler=synchronous, server=none, ffalora or flexlora"
        )
    return None


def server_of_numbers(spec: RunSpec) -> str | None:
    """An optimizer of single numbers, where the factors get another basis in every round."""
    space = spec.strategy.server_space
    if spec.server is not None and not spec.server.products and space not in ("", "factors"):
        return (
            f"server: {type(spec.server).__name__} steps every number by itself, and {spec.strategy_class} "
            "makes its factors anew, so that what is remembered of a number says nothing of the one in its "
            "place; use server=fedavgm, which works on ΔW, or "
            f"{strategies(lambda s: s.server_space == 'factors')}"
        )
    return None


def server_of_padded_sum(known: Dealt) -> str | None:
    """A sum of factors that are padded with zeros, in which what was learned and what is lacking are one."""
    spec = known.spec
    clipped = isinstance(spec.privacy, ClientLevel)  # whose clients send changes
    if spec.server is not None and spec.secure_sum and not clipped and len(set(known.ranks)) > 1:
        return (
            "server: under secure_sum the sum of factors of different ranks does not tell what clients have "
            "learned from what the smaller ones lack, and the server would gain momentum in both; use one "
            f"rank instead of {sorted(set(known.ranks))}, or server=none"
        )
    return None
