"""A run's numbers as a run of MLflow."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.callbacks.tracker import Tracker, own_id


@dataclass
class MLflow(Tracker):
    """A run of MLflow, in a folder unless MLFLOW_TRACKING_URI names a server.

    Args:
        project: the experiment's name.
        clients: whether every client's own numbers go, too.
    """

    project: str = "fedlora"

    def begin(self, folder: Path, config: Mapping[str, Any], done: int) -> None:
        """Start it, or go on with it."""
        from mlflow import MlflowClient

        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else new versions want a database
        here = (folder / "mlruns").absolute().as_uri()
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or here)
        found = self._client.get_experiment_by_name(self.project)
        experiment = found.experiment_id if found else self._client.create_experiment(self.project)
        make = lambda: self._client.create_run(experiment, run_name=folder.parent.name).info.run_id  # noqa: E731
        self._own = own_id(folder / "mlflow-id", make)
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
