"""Makes the state of the best round the run's result."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.callbacks.base import Callback, RunHandle
from fedlora.callbacks.scores import scores
from fedlora.errors import CheckpointError
from fedlora.storage.run_folder import RunFolder


@dataclass(frozen=True)
class BestCheckpoint(Callback):
    """The run's result is the state after the round with the best metric, of equal ones after the first.

    Rounds are compared on validation rows (evaluate.rows=validation): selected on test rows, the result would
    look better than it is. The state is kept in the run's checkpoint folder, so that a run that is killed and
    resumed selects the same round.

    Args:
        metric: by which key of metrics.jsonl; None takes the headline metric. Which values are better
            is the task's for that one; of others, smaller ones where the name ends in loss or error.
    """

    metric: str | None = None

    reads_metric = True
    selects = True

    def on_run_begin(self, run: RunHandle) -> None:
        """Take up the best state of the rounds before a resume.

        Raises:
            CheckpointError: it was not kept, since nothing was selected in those rounds.
        """
        best = self._best(run)
        if best is None:
            return
        kept = RunFolder(run.path).selected(best) if run.path else None
        if kept is not None and kept[0] == best:
            run.select(*kept)
        elif best == run.done:  # killed before the state could be selected
            self._select(run)
        else:
            raise CheckpointError(
                f"BestCheckpoint: the state after round {best}, the best so far, was not kept; go on without "
                "BestCheckpoint, or start the run again with it"
            )

    def on_round_end(self, run: RunHandle, metrics: Mapping[str, Any]) -> None:
        """Keep the state if the round is the best so far."""
        if self._best(run) == metrics["round"]:
            self._select(run)

    def _best(self, run: RunHandle) -> int | None:
        found = [*scores(run, self.metric)]
        return max(found, key=lambda one: one[1])[0] if found else None

    def _select(self, run: RunHandle) -> None:
        assert run.state is not None, "a run on another machine has no state here"
        if run.path is not None:
            RunFolder(run.path).save_selected(run.done, run.state)
        run.select(run.done, run.state)
