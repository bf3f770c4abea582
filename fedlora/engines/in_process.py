"""All clients in one process: no sockets, no Ray, and several clients trained in one pass."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from flwr.app import Message

from fedlora.engines.base import Engine, Run, Session, fans
from fedlora.engines.client_runtime import ClientRuntime
from fedlora.engines.simulation_grid import Group, SimulationGrid, answer, memory_of_group, together
from fedlora.errors import ConfigError
from fedlora.models.replicas import replica
from fedlora.rounds.speeds import Speeds


@dataclass(frozen=True)
class InProcess(Engine):
    """One process, no sockets: the clients are trained here, several of them in one pass.

    Args:
        fuse: clients that train in one pass: "auto", or a number.
        devices: where groups of clients train side by side, a copy of the model on each: numbers of GPUs, or
            names such as "cpu"; "auto" takes all GPUs if the model is on one. None takes the model's own.
        speeds: of the clients, in virtual time: a CSV file, or fields of `fedlora.rounds.speeds.Speeds` such
            as {"lognormal": 1, "absent": 0.1}; None keeps no time.
        over_select: share of clients sampled beyond clients_per_round, for whose number a synchronous round
            waits in virtual time.
        tree: edges between server and clients: [4, 8] are 4 edges of 8 clients each; None for none.
    """

    fuse: int | str = "auto"
    devices: Sequence[int | str] | str | None = None
    speeds: Mapping[str, Any] | str | None = None
    over_select: float = 0.0
    tree: Sequence[int] | None = None

    def __post_init__(self) -> None:
        together(self.fuse)
        fans(self.tree)
        if self.speeds is not None:
            Speeds.of(self.speeds)
        elif self.over_select:
            raise ConfigError(
                "engine.over_select: in one process nobody is late but in virtual time; say "
                "engine.speeds=..., or leave it out"
            )
        if isinstance(self.devices, str | type(None)):
            if self.devices not in (None, "auto"):
                raise ConfigError(
                    f"engine.devices: expected auto or a list such as [0,1], got {self.devices!r}"
                )
        elif not self.devices:
            raise ConfigError("engine.devices: expected auto or a list such as [0,1], got an empty list")

    def run(self, run: Run) -> None:
        """Train the clients in this process."""
        with run.begin() as session:
            session.run(self.grid(session))

    def grid(self, session: Session) -> "InProcessGrid":
        """The clients of a session as a grid.

        Raises:
            ConfigError: there is no such device.
        """
        sites = _sites(session.runtime, self._named(session.runtime))
        memory = memory_of_group(session.runtime)
        return InProcessGrid(sites, session.nodes, together(self.fuse), session.advance, memory)

    def _named(self, site: ClientRuntime) -> list[torch.device]:
        """The devices, the model's own by default."""
        own = site.base.device
        if self.devices is None or (self.devices == "auto" and own.type != "cuda"):
            return [own]
        gpus = torch.cuda.device_count()
        wanted = range(gpus) if self.devices == "auto" else self.devices
        found = [torch.device("cuda", one) if isinstance(one, int) else torch.device(one) for one in wanted]
        for device in found:
            if device.type == "cuda" and (device.index or 0) >= gpus:
                raise ConfigError(
                    f"engine.devices: '{device}' was asked for, torch sees {gpus} GPUs; leave it out"
                )
        return found


class InProcessGrid(SimulationGrid):
    """A federation whose nodes train in this process, one group after the other on each device.

    Groups are dealt to the devices in turn, whichever is done first, so that a run's result depends on the
    kind of the devices and not on their number.

    Args:
        sites: the clients' side, one for each device.
        nodes: as for `SimulationGrid`.
        fuse: as for `SimulationGrid`.
        done: as for `SimulationGrid`.
        memory: as for `SimulationGrid`.
    """

    def __init__(
        self,
        sites: Sequence[ClientRuntime],
        nodes: Sequence[Mapping[str, int]],
        fuse: int | None = None,
        done: Callable[[int], None] = lambda clients: None,
        memory: int | None = None,
    ) -> None:
        super().__init__(sites[0], nodes, fuse, done, memory)
        self._sites = sites

    def answered(self, groups: Iterator[Group]) -> Iterator[tuple[Group, list[Message]]]:
        """Each group with its replies; as many groups' as there are devices are in memory at a time."""
        if len(self._sites) == 1:
            yield from ((group, self._answers(self._sites[0], group)) for group in groups)
            return
        waiting: deque[tuple[Group, Future[list[Message]]]] = deque()
        with ExitStack() as stack:
            pools = [stack.enter_context(ThreadPoolExecutor(1, "device")) for _ in self._sites]
            for number, group in enumerate(groups):
                turn = number % len(pools)
                waiting.append((group, pools[turn].submit(self._answers, self._sites[turn], group)))
                if len(waiting) == len(pools):
                    first, replies = waiting.popleft()
                    yield first, replies.result()
            for group, replies in waiting:
                yield group, replies.result()

    def _answers(self, site: ClientRuntime, group: Group) -> list[Message]:
        return answer(site, group, [self._context(m) for m in group], self._train_apart)


def _sites(site: ClientRuntime, devices: Sequence[torch.device]) -> list[ClientRuntime]:
    """The clients' side on each device: itself once on the model's own, else with copies of its models."""
    found: list[ClientRuntime] = []
    for device in devices:
        own = site.base.device
        there = device.type == own.type and (device.index or 0) == (own.index or 0)
        if there and site not in found:
            found.append(site)
            continue
        bases = tuple(replica(base, str(device)) for base in site.bases)
        found.append(replace(site, base=replica(site.base, str(device)), bases=bases))
    return found
