"""Trackers: a run's numbers, a round at a time, where other tools look for them.

A tracker is a copy for the eye: everything is in the run's own files first, and one that fails never stops a
run. What is written here lies below the run's folder, in `tracking/`; where a server is meant, its address
comes from the tool's own environment (WANDB_BASE_URL, MLFLOW_TRACKING_URI), never from a configuration.
"""

import csv
import io
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedlora.callbacks.console import Display
from fedlora.errors import ConfigError
from fedlora.storage.atomic import write_whole
from fedlora.storage.run_folder import RunFolder

PLACES = ("round", "client")  # what a number is of, and no number itself


class Tracker(Protocol):
    """Where numbers go."""

    def begin(self, folder: Path, config: Mapping[str, Any], done: int) -> None:
        """A run begins, or goes on after so many rounds; `folder` is for the tracker's own files."""

    def round(self, round: int, numbers: Mapping[str, float]) -> None:
        """The numbers of a round."""

    def end(self, numbers: Mapping[str, float]) -> None:
        """The run has ended, with these numbers in all; with none it was cut off."""


class CSV:
    """`metrics.csv`, a row a round; a column that a round lacks is empty in it."""

    def begin(self, folder: Path, config: Mapping[str, Any], done: int) -> None:
        """Keep what is there of the rounds that are done."""
        self._file, self._rows = folder / "metrics.csv", list[dict[str, Any]]()
        if done and self._file.is_file():
            with self._file.open(encoding="utf-8", newline="") as file:
                rows = [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]
            self._rows = [row for row in rows if int(row["round"]) <= done]

    def round(self, round: int, numbers: Mapping[str, float]) -> None:
        """Write the whole table, with one row more."""
        self._rows.append({"round": round, **numbers})
        text = io.StringIO()
        table = csv.DictWriter(text, dict.fromkeys(name for row in self._rows for name in row))
        table.writeheader()
        table.writerows(self._rows)
        write_whole(self._file, lambda file: file.write_text(text.getvalue(), encoding="utf-8", newline=""))

    def end(self, numbers: Mapping[str, float]) -> None:
        """Nothing: summary.json has them."""


class TensorBoard:
    """Event files: tensorboard --logdir RUN/tracking, or the folder of many runs."""

    def begin(self, folder: Path, config: Mapping[str, Any], done: int) -> None:
        """Open a file; of rounds that are done again, TensorBoard shows the last."""
        from torch.utils.tensorboard import SummaryWriter

        # An event file that ends here hides the steps after it of those before.
        self._writer: Any = SummaryWriter(str(folder), purge_step=done + 1 if done else None)  # type: ignore[no-untyped-call]

    def round(self, round: int, numbers: Mapping[str, float]) -> None:
        """A scalar a number."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def end(self, numbers: Mapping[str, float]) -> None:
        """Close the file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, on disk alone (`wandb sync` sends it later) unless it is to go online.

    Args:
        project: its project.
        mode: offline or online.
    """

    def __init__(self, project: str = "fedlora", mode: str = "offline") -> None:
        if mode not in ("offline", "online"):
            raise ConfigError(f"track.mode: expected offline or online, got '{mode}'")
        self._project, self._mode = project, mode

    def begin(self, folder: Path, config: Mapping[str, Any], done: int) -> None:
        """Start it, or go on with it."""
        import wandb

        settings = wandb.Settings(console="off", silent=True, init_timeout=30)
        own = _own_id(folder / "wandb-id", lambda: uuid.uuid4().hex[:12])
        where = {"project": self._project, "mode": self._mode, "dir": str(folder), "name": folder.parent.name}
        self._run = wandb.init(id=own, resume="allow", config=dict(config), settings=settings, **where)

    def round(self, round: int, numbers: Mapping[str, float]) -> None:
        """A step a round."""
        self._run.log(dict(numbers), step=round)

    def end(self, numbers: Mapping[str, float]) -> None:
        """Close it."""
        self._run.summary.update(dict(numbers))
        self._run.finish()


class MLflow:
    """A run of MLflow, in a folder unless MLFLOW_TRACKING_URI names a server.

    Args:
        project: the experiment's name.
    """

    def __init__(self, project: str = "fedlora") -> None:
        self._project = project

    def begin(self, folder: Path, config: Mapping[str, Any], done: int) -> None:
        """Start it, or go on with it."""
        from mlflow import MlflowClient

        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else new versions want a database
        here = (folder / "mlruns").absolute().as_uri()
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or here)
        found = self._client.get_experiment_by_name(self._project)
        experiment = found.experiment_id if found else self._client.create_experiment(self._project)
        make = lambda: self._client.create_run(experiment, run_name=folder.parent.name).info.run_id  # noqa: E731
        self._own = _own_id(folder / "mlflow-id", make)
        if not done:
            self._client.log_dict(self._own, dict(config), "config.json")

    def round(self, round: int, numbers: Mapping[str, float]) -> None:
        """A step a round."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(name, value, now, round) for name, value in numbers.items()]
        for at in range(0, len(values), 500):  # a server takes a thousand at once
            self._client.log_batch(self._own, metrics=values[at : at + 500])

    def end(self, numbers: Mapping[str, float]) -> None:
        """Close it."""
        self._client.set_terminated(self._own, "FINISHED" if numbers else "KILLED")


