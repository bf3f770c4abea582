"""Ray's actors that train groups of clients, and what becomes of groups whose actor dies."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import torch
from flwr.app import Context, Message, RecordDict
from ray.exceptions import RayError, RayTaskError

from fedlora.engines.client_memory import CarriedMemory, ClientCopy
from fedlora.engines.client_runtime import ClientRuntime
from fedlora.engines.packed import Packed, pack, unpack
from fedlora.engines.ray_cluster import Need, check_versions, nodes
from fedlora.engines.simulation_grid import Group, answer, identify
from fedlora.errors import ApartError, FedLoraError
from fedlora.models.attention import OURS, attend_our_way, attend_plainly

ATTEMPTS = 3  # actors that may die over a group, before it is the group that is to blame
SILENT = 30.0  # seconds without any actor before something is said of it
LOOK = 1.0  # seconds between two looks for actors where there is none


@dataclass(frozen=True)
class Trained:
    """What comes back of a group.

    Args:
        replies: of its nodes.
        states: of their contexts.
        log: what the clients would have written, by client.
        apart: why they were trained one by one; None if they were not.
        said: what went to the log there, with its level.
    """

    replies: list[Message]
    states: list[RecordDict]
    log: dict[int, list[tuple[str, tuple[Any, ...]]]]
    apart: ApartError | None
    said: list[tuple[int, str]]


class Trainer:
    """An actor: it holds the base, and is sent all else that a group of clients needs.

    Args:
        threads: of the model's passes.
    """

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        identify()
        self._site: ClientRuntime | None = None

    def begin(self, site: Packed) -> str:
        """Take the clients' side of a run, without rows and memory; the id of the node where this is."""
        runtime, _ = unpack(site)
        for base in (runtime.base, *runtime.bases):
            if getattr(base.model.config, "_attn_implementation", None) == OURS:
                attend_plainly(base.model)  # what attends our way has to be made known in each process
                attend_our_way(base.model)
        self._site = runtime
        return self.node()

    def node(self) -> str:
        """The id of the node where this is."""
        found: str = ray.get_runtime_context().get_node_id()
        return found

    def train(self, group: Packed, rows: Sequence[Any]) -> Packed:
        """Answer a group of messages.

        Args:
            group: messages, contexts, and by client what they may read.
            rows: references to the clients' rows, in the order of the messages.
        """
        assert self._site is not None, "begin comes first"
        messages, contexts, copies = unpack(group)
        ids = [int(context.node_config["client"]) for context in contexts]
        own, memory = dict(zip(ids, ray.get(list(rows)), strict=True)), CarriedMemory(copies)
        apart = list[ApartError]()
        site = replace(self._site, rows=own.__getitem__, memory=memory, shelf=memory)
        with _Heard() as heard:
            replies = answer(site, messages, contexts, apart.append)
        states = [context.state for context in contexts]
        return pack(Trained(replies, states, dict(memory.log), apart[0] if apart else None, heard.said))


class _Heard(logging.Handler):
    """Within it what fedlora logs is kept, to be sent on."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record as text, with its traceback."""
        self.said.append((record.levelno, self.format(record)))

    def __enter__(self) -> "_Heard":
        logging.getLogger("fedlora").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("fedlora").removeHandler(self)


@dataclass
class Work:
    """A group on its way.

    Args:
        group: its messages.
        content: what `Trainer.train` takes.
        rows: references to its clients' rows.
        lost: why actors died over it.
    """

    group: Group
    content: Packed
    rows: Sequence[Any]
    lost: list[str] = field(default_factory=list)


