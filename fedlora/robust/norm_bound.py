"""The norm bound: no client changes more than most do."""

import math
from dataclasses import dataclass, replace
from statistics import median_low

from fedlora.core.update_step import RoundUpdates
from fedlora.ranges import check_number
from fedlora.robust.base import Robust, averages_both, capped
from fedlora.robust.geometry import Segment


@dataclass(frozen=True)
class NormBound(Robust):
    """No client changes more than most do: a longer change goes back towards where the client started.

    Sun, Kairouz, Suresh, McMahan. "Can You Really Backdoor Federated Learning?". 2019.
    https://arxiv.org/abs/1911.07963. Their bound is a number; here it follows the round's median.

    The length is that of all changes of ΔW and of the head together. Where A and B are both averaged, it is
    also that of the factors' own change, since A · c and B / c hide any c in one and the same product.

    Args:
        multiple: of the median length of the round's clients, which is the bound.
        bound: the length itself instead, for the change of ΔW and the head.
    """

    multiple: float = 1.0
    bound: float | None = None

    def __post_init__(self) -> None:
        check_number("robust.multiple", self.multiple, above=0)
        check_number("robust.bound", self.bound, above=0, none=True)

    def on_server(self, given: RoundUpdates) -> RoundUpdates:
        """Every update as far along its own segment as the bound allows."""
        updates, tasks = given.updates, given.tasks
        ways = [Segment.of(task, update.adapter) for task, update in zip(tasks, updates, strict=True)]
        bound = self.bound or self.multiple * median_low(way.length() for way in ways)
        raw = math.inf
        if averages_both(given.strategy, tasks):
            raw = self.multiple * median_low(way.raw for way in ways)
        kept = [way.within(bound, raw) for way in ways]
        bounded = [
            replace(update, adapter=way.at(t))
            for update, way, t in zip(capped(updates), ways, kept, strict=True)
        ]
        notes = {
            update.peer.id: {"change": way.length(), **({"kept": t} if t < 1 else {})}
            for update, way, t in zip(updates, ways, kept, strict=True)
            if update.peer
        }
        metrics = {"bound": bound, "bounded": sum(t < 1 for t in kept)}
        return given.become(bounded, notes=notes, metrics=metrics)