class Tracked:
    """A display that also tells a tracker, for as long as that works.

    Args:
        display: what the user sees.
        tracker: where numbers go.
        folder: the run's.
        config: its settings.
        clients: whether every client's own numbers go, too.
    """

    def __init__(
        self, display: Display, tracker: Tracker, folder: RunFolder, config: Mapping[str, Any], clients: bool
    ) -> None:
        self._display, self._folder, self._clients = display, folder, clients
        self._tracker: Tracker | None = tracker
        done = max((line["round"] for line in folder.rounds()), default=0)
        self._try(lambda tracker: _begin(tracker, folder.path / "tracking", config, done))

    def begin(self, round: int, clients: int) -> None:
        """A round begins with so many clients."""
        self._display.begin(round, clients)

    def advance(self, clients: int) -> None:
        """So many clients have finished."""
        self._display.advance(clients)

    def warn(self, text: str) -> None:
        """Something that the user should know."""
        self._display.warn(text)

    def end(self, metrics: dict[str, Any]) -> None:
        """A round has ended with this line of metrics.jsonl."""
        self._display.end(metrics)
        round = int(metrics["round"])
        self._try(lambda tracker: tracker.round(round, numbers(metrics) | self._of_clients(round)))

    def close(self, summary: Mapping[str, Any]) -> None:
        """The run has ended with this summary; with an empty one it was cut off."""
        self._try(lambda tracker: tracker.end(numbers(summary)))

    def _of_clients(self, round: int) -> dict[str, float]:
        lines: Sequence[Mapping[str, Any]] = self._folder.clients() if self._clients else []
        return {
            f"client/{line['client']}/{name}": value
            for line in lines
            if line["round"] == round
            for name, value in numbers(line).items()
        }

    def _try(self, tell: Callable[[Tracker], Any]) -> None:
        """Tell the tracker; when that fails the user is told once, and the tracker no more."""
        if self._tracker is None:
            return
        try:
            tell(self._tracker)
        except Exception as error:  # trackers are other people's code, networks and disks
            name = type(self._tracker).__name__
            self._tracker = None
            why = " ".join(str(error).split())[:300] or type(error).__name__
            if isinstance(error, ImportError):
                why += f"; pip install 'fedlora[{name.lower()}]'"
            self._display.warn(f"track: {name} failed, the run goes on without it: {why}")


def _begin(tracker: Tracker, folder: Path, config: Mapping[str, Any], done: int) -> None:
    folder.mkdir(exist_ok=True)
    tracker.begin(folder, config, done)


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """What of a line is a number."""
    return {
        name: float(value)
        for name, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in PLACES
    }


def _own_id(file: Path, make: Callable[[], str]) -> str:
    """The id under which a tool knows this run, kept for when it goes on."""
    if not file.is_file():
        made = make()
        write_whole(file, lambda to: to.write_text(made, encoding="utf-8"))
    return file.read_text(encoding="utf-8")
