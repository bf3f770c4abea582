"""Ends a run that no longer improves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.callbacks.base import Callback, RunHandle
from fedlora.callbacks.scores import scores
from fedlora.ranges import check_number, check_whole


@dataclass(frozen=True)
class EarlyStopping(Callback):
    """Ends the run once so many evaluated rounds in a row have brought no improvement.

    It decides by the rounds that are recorded, so that a run which was killed stops where it would have
    stopped without that.

    Args:
        patience: evaluated rounds without improvement after which the run ends.
        metric: by which key of metrics.jsonl; None takes the headline metric. Which values are better
            is the task's for that one; of others, smaller ones where the name ends in loss or error.
        least_change: what counts as an improvement over the best so far: more than this.
    """

    patience: int
    metric: str | None = None
    least_change: float = 0.0

    def __post_init__(self) -> None:
        check_whole("stop.patience", self.patience)
        check_number("stop.least_change", self.least_change, least=0)

    @property
    def reads_metric(self) -> bool:  # type: ignore[override]
        """Whether rounds must be evaluated: the training loss is always there."""
        return self.metric != "train_loss"

    def on_run_begin(self, run: RunHandle) -> None:
        """Say by which rows it decides, and stop at once a run that had come to its end before."""
        if not run.validation and self.reads_metric:
            run.warn(
                "stop=early decides by the test rows, so that the result looks a little better than it is; "
                "evaluate.rows=validation decides by rows that are no test rows"
            )
        self.decide(run)

    def on_round_end(self, run: RunHandle, metrics: Mapping[str, Any]) -> None:
        """Stop if the last rounds have brought nothing."""
        self.decide(run)

    def decide(self, run: RunHandle) -> None:
        """Stop the run if the last of its finished rounds have brought nothing."""
        metric, best, since = self.metric or run.metric, None, 0
        for _, score in scores(run, self.metric):
            improved = best is None or score > best + self.least_change
            best, since = (score, 0) if improved else (best, since + 1)
        if since >= self.patience:
            run.stop(f"{metric} has not improved in {since} evaluated rounds")


def stopped_before(run: RunHandle) -> str | None:
    """Why a run that is to go on has come to its end already, by its finished rounds; None where it has not.

    Only `EarlyStopping` among its callbacks decides by those alone.
    """
    for callback in run.callbacks:
        if isinstance(callback, EarlyStopping):
            callback.decide(run)
    return run.stopped
