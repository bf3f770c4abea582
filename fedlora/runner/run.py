"""A run that is asked for: its engine carries it out."""

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from fedlora.callbacks.base import Callback

from .session import Session
from .spec import RunSpec


@dataclass(frozen=True)
class Run:
    """A run that an engine is asked to carry out; nothing of it is loaded yet.

    Args:
        spec: its description.
        path: its folder.
        resumed: whether it goes on with what is in the folder.
        callbacks: what watches it beside the callbacks of its description, such as a display.
        said: takes the lines that the user reads before round 1.
        console: where an engine that has a display of its own shows it.
    """

    spec: RunSpec
    path: Path
    resumed: bool
    callbacks: Sequence[Callback] = ()
    said: Callable[[str], None] = field(default=lambda text: None)
    console: Console = field(default_factory=Console)

    @contextmanager
    def begin(self) -> Iterator[Session]:
        """The session, while its folder is held."""
        session = Session.begin(self.spec, self.path, self.resumed, self.callbacks)
        with session.held:
            self.said(session.opening())
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
