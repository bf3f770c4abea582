"""Clients at work without a barrier: whoever is done is replaced, and every full buffer is a round.

In virtual time the order in which clients finish is known before anybody trains. So the tasks of a buffer are
trained when it is full, all of them in the passes that a synchronous round of as many clients would take. On
real sites each task is sent when its client is free, and replies are taken as they come.
"""

import heapq
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.core.messages import State
from fedlora.errors import CheckpointError
from fedlora.rounds.aggregation.buffered import BufferDelivery
from fedlora.rounds.exchange import Received
from fedlora.rounds.round import Round
from fedlora.rounds.virtual_clock import VirtualClock
from fedlora.seeds import generator

if TYPE_CHECKING:
    from fedlora.rounds.loop import ServerLoop

POLL = 0.5  # seconds between two looks for replies
TRIES = 64  # of a random client, before the idle ones are listed


def buffers(
    server: "ServerLoop", grid: Grid, size: int, concurrency: int | None, max_staleness: int | None
) -> Iterator[dict[str, Any]]:
    """The rounds that are left, each of them a buffer.

    Args:
        server: the steps of a round.
        grid: carries the messages.
        size: how many good updates make a buffer full.
        concurrency: how many clients are at work at a time; None takes clients_per_round, or all.
        max_staleness: how many rounds ago a task may have been sent; None for any number.
    """
    most = concurrency or server.config.clients_per_round
    flight: Flight = VirtualFlight(server, grid) if server.clock else RealFlight(server, grid)
    while not server.finished:
        round = server.begin_round(grid, size)
        oldest = 0 if max_staleness is None else round.number - max_staleness
        flight.begin(replace(round, delivery=BufferDelivery(round.nodes, oldest)), most)
        received = flight.fill(size)
        delivery = BufferDelivery(round.nodes, oldest, whole=not flight.busy)
        closing = replace(round, delivery=delivery)
        yield server.close_round(closing, received, flight.dump(), flight.needed)


class Flight(ABC):
    """The clients at work, and those that are to be sent work.

    Args:
        server: the steps of a round.
        grid: carries the messages.
    """

    def __init__(self, server: "ServerLoop", grid: Grid) -> None:
        self.server, self.grid = server, grid
        self.busy: set[int] = set()  # nodes at work
        self._served: set[int] = set()  # nodes whose reply has come in the round that goes on

    def begin(self, round: Round, most: int | None) -> None:
        """Go on with a round, in which so many clients are at work at a time; None for all."""
        self._round, self._most, self._draws = round, most, 0
        self._served = set()

    @abstractmethod
    def fill(self, size: int) -> Received:
        """Let clients work until there are so many good updates, or until nobody is left who could."""

    def dump(self) -> str:
        """What a checkpoint has to keep of the clients at work; empty where they start anew."""
        return ""

    @property
    def needed(self) -> set[int]:
        """The rounds after whose states clients at work have begun."""
        return set()

    def _refill(self) -> None:
        """Send work to as many idle clients as there is room for, each drawn by the run's seed."""
        nodes = self._round.nodes
        most = len(nodes) if self._most is None else self._most
        while len(self.busy) < most and (drawn := self._draw(nodes, most - len(self.busy))):
            for node in drawn:
                self.busy.add(node)
                self._send(node)

    def _draw(self, nodes: list[int], room: int) -> list[int]:
        """Idle nodes; one at a time where there are many, so that it takes no look at all of them."""
        rng = generator(self.server.config.seed, "dispatch", self._draws, self._round.number)
        self._draws += 1
        for at in rng.integers(len(nodes), size=TRIES) if room == 1 and len(nodes) > TRIES else ():
            if self._idle(nodes[at]):
                return [nodes[at]]
        idle = [node for node in nodes if self._idle(node)]
        if len(idle) <= room:
            return idle
        return [idle[at] for at in sorted(rng.choice(len(idle), room, replace=False))]

    def _idle(self, node: int) -> bool:
        return node not in self.busy and node not in self._served

    @abstractmethod
    def _send(self, node: int) -> None:
        """Give a node its task."""


@dataclass(frozen=True, order=True)
class _Flying:
    """A task in virtual time; the next one to be done is the smallest."""

    finish: float
    client: int
    node: int
    number: int  # the round in which it was sent


