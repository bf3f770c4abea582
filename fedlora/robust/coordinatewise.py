"""Robust rules by coordinate: the median and the trimmed mean of what clients have changed.

Yin, Chen, Kannan, Bartlett. "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates". ICML
2018. https://arxiv.org/abs/1803.01498

Clients count alike here, however many examples they have: there is no majority by weight that could not be
lied about. The result goes to the strategy as one update of a client of the largest ranks:

    linear in factors    each coordinate of each shared tensor, over the clients whose rank holds it
    of products          each coordinate of every ΔW, dense, module by module, over all clients
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.core.algebra import dense
from fedlora.core.messages import Task, Update
from fedlora.core.strategy import Strategy, named
from fedlora.core.update_step import RoundUpdates
from fedlora.core.vectors import factor_change, form, moved_factors, moved_products
from fedlora.errors import ConfigError
from fedlora.privacy import Privacy
from fedlora.ranges import check_number
from fedlora.robust.base import Robust
from fedlora.robust.geometry import change
from fedlora.rounds.round_config import RoundConfig

Changes = dict[str, Tensor]


class ByCoordinate(Robust):
    """A rule that makes one change of all, coordinate by coordinate."""

    @property
    @abstractmethod
    def share(self) -> float:
        """Of the values of a coordinate, how many are left out at either end."""

    def check(self, strategy: Strategy, rules: RoundConfig, privacy: Privacy | None) -> None:
        """Refuse strategies, too, that need more of a round than one update."""
        super().check(strategy, rules, privacy)
        if not (strategy.linear or strategy.products):
            raise ConfigError(
                f"robust: strategy {type(strategy).__name__} needs more than one update that stands for all, "
                f"which is what {type(self).__name__} makes of them; use "
                f"{named(lambda s: (s.linear or s.products) and not s.personal)}, or robust=norm or krum"
            )

    def on_server(self, given: RoundUpdates) -> RoundUpdates:
        """One update that stands for all; its line says how far each client is from it."""
        strategy, updates, tasks, wide = given.strategy, given.updates, given.tasks, given.wide
        total, alone, size = Changes(), 0, 0
        gaps, length = torch.zeros(len(updates), dtype=torch.float64), 0.0
        values = _factors if strategy.linear else _products
        for name, own in values(wide, updates, tasks):
            found = middle(own, self.share)
            gaps += (own - found).nan_to_num().square().reshape(len(own), -1).sum(1).cpu()
            length += float(found.square().sum())
            voices = (~own.isnan()).sum(0)
            alone, size, total[name] = alone + int((voices < 3).sum()), size + voices.numel(), found
        moved = moved_factors(wide, total) if strategy.linear else moved_products(wide, total)
        notes = {
            update.peer.id: {"distance": math.sqrt(gap / length) if length else 0.0}
            for update, gap in zip(updates, gaps.tolist(), strict=True)
            if update.peer
        }
        # Of two values none is the odd one out: what fewer than three hold, no rule protects.
        return given.become([Update(moved)], [wide], notes, {"unprotected": alone / max(1, size)})


@dataclass(frozen=True)
class Median(ByCoordinate):
    """The median of every coordinate: no minority turns it, and what a minority alone has learned is lost."""

    @property
    def share(self) -> float:
        """All but the middle one or two."""
        return 0.5


@dataclass(frozen=True)
class TrimmedMean(ByCoordinate):
    """The mean of every coordinate without its extremes: nearer to the mean than the median is.

    Args:
        share: β, of the values left out at either end, rounded up; above 0 and below 0.5. It should be no
            smaller than the share of bad clients.
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        check_number("robust.share", self.share, above=0, below=0.5)


def middle(values: Tensor, share: float) -> Tensor:
    """The mean over axis 0 of what is left of each coordinate without its smallest and its largest values.

    Args:
        values: (n, ...), float64; NaN is no value.
        share: of the values left out at either end, rounded up; one or two always stay, at 0.5 no more.

    Returns:
        (...), 0 where there is no value at all.
    """
    count = (~values.isnan()).sum(0)
    cut = torch.minimum((share * count - 1e-9).ceil().long(), (count - 1) // 2).clamp_min(0)
    ordered = values.sort(dim=0).values  # NaN last
    place = torch.arange(len(values), device=values.device).view(-1, *[1] * count.ndim)
    stays = (place >= cut) & (place < count - cut)
    return torch.where(stays, ordered, 0.0).sum(0) / stays.sum(0).clamp_min(1)


def _factors(wide: Task, updates: Sequence[Update], tasks: Sequence[Task]) -> Iterator[tuple[str, Tensor]]:
    """The clients' changes of each shared tensor, (n, ...); NaN beyond a client's rank: zeros do not vote."""
    moved = [factor_change(t.adapter, u.adapter, wide) for t, u in zip(tasks, updates, strict=True)]
    own = [form(task) for task in tasks]
    for name, shape in form(wide).items():
        held = moved[0][name].new_full((len(moved), *shape), math.nan)
        for k, client in enumerate(moved):
            corner = tuple(slice(0, length) for length in own[k][name])
            held[k][corner] = client[name][corner]
        yield name, held


def _products(wide: Task, updates: Sequence[Update], tasks: Sequence[Task]) -> Iterator[tuple[str, Tensor]]:
    """The clients' changes of each ΔW, dense, one module at a time, and of each extra, (n, ...)."""
    both = [(task.adapter, update.adapter) for task, update in zip(tasks, updates, strict=True)]
    for name in wide.adapter.pairs:
        yield name, torch.stack([dense(change(sent.pairs[name], got.pairs[name])) for sent, got in both])
    for name in wide.adapter.extra:
        yield name, torch.stack([got.extra[name].double() - sent.extra[name].double() for sent, got in both])
