"""When to send to whom, and when to aggregate: the order of a run's steps."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flwr.serverapp import Grid

if TYPE_CHECKING:
    from fedlora.rounds.loop import ServerLoop


class Scheduler(ABC):
    """Puts the steps of `ServerLoop` in order. Subclasses are frozen dataclasses of their settings.

    A scheduler decides when clients are sent tasks and when their updates are aggregated. What a step does is
    the server loop's business: sampling, checks, aggregation, evaluation, logs and checkpoints.
    """

    @abstractmethod
    def rounds(self, server: "ServerLoop", grid: Grid) -> Iterator[dict[str, Any]]:
        """Run the rounds that are left.

        Args:
            server: the steps: `begin_round`, `messages` or `message`, and `finish_round`, until `finished`.
            grid: carries the messages: `send_and_receive`, or `push_messages` and `pull_messages`.

        Yields:
            What `finish_round` returns, the line of a finished round, before the next round begins.
        """


@dataclass(frozen=True)
class Synchronous(Scheduler):
    """Every round waits for the clients that it has asked, or until the timeout.

    McMahan, Moore, Ramage, Hampson, Aguera y Arcas. "Communication-Efficient Learning of Deep Networks from
    Decentralized Data". AISTATS 2017. https://arxiv.org/abs/1602.05629, algorithm 1.
    """

    def rounds(self, server: "ServerLoop", grid: Grid) -> Iterator[dict[str, Any]]:
        """Sample, send, wait, finish."""
        while not server.finished:
            round = server.begin_round(grid)
            replies = grid.send_and_receive(server.messages(round), timeout=server.config.timeout)
            yield server.finish_round(round, replies)
