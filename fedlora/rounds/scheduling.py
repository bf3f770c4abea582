"""When to send to whom, and when to aggregate: the order of a run's steps."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flwr.serverapp import Grid

from fedlora.rounds.aggregation.base import Aggregation

if TYPE_CHECKING:
    from fedlora.rounds.loop import ServerLoop


class Scheduler(ABC):
    """Puts the steps of `ServerLoop` in order. Subclasses are frozen dataclasses of their settings.

    A scheduler decides when clients are sent tasks and when their updates are aggregated. What a step does is
    the server loop's business: sampling, checks, aggregation, evaluation, logs and checkpoints.

    A fact that is read before a run begins:
        mixes_versions: do updates of different versions come into one aggregation?
    """

    mixes_versions: ClassVar[bool] = False

    @abstractmethod
    def rounds(self, server: "ServerLoop", grid: Grid) -> Iterator[dict[str, Any]]:
        """Run the rounds that are left.

        Args:
            server: the steps: `begin_round`, `messages` or `message`, and `finish_round`, until `finished`.
            grid: carries the messages: `send_and_receive`, or `push_messages` and `pull_messages`.

        Yields:
            What `finish_round` returns, the line of a finished round, before the next round begins.
        """

    def aggregation(self, synchronous: Aggregation) -> Aggregation:
        """How updates are combined, where that depends on their versions; by default as in other rounds.

        Args:
            synchronous: how the updates of one version are combined.
        """
        return synchronous


@dataclass(frozen=True)
class Synchronous(Scheduler):
    """Every round waits for the clients that it has asked, or until the timeout.

    In virtual time a round takes as long as the slowest of those that it waits for.

    McMahan, Moore, Ramage, Hampson, Aguera y Arcas. "Communication-Efficient Learning of Deep Networks from
    Decentralized Data". AISTATS 2017. https://arxiv.org/abs/1602.05629, algorithm 1.
    """

    def rounds(self, server: "ServerLoop", grid: Grid) -> Iterator[dict[str, Any]]:
        """Sample, send, wait, finish."""
        while not server.finished:
            round = server.begin_round(grid)
            late = server.late(round)
            messages = (m for m in server.messages(round) if m.metadata.dst_node_id not in late)
            replies = grid.send_and_receive(messages, timeout=server.config.timeout)
            yield server.finish_round(round, replies)
