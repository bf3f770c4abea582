"""The interface of what watches a run: callbacks, and what they see of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fedlora.core.messages import State
from fedlora.core.strategy import Strategy
from fedlora.errors import ConfigError


@dataclass
class RunHandle:
    """A run as its callbacks see it, and what they may ask of it: `stop`, `warn` and `select`.

    Args:
        rounds: how many the run is to have, those before a resume included.
        state: the server's state after the rounds that are done; None where the run is on another machine.
        done: how many rounds are finished.
        metric: the headline metric, such as "accuracy" or "perplexity".
        more_is_better: whether a higher headline metric is better.
        path: the run's folder; None where nothing is written.
        config: the run's settings as plain values, the content of its config.yaml.
        strategy: the algorithm; None where the run is on another machine.
        private: whether the run spends an epsilon.
        sites: whether clients are sites, which may be away.
        validation: whether the rounds are evaluated on validation rows, instead of on the test rows.
        metrics: the lines of metrics.jsonl of all finished rounds, the first round first.
        clients: the lines of clients.jsonl of the last finished round.
        callbacks: all that watch the run, in the order in which they are called.
    """

    rounds: int
    state: State | None = field(default=None, repr=False)
    done: int = 0
    metric: str = "accuracy"
    more_is_better: bool = True
    path: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    strategy: Strategy | None = None
    private: bool = False
    sites: bool = False
    validation: bool = False
    metrics: list[dict[str, Any]] = field(default_factory=list, repr=False)
    clients: list[dict[str, Any]] = field(default_factory=list, repr=False)
    callbacks: Sequence["Callback"] = ()
    stopped: str | None = field(default=None, init=False)
    _selected: tuple[int, State] | None = field(default=None, init=False, repr=False)

    def stop(self, reason: str) -> None:
        """End the run after the round that goes on; the summary gives the reason of the first call."""
        self.stopped = self.stopped or reason

    def warn(self, text: str) -> None:
        """Tell the user something, through all callbacks."""
        for callback in self.callbacks:
            callback.on_warning(self, text)

    def select(self, round: int, state: State) -> None:
        """Make the state after a round the run's result, until another is selected.

        Args:
            round: its number.
            state: the state after it.

        Raises:
            ConfigError: the rounds are evaluated on the test rows, so that the result would look better than
                it is.
        """
        if not self.validation:
            raise ConfigError(
                "a callback selects a round by its metrics, which are measured on the test rows, and the "
                "result would look better than it is; say evaluate.rows=validation"
            )
        self._selected = (round, state)

    @property
    def selected_round(self) -> int | None:
        """The round whose state is the run's result; None for the last one."""
        return self._selected[0] if self._selected else None

    @property
    def result(self) -> State:
        """The state that the run has come to: the selected one, or that after the last round."""
        state = self._selected[1] if self._selected else self.state
        assert state is not None, "a run on another machine has no state here"
        return state


class Callback:
    """What watches a run. Subclasses override what they need of the six methods; the others do nothing.

    An error that a callback raises ends the run with the error's own traceback.

    Facts that are read before a run begins:
        reads_metric: does it decide by what the rounds are evaluated on, so that they must be evaluated?
        selects: does it call `RunHandle.select`, so that they must be evaluated on validation rows?
    """

    reads_metric: ClassVar[bool] = False
    selects: ClassVar[bool] = False

    def on_run_begin(self, run: RunHandle) -> None:
        """The run begins, or goes on after `run.done` rounds."""

    def on_round_begin(self, run: RunHandle, round: int, clients: int) -> None:
        """A round begins, which waits for so many clients."""

    def on_client_done(self, run: RunHandle, count: int) -> None:
        """So many more clients have finished training."""

    def on_round_end(self, run: RunHandle, metrics: Mapping[str, Any]) -> None:
        """A round has ended and is recorded; `metrics` is its line of metrics.jsonl."""

    def on_warning(self, run: RunHandle, text: str) -> None:
        """There is something that the user should know."""

    def on_run_end(self, run: RunHandle, summary: Mapping[str, Any]) -> None:
        """The run has ended with this summary; with an empty one it was cut off."""


class Callbacks:
    """Calls all callbacks of a run, in their order, and keeps the run's handle up to date.

    Args:
        run: the handle.
    """

    def __init__(self, run: RunHandle) -> None:
        self.run = run

    def run_begin(self) -> None:
        """The run begins."""
        for callback in self.run.callbacks:
            callback.on_run_begin(self.run)

    def round_begin(self, round: int, clients: int) -> None:
        """A round begins, which waits for so many clients."""
        for callback in self.run.callbacks:
            callback.on_round_begin(self.run, round, clients)

    def client_done(self, count: int) -> None:
        """So many more clients have finished."""
        for callback in self.run.callbacks:
            callback.on_client_done(self.run, count)

    def round_end(
        self, metrics: dict[str, Any], clients: Sequence[dict[str, Any]] = (), state: State | None = None
    ) -> None:
        """A round has ended.

        Args:
            metrics: its line of metrics.jsonl.
            clients: its lines of clients.jsonl.
            state: the state after it.
        """
        run = self.run
        run.done, run.state, run.clients = int(metrics["round"]), state, list(clients)
        run.metrics.append(metrics)
        for callback in run.callbacks:
            callback.on_round_end(run, metrics)

    def run_end(self, summary: Mapping[str, Any]) -> None:
        """The run has ended; every callback is told, and then the first error of any is raised."""
        errors: list[Exception] = []
        for callback in self.run.callbacks:
            try:
                callback.on_run_end(self.run, summary)
            except Exception as error:  # whatever a user's own code raises
                errors.append(error)
        if errors:
            raise errors[0]
