"""All clients in one process: no sockets, no Ray, and several clients trained in one pass."""

from collections.abc import Iterator
from dataclasses import dataclass

from flwr.app import Message

from fedlora.engines.base import Engine, Run, Session
from fedlora.engines.simulation_grid import Group, SimulationGrid, answer, together


@dataclass(frozen=True)
class InProcess(Engine):
    """One process, no sockets: the clients are trained here, several of them in one pass.

    Args:
        fuse: clients that train in one pass: "auto", or a number.
    """

    fuse: int | str = "auto"

    def __post_init__(self) -> None:
        together(self.fuse)

    def run(self, run: Run) -> None:
        """Train the clients in this process."""
        with run.begin() as session:
            session.run(self.grid(session))

    def grid(self, session: Session) -> "InProcessGrid":
        """The clients of a session as a grid."""
        return InProcessGrid(session.runtime, session.nodes, together(self.fuse), session.advance)


class InProcessGrid(SimulationGrid):
    """A federation whose nodes train in this process, one group after the other."""

    def answered(self, groups: Iterator[Group]) -> Iterator[tuple[Group, list[Message]]]:
        """Each group with its replies, one group's in memory at a time."""
        return ((group, self._answers(group)) for group in groups)

    def _answers(self, group: Group) -> list[Message]:
        return answer(self._site, group, [self._context(m) for m in group], self._train_apart)