class VirtualFlight(Flight):
    """Clients in virtual time, who are trained when the buffer is full that they finish in."""

    def __init__(self, server: "ServerLoop", grid: Grid) -> None:
        super().__init__(server, grid)
        assert server.clock is not None
        self._clock: VirtualClock = server.clock
        self._heap: list[_Flying] = []
        self._rounds: dict[int, tuple[Round, State]] = {}  # of the tasks in the heap
        self._restored = False

    def begin(self, round: Round, most: int | None) -> None:
        """Go on with a round; the first one takes up the tasks that were out when the run was cut off."""
        super().begin(round, most)
        if not self._restored:
            self._restored = True
            self._restore()
        self._rounds[round.number] = (round, self.server.state)

    def fill(self, size: int) -> Received:
        """Let virtual time pass until so many clients have finished, and train those."""
        received = Received([], [], [])
        while (lacking := size - len(received.updates)) > 0:
            done = self._next(lacking)
            if not done:
                break
            replies = self.grid.send_and_receive(self._messages(done))
            received = received.plus(self.server.receive(self._round, replies))
        alive = {one.number for one in self._heap}
        self._rounds = {number: kept for number, kept in self._rounds.items() if number in alive}
        return received

    def dump(self) -> str:
        """The tasks that are out, and the time."""
        tasks = [[one.finish, one.client, one.number] for one in sorted(self._heap)]
        return json.dumps({**json.loads(self._clock.dump()), "tasks": tasks})

    @property
    def needed(self) -> set[int]:
        """The rounds before those in which tasks were sent."""
        return {one.number - 1 for one in self._heap}

    def _next(self, count: int) -> list[_Flying]:
        """The next clients that finish, in the order of their ids."""
        done: list[_Flying] = []
        while len(done) < count:
            self._refill()
            if not self._heap:  # everybody is absent, or has been in this round
                waiting = [node for node in self._round.nodes if node not in self._served]
                if not waiting:
                    break
                self._clock.wait_for(map(self.server.client, waiting))
                continue
            one = heapq.heappop(self._heap)
            self._clock.now = max(self._clock.now, one.finish)
            self.busy.discard(one.node)
            self._served.add(one.node)
            done.append(one)
        return sorted(done, key=lambda one: one.client)

    def _messages(self, done: Iterable[_Flying]) -> Iterator[Message]:
        """Their tasks, each written when it is asked for, from the state that was the newest then."""
        for one in done:
            round, state = self._rounds[one.number]
            yield self.server.message(round, one.node, state)

    def _idle(self, node: int) -> bool:
        return super()._idle(node) and self._clock.free(self.server.client(node)) <= self._clock.now

    def _send(self, node: int) -> None:
        client = self.server.client(node)
        heapq.heappush(self._heap, _Flying(self._clock.finish(client), client, node, self._round.number))

    def _restore(self) -> None:
        nodes = {self.server.client(node): node for node in self._round.nodes}
        folder = self.server.folder
        if folder is None or not folder.schedule:
            return
        try:
            tasks = json.loads(folder.schedule)["tasks"]
            self._heap = [_Flying(float(at), client, nodes[client], number) for at, client, number in tasks]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint's tasks at work are damaged: {error!r}") from error
        heapq.heapify(self._heap)
        self.busy = {one.node for one in self._heap}
        for number in {one.number for one in self._heap}:
            state = folder.state_after(number - 1)
            self._rounds[number] = (replace(self._round, number=number), state)


class RealFlight(Flight):
    """Clients on machines of their own, whose replies are taken as they come."""

    def __init__(self, server: "ServerLoop", grid: Grid) -> None:
        super().__init__(server, grid)
        self._sent: dict[str, tuple[int, float]] = {}  # message -> its node, and when it was sent
        self._early: list[Message] = []  # replies that came when the buffer was full
        self._untaken: list[int] = []  # nodes whose message the SuperLink did not take

    def fill(self, size: int) -> Received:
        """Take replies until so many are good; nobody is waited for longer than the timeout."""
        received = Received([], [], [])
        while (lacking := size - len(received.updates)) > 0:
            if not self._early:
                self._refill()
                self._look()
            taken, self._early = self._early[:lacking], self._early[lacking:]
            received = received.plus(self._receive(taken)).plus(self._overdue())
            if not taken and not self.busy and not any(map(self._idle, self._round.nodes)):
                break
            if not taken and not self._early:
                time.sleep(POLL)
        return received

    def _look(self) -> None:
        """Take what has come."""
        came = list(self.grid.pull_messages([*self._sent])) if self._sent else []
        self.server.client_done(len(came))
        self._early += came

    def _receive(self, replies: list[Message]) -> Received:
        for reply in replies:
            node, _ = self._sent.pop(reply.metadata.reply_to_message_id, (None, 0.0))
            if node is not None:
                self.busy.discard(node)
                self._served.add(node)
        return self.server.receive(self._round, replies)

    def _overdue(self) -> Received:
        """Wait no longer for those who have not answered within the timeout."""
        limit, now = self.server.config.timeout, time.monotonic()
        waiting = {reply.metadata.reply_to_message_id for reply in self._early}
        late = {
            message: node
            for message, (node, sent) in self._sent.items()
            if limit is not None and now - sent > limit and message not in waiting
        }
        for message, node in late.items():
            del self._sent[message]
            self.busy.discard(node)
            self._served.add(node)
        found = self.server.give_up(self._round, late.values(), f"no reply within {limit} s")
        untaken, self._untaken = self._untaken, []
        return found.plus(self.server.give_up(self._round, untaken, "its task could not be sent"))

    def _send(self, node: int) -> None:
        message = self.server.message(self._round, node)
        if sent := [one for one in self.grid.push_messages([message]) if one]:
            self._sent[sent[0]] = (node, time.monotonic())
        else:
            self._untaken.append(node)
            self.busy.discard(node)
            self._served.add(node)
