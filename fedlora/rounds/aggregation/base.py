"""The interface of aggregation: who may be in a round, how replies are read, how the next state follows."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import next_state
from fedlora.core.update_step import RoundUpdates
from fedlora.rounds.aggregation_error import sizes
from fedlora.rounds.codec import read_update
from fedlora.rounds.round_config import RoundConfig
from fedlora.seeds import generator


@dataclass(frozen=True)
class Aggregated:
    """The result of a round's aggregation.

    Args:
        state: the next state.
        metrics: for the round's line of metrics.jsonl.
        notes: client id -> what its line of clients.jsonl says of its update.
        warnings: sentences for the user.
        combined: the updates that the strategy was given; empty where nobody may keep them.
        answered: the same, and what each answers to; where it was shown a mean, that one alone. For a server
            optimizer, and not to be kept.
        idle: the next state had no client learned anything, where that is not what the strategy makes of the
            same updates without what was learned.
    """

    state: State
    metrics: Mapping[str, float]
    notes: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    combined: Sequence[Update] = ()
    answered: Sequence[tuple[Update, Task]] = ()
    idle: State | None = None


class Delivery:
    """How the clients of one round deliver their updates: in the clear, each by itself.

    Args:
        nodes: the nodes that take part, in the order of their clients' ids.
    """

    def __init__(self, nodes: Sequence[int]) -> None:
        self.nodes = list(nodes)

    def records(self, node: int) -> Mapping[str, ConfigRecord]:
        """What a node needs to deliver its update, for its training message."""
        return {}

    def sent(self, messages: Iterable[tuple[Peer, Message]]) -> Iterator[Message]:
        """The training messages on their way to the clients, each made when it is asked for.

        Args:
            messages: who each is for, in the order of the nodes.
        """
        return (message for _, message in messages)

    def read(self, reply: Message, task: Task, peer: Peer, round: int) -> Update:
        """The update that a reply holds.

        Raises:
            IncompatibleUpdates: it holds none; says what was expected and what came.
        """
        return read_update(reply, task, peer, round)

    def count(
        self,
        round: int,
        peers: Mapping[int, Peer],
        lines: list[dict[str, Any]],
        warn: Callable[[str], None],
    ) -> None:
        """Add the bytes of any other messages than tasks and replies to the clients' lines; here none.

        Args:
            round: the round, from 1.
            peers: the clients, by node.
            lines: the round's lines of clients.jsonl, which are changed in place.
            warn: takes a line for the user about every client that was dropped in such a message.
        """

    def traffic(self) -> Mapping[str, int]:
        """Bytes of links that are no client's, for the round's line of metrics.jsonl, once all is counted."""
        return {}


class Aggregation(ABC):
    """What the server does with a round's replies. One object serves a whole run."""

    @property
    def shows_losses(self) -> bool:
        """Whether the clients' own training losses may be shown."""
        return True

    def refusal(self) -> str | None:
        """Why no further round may change the state; None if one may."""
        return None

    def least(self, needed: int) -> int:
        """How many good updates a round needs to change the state.

        Args:
            needed: how many the run's settings ask for.
        """
        return needed

    def sample(
        self, there: Sequence[int], busy: Collection[int], round: int, config: RoundConfig
    ) -> list[int]:
        """The nodes of a round.

        Args:
            there: the nodes that are connected, in the order of their clients' ids.
            busy: the nodes that still work on something else.
            round: the round, from 1.
            config: how many are wanted.
        """
        free = [node for node in there if node not in busy]
        return choose(free, config.sampled(len(free)), config.seed, round)

    def open(self, grid: Grid, nodes: Sequence[int], round: int, wide: Callable[[], Task]) -> Delivery:
        """Let the clients of a round agree on what they need, before they are sent their tasks.

        Args:
            grid: how they are reached.
            nodes: the nodes that were sampled.
            round: the round, from 1.
            wide: makes the task of a client of the largest ranks.

        Raises:
            ConfigError: there are too few nodes to agree.
            IncompatibleUpdates: too few of them have answered.
        """
        return Delivery(nodes)

    @abstractmethod
    def aggregate(self, given: RoundUpdates, delivery: Delivery, rng: np.random.Generator) -> Aggregated:
        """The next state, from the good updates of a round.

        Args:
            given: at least `least` updates.
            delivery: what `open` returned.
            rng: the generator for `Strategy.aggregate`.

        Raises:
            IncompatibleUpdates: they cannot be combined. The state then stays as it was.
        """


def choose(nodes: Sequence[int], count: int, seed: int, round: int) -> list[int]:
    """So many of the nodes in their order, drawn without replacement by the run's seed."""
    if count == len(nodes):
        return list(nodes)
    chosen = generator(seed, "sample", 0, round).choice(len(nodes), count, replace=False)
    return [nodes[i] for i in sorted(chosen)]


def aggregate_mean(given: RoundUpdates, mean: Update, rng: np.random.Generator) -> Aggregated:
    """The next state where the strategy is shown one update that stands for all.

    The aggregation error is not known then.
    """
    state = next_state(given.strategy, given.state, [mean], rng)
    return Aggregated(state, {**state.metrics, **sizes(state)}, answered=[(mean, given.wide)])
