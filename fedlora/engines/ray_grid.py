"""A federation whose nodes train in Ray's actors, with all that they keep in this process.

A group of clients is the one that a single process would train in one pass, so a run's result is that of one
process, for any number of actors. An actor is sent the group's messages, the clients' rows, kept parts and
ledgers, and what they hold from former rounds; what comes back is written to the run's folder here. No actor
reads or writes a file, so no file system has to be shared.

**What privacy costs when a node dies.** A client of differential privacy releases its reply to the server,
and the server is this process. A reply that was lost with its node was read by nobody: Ray raises instead of
giving a part of it, no file holds it, and the noise of the second attempt is its own. So a group that is done
again releases one result, and the ledger has one entry. A result that this process has read, in contrast, is
never made again in its round: its entry is on disk before any code of the server sees the reply, and a client
whose entry cannot be written is dropped. For the same reason the masks of a secure sum, which hide one vector
alone, may serve the second attempt. All this holds as long as nobody but this process reads the object store
of the cluster, and as long as a node does not die because of the noise that it drew.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from flwr.app import Message

from fedlora.core.method import MethodPart
from fedlora.data import Example
from fedlora.engines.client_memory import CarriedMemory, ClientCopy, replay
from fedlora.engines.client_runtime import ClientRuntime
from fedlora.engines.packed import Packed, pack
from fedlora.engines.ray_actors import Actors, Trained, Work, carried
from fedlora.engines.simulation_grid import Group, SimulationGrid, answer, failure
from fedlora.errors import FedLoraError
from fedlora.rounds.codec import read_task


class RayGrid(SimulationGrid):
    """A federation whose nodes train in Ray's actors.

    Args:
        site: the clients' side, with the memory in which this process keeps what is theirs.
        nodes: as for `SimulationGrid`.
        actors: where they train.
        fuse: as for `SimulationGrid`.
        done: as for `SimulationGrid`.
        memory: as for `SimulationGrid`.
    """

    def __init__(
        self,
        site: ClientRuntime,
        nodes: Sequence[Mapping[str, int]],
        actors: Actors,
        fuse: int | None = None,
        done: Callable[[int], None] = lambda clients: None,
        memory: int | None = None,
    ) -> None:
        super().__init__(site, nodes, fuse, done, memory)
        assert site.memory is not None, "the clients of a simulation keep what is theirs"
        self._actors, self._memory = actors, site.memory
        self._rows: dict[int, Any] = {}

    def answered(self, groups: Iterator[Group]) -> Iterator[tuple[Group, list[Message]]]:
        """Each group with its replies, in the order in which the actors end.

        What needs no model, such as the keys of a secure sum, is answered here.
        """
        for here, part in itertools.groupby(groups, _needs_no_model):
            if here:
                for group in part:
                    contexts = [self._context(message) for message in group]
                    yield group, answer(self._site, group, contexts, self._train_apart)
                continue
            for work, trained in self._actors.map(self._work(group) for group in part):
                if isinstance(trained, str):
                    yield work.group, [failure(message, trained) for message in work.group]
                else:
                    yield work.group, self._written(work.group, trained)

    def _work(self, group: Group) -> Work:
        """What an actor is sent of a group."""
        contexts = [self._context(message) for message in group]
        clients = [int(context.node_config["client"]) for context in contexts]
        copies = {
            client: ClientCopy.of(client, _round(message), self._memory, self._site.shelf)
            for client, message in zip(clients, group, strict=True)
        }
        return Work(group, carried(group, contexts, copies), [self._own_rows(c) for c in clients])

    def _own_rows(self, client: int) -> Any:
        """A reference to a client's rows, which are put into the object store once."""
        if client not in self._rows:
            self._rows[client] = ray.put(self._site.rows(client))
        return self._rows[client]

    def _written(self, group: Group, trained: Trained) -> list[Message]:
        """The replies, once what the clients keep is written; a client whose part cannot be is dropped."""
        if trained.apart is not None:
            self._train_apart(trained.apart)
        replies = []
        for message, reply, state in zip(group, trained.replies, trained.states, strict=True):
            context = self._context(message)
            client = int(context.node_config["client"])
            try:
                replay(trained.log.get(client, []), client, self._memory)
            except (FedLoraError, OSError) as error:
                replies.append(failure(message, f"{type(error).__name__}: {error}"))
                continue
            context.state = state
            if not reply.has_error():
                self._hold(client, message)
            replies.append(reply)
        return replies

    def _hold(self, client: int, message: Message) -> None:
        """Keep what the client now holds, as it did itself."""
        held = read_task(message.content, self._site.shelf.held(client))[3]
        version = int(message.content.config_records["config"]["version"])  # type: ignore[arg-type]
        self._site.shelf.hold(client, held, None if version < 0 else version)


def packed_site(site: ClientRuntime) -> Packed:
    """The clients' side of a run for its actors: the base and how to train, without rows and memory.

    Tasks have parts of classes that their receiver must have loaded, so those of this process go along.
    """
    nothing = CarriedMemory({})
    return pack((replace(site, rows=_no_rows, memory=nothing, shelf=nothing), _below(MethodPart)))


def _no_rows(client: int) -> Sequence[Example]:
    raise KeyError(client)


def _below(kind: type[MethodPart]) -> list[type[MethodPart]]:
    return [found for sub in kind.__subclasses__() for found in (sub, *_below(sub))]


def _needs_no_model(group: Group) -> bool:
    return group[0].metadata.message_type.startswith("query")


def _round(message: Message) -> int:
    return int(message.content.config_records["config"]["round"])  # type: ignore[arg-type]
