"""Runs from Python: whole ones, and a round at a time."""

import difflib
from collections.abc import Generator, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console

from fedlora.callbacks.console import ConsoleProgress
from fedlora.config.describe import named_callbacks
from fedlora.core.messages import State
from fedlora.engines.in_process import InProcess
from fedlora.errors import ConfigError
from fedlora.runner import run as runner
from fedlora.runner.session import Session as Open
from fedlora.runner.spec import RunSpec

from .run import PARTS, Run
from .scratch import Scratch
from .settings import Settings
from .signature import takes_settings
from .words import in_python


@takes_settings
def simulate(
    model: Any = "minilm",
    data: Any = "trec",
    *,
    out: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Run a federation on this machine, to its end.

    Args:
        model: see `Settings`, whose fields are the keyword arguments, with the defaults of the command line.
        data: see `Settings`.
        out: a new folder for the run's files; None keeps nothing on disk beyond the life of the result.
        progress: whether to show a table of the rounds.
        settings: the other fields of `Settings`, such as strategy="flexlora", ranks=[2, 4, 8], rounds=5.

    Returns:
        The finished run.

    Raises:
        FedLoraError: a setting, a file, a model or a pairing of them cannot work; says what to do.
    """
    spec = make_spec(model, data, settings)
    kept, path = place_of(out)
    try:
        carry_out(spec, path, False, progress, temporary=kept is not None)
    except KeyboardInterrupt:
        if kept is None:
            raise
        raise KeyboardInterrupt(
            "interrupted; nothing is kept of a run without out=, with out=DIR it can be resumed"
        ) from None
    return Run(path, kept, given_parts(spec))


def place_of(out: str | Path | None) -> tuple[Scratch | None, Path]:
    """The folder of a new run, and what keeps it there if it is a temporary one."""
    if out is not None:
        return None, Path(out)
    scratch = Scratch()
    return scratch, scratch.path / "run"


OF_CLIENT = "it is the client's: say client=fedlora.clients.LocalTraining({}=...)"
OF_WATCH = "what watches a run is an object: say callbacks=[...]"
# Words that users look for among the arguments, and where they are.
ELSEWHERE = {
    **{name: OF_CLIENT.format(name) for name in ("lr", "batch_size", "epochs", "optimizer")},
    **dict.fromkeys(("stop", "keep", "track"), OF_WATCH),
    "alpha": "it is the partition's: say data_options={'alpha': ...}",
    "max_length": "it is the rows': say data_options={'max_length': ...}",
}


def make_spec(model: Any, data: Any, settings: dict[str, Any]) -> RunSpec:
    """The description of a run from keyword arguments.

    Raises:
        ConfigError: an argument that there is none of; names the nearest.
    """
    known = [field.name for field in fields(Settings)]
    for name in settings.keys() - {*known}:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        hint = ELSEWHERE.get(name, hint)
        raise ConfigError(f"unknown argument '{name}'; {hint}")
    return Settings(model=model, data=data, **settings).spec()


def given_parts(spec: RunSpec) -> dict[str, Any]:
    """The parts of a run as objects, so that what its config.yaml cannot name is not lost in this process."""
    parts = {name: part for name in PARTS if (part := getattr(spec, name)) is not None}
    return parts | {"callbacks": named_callbacks(spec.callbacks)[1]}


def carry_out(spec: RunSpec, path: Path, resumed: bool, progress: bool, temporary: bool = False) -> None:
    """Run it, with a table of the rounds or silently; a temporary folder is not told."""
    console = Console(quiet=not progress)
    shown = [ConsoleProgress(console)] if progress else []

    def say(text: str) -> None:
        if temporary:
            text = "\n".join(line for line in text.splitlines() if not line.startswith("-> "))
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    runner.Run(spec, path, resumed, shown, say, console).go()


class Session:
    """A federation that goes on a round at a time, in this process.

        for round in fedlora.Session(model="tiny", data="tiny", rounds=3):
            print(round["loss"])

    Each step is the line of a finished round, as in metrics.jsonl. Between two steps `state` is the server's
    state, and a breakpoint in a strategy or a client is hit. Whoever leaves the loop early has an unfinished
    run, which `run` gives, and which can be resumed.

    Args:
        model: as for `simulate`.
        data: as for `simulate`.
        out: as for `simulate`.
        settings: as for `simulate`.
    """

    @takes_settings
    def __init__(
        self, model: Any = "minilm", data: Any = "trec", *, out: str | Path | None = None, **settings: Any
    ) -> None:
        self.spec = make_spec(model, data, settings)
        if not isinstance(self.spec.engine, InProcess):
            raise ConfigError("Session: goes round by round in this process; leave engine= out, or simulate")
        self._kept, self.path = place_of(out)
        self.open: Open | None = None
        self._steps = self._go()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._steps

    def __next__(self) -> dict[str, Any]:
        return next(self._steps)

    @property
    def state(self) -> State:
        """The server's state after the rounds so far.

        Raises:
            ConfigError: no round has been asked for yet.
        """
        if self.open is None:
            raise ConfigError("Session: there is no state before the first step; say next(session)")
        return self.open.state

    @property
    def run(self) -> Run:
        """The run, as far as it has come.

        Raises:
            ConfigError: no round has been asked for yet.
        """
        if self.open is None:
            raise ConfigError("Session: there is no run before the first step; say next(session)")
        return Run(self.path, self._kept, given_parts(self.spec))

    def close(self) -> None:
        """Stop here, so that another process can go on with the run's folder."""
        self._steps.close()

    def _go(self) -> Generator[dict[str, Any], None, None]:
        engine = self.spec.engine
        assert isinstance(engine, InProcess)
        started = runner.Run(self.spec, self.path, False)
        with in_python(), started.begin() as self.open:
            yield from self.open.rounds(engine.grid(self.open))
