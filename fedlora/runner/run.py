"""A run that is asked for: its engine carries it out."""

import datetime
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from fedlora.callbacks.console import Display

from .session import Session, Silent
from .spec import RunSpec


@dataclass(frozen=True)
class Run:
    """A run that an engine is asked to carry out; nothing of it is loaded yet.

    Args:
        spec: its description.
        path: its folder.
        resumed: whether it goes on with what is in the folder.
        shown: from a session to the display of its run; entered when the run begins.
        said: takes the lines that the user reads before round 1.
        console: where an engine that has a display of its own shows it.
    """

    spec: RunSpec
    path: Path
    resumed: bool
    shown: Callable[[Session], AbstractContextManager[Display]]
    said: Callable[[str], None] = field(default=lambda text: None)
    console: Console = field(default_factory=Console)

    @contextmanager
    def begin(self) -> Iterator[Session]:
        """The session, while its folder is held and its display is up."""
        session = Session.begin(self.spec, self.path, self.resumed, Silent())
        with session.held:
            self.said(session.opening())
            with self.shown(session) as session.display:
                yield session

    def go(self) -> Path:
        """Run it on its engine; the folder.

        Raises:
            FedLoraError: it cannot run, or nothing came of it.
            KeyboardInterrupt: the user has stopped it; says how it goes on.
        """
        try:
            self.spec.engine.run(self)
        except KeyboardInterrupt as stop:
            if str(stop):
                raise
            raise KeyboardInterrupt(
                f"interrupted; fedlora run resume={self.path} goes on from the last whole round"
            ) from None
        return self.path


def new_folder(spec: RunSpec) -> Path:
    """A folder of the run's own, named by its strategy and the time."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    return Path("runs") / f"{spec.strategy_name}-{stamp}"
