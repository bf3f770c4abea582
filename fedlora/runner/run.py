"""A run that is asked for: its engine carries it out."""

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from fedlora.callbacks.base import Callback, RunHandle
from fedlora.callbacks.early_stopping import stopped_before
from fedlora.storage.run_folder import RunFolder

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
        """Run it on its engine; the folder. A run that has stopped early is left as it is.

        Raises:
            FedLoraError: it cannot run, or nothing came of it.
            KeyboardInterrupt: the user has stopped it; says how it goes on.
        """
        if why := self._stopped_early():
            self.said(why)
            return self.path
        try:
            self.spec.engine.run(self)
        except KeyboardInterrupt as stop:
            if str(stop):
                raise
            raise KeyboardInterrupt(
                f"interrupted; fedlora run resume={self.path} goes on from the last whole round"
            ) from None
        return self.path

    def _stopped_early(self) -> str | None:
        """That a finished run has no round left though it has done fewer than it might; None where it has."""
        folder = RunFolder(self.path)
        if not self.resumed or "stopped" not in (summary := folder.summary()):
            return None
        from fedlora.report import read_run  # imports matplotlib, which few runs need here

        kept, watching = read_run(self.path), (*self.callbacks, *self.spec.callbacks)
        handle = RunHandle(
            self.spec.rounds,
            metric=kept.metric,
            more_is_better=kept.more_is_better,
            metrics=folder.rounds(),
            callbacks=watching,
        )
        if (why := stopped_before(handle)) is None:
            return None
        return (
            f"'{self.path}' stopped early after round {summary['rounds']}, since {why}; to go on for longer, "
            "start a new run with a larger stop.patience"
        )


def new_folder(spec: RunSpec) -> Path:
    """A folder of the run's own, named by its strategy and the time."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    return Path("runs") / f"{spec.strategy_name}-{stamp}"