class Actors:
    """The actors of a run. Whichever has nothing to do takes the next group.

    An actor that dies, with its node or alone, is followed by another wherever Ray finds room, and its group
    is done again. Nobody has seen what it may have made of the group: a result counts once this process has
    read it, and then the group is not done again.

    Args:
        site: the clients' side, packed.
        need: what an actor takes.
        count: how many there are.
        wait: seconds to wait for one where there is none.
        warn: takes a line for the user.
    """

    def __init__(
        self, site: Packed, need: Need, count: int, wait: float, warn: Callable[[str], None]
    ) -> None:
        self._need, self._wait, self._warn = need, wait, warn
        self._site = ray.put(site)
        self._known = {node.id for node in nodes()}  # whose versions were compared
        self._starting: dict[Any, Any] = {}  # its node, once it can be used -> an actor
        self._working: dict[Any, tuple[Any, Work]] = {}
        self._idle: list[Any] = []
        self._failed = 0  # actors that died before they could begin, one after the other
        for _ in range(count):
            self._start()

    def map(self, works: Iterator[Work]) -> Iterator[tuple[Work, Trained | str]]:
        """Each group with what has come of it, or with why nothing can, in the order in which they end."""
        again = deque[Work]()
        following = next(works, None)
        try:
            while again or following or self._working:
                while self._idle and (again or following):
                    following = self._send(again, following, works)
                for reference in self._finished():
                    actor, work = self._working.pop(reference)
                    trained = self._result(reference, actor, work)
                    if trained is None:
                        again.append(work)
                        continue
                    if self._idle and (again or following):  # before anybody looks at this result
                        following = self._send(again, following, works)
                    yield work, trained
        finally:
            # Where nobody asks for the rest any more, what still comes is read by nobody.
            self._starting |= {actor.node.remote(): actor for actor, _ in self._working.values()}
            self._working = {}

    def close(self) -> None:
        """End the actors."""
        working = [actor for actor, _ in self._working.values()]
        for actor in (*self._idle, *self._starting.values(), *working):
            ray.kill(actor)
        self._idle, self._starting, self._working = [], {}, {}

    def _start(self) -> None:
        need = self._need
        options = {"num_cpus": need.cpus, "num_gpus": need.gpus, "memory": int(need.memory)}
        made: Any = ray.remote(Trainer).options(**options, scheduling_strategy="SPREAD")
        actor: Any = made.remote(max(1, int(need.cpus)))
        self._starting[actor.begin.remote(self._site)] = actor

    def _send(self, again: deque[Work], following: Work | None, works: Iterator[Work]) -> Work | None:
        """Give an actor a group; the one that comes after, which is made while the actors work."""
        actor = self._idle.pop()
        work = again.popleft() if again else following
        assert work is not None
        self._working[actor.train.remote(work.content, work.rows)] = actor, work
        return next(works, None) if work is following else following

    def _finished(self) -> list[Any]:
        """Wait until a group or an actor is ready; the references of the groups."""
        began, said = time.monotonic(), False
        while True:
            waiting = [*self._working, *self._starting]
            ready, _ = ray.wait(waiting, num_returns=1, timeout=None if self._working else LOOK)
            for reference in [reference for reference in ready if reference in self._starting]:
                self._begun(reference)
            if ready or self._idle:
                return [reference for reference in ready if reference in self._working]
            waited = time.monotonic() - began
            if waited > SILENT and not said:
                self._warn(f"waiting {self._wait:g} s at most for an actor to begin; each takes {self._need}")
                said = True
            if waited > self._wait:
                raise FedLoraError(
                    f"engine=ray: no actor could begin within {self._wait:g} s, each takes {self._need}; see "
                    "`ray status` for what is free; fedlora run resume=DIR goes on"
                )

    def _begun(self, reference: Any) -> None:
        """Take in an actor that has nothing to do now; start another if it died."""
        actor = self._starting.pop(reference)
        try:
            there = ray.get(reference)
        except RayTaskError as error:
            lacks = isinstance(getattr(error, "cause", None), ModuleNotFoundError)
            more = "; install it on every node, or use `ray job submit --working-dir .`" if lacks else ""
            raise FedLoraError(f"engine=ray: an actor could not begin: {_why(error)}{more}") from error
        except RayError as error:
            self._failed += 1
            if self._failed >= ATTEMPTS:
                raise FedLoraError(
                    f"engine=ray: {self._failed} actors in a row died before they could begin, the last "
                    f"because: {_why(error)}"
                ) from error
            self._start()
            return
        if isinstance(there, str) and there not in self._known:  # a node that has come since
            check_versions([node for node in nodes() if node.id == there])
            self._known.add(there)
        self._failed = 0
        self._idle.append(actor)

    def _result(self, reference: Any, actor: Any, work: Work) -> Trained | str | None:
        """What has come of a group, why nothing can, or None where it has to be done again."""
        clients = f"{len(work.group)} client{'s' * (len(work.group) != 1)}"
        try:
            found: Trained = unpack(ray.get(reference))
        except RayTaskError as error:
            self._idle.append(actor)
            return _why(error)
        except RayError as error:
            work.lost.append(_why(error))
            ray.kill(actor)  # if it was only out of reach, nobody waits for it any more
            self._start()
            if len(work.lost) < ATTEMPTS:
                self._warn(f"an actor died, and its {clients} will be trained elsewhere: {work.lost[-1]}")
                return None
            return f"{len(work.lost)} actors died over its group of {clients}: {work.lost[-1]}"
        self._idle.append(actor)
        for level, text in found.said:
            logging.getLogger("fedlora").log(level, text)
        return found


def carried(group: Group, contexts: Sequence[Context], copies: dict[int, ClientCopy]) -> Packed:
    """What `Trainer.train` takes of a group."""
    return pack((group, contexts, copies))


def _why(error: BaseException) -> str:
    """Why something failed in another process, in one line."""
    cause = getattr(error, "cause", None) or error
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text}"[:300]
