import csv
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedlora.callbacks.base import Callback, Callbacks, RunHandle
from fedlora.callbacks.csv import CSV
from fedlora.callbacks.mlflow import MLflow
from fedlora.callbacks.tensorboard import TensorBoard
from fedlora.callbacks.tracker import Tracker, numbers
from fedlora.callbacks.wandb import WandB
from fedlora.storage.run_folder import RunFolder

CONFIG = {"strategy": {"_target_": "fedlora.strategies.FedIT"}, "seed": 0}


class Seen(Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.warned, self.ended = list[str](), list[int]()

    def on_round_end(self, run: RunHandle, metrics: Mapping[str, Any]) -> None:
        self.ended.append(metrics["round"])

    def on_warning(self, run: RunHandle, text: str) -> None:
        self.warned.append(text)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "a: 1\n")


def watched(folder: RunFolder, tracker: Tracker, rounds: range) -> Seen:
    """A run of some rounds, each with a loss and an accuracy every other round."""
    seen = Seen()
    run = RunHandle(9, path=folder.path, config=CONFIG, done=rounds[0] - 1, callbacks=[seen, tracker])
    callbacks = Callbacks(run)
    callbacks.run_begin()
    for round in rounds:
        line = {"round": round, "loss": 1 / round, "epsilon": None, "clients": 2}
        line |= {"accuracy": round / 10} if round % 2 == 0 else {}
        callbacks.round_end(line, [{"round": round, "client": 1, "loss": 0.5}])
    callbacks.run_end({"accuracy": 0.4})
    return seen


def test_csv_goes_on_where_a_run_was_cut_off(folder: RunFolder) -> None:
    assert not watched(folder, CSV(), range(1, 4)).warned
    assert not watched(folder, CSV(), range(3, 5)).warned
    with (folder.path / "tracking" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["accuracy"] for row in rows] == ["", "0.2", "", "0.4"]
    assert "epsilon" not in rows[0]


def test_clients_own_numbers_go_if_asked_for(folder: RunFolder) -> None:
    watched(folder, CSV(clients=True), range(1, 3))
    with (folder.path / "tracking" / "metrics.csv").open() as file:
        assert [row["client/1/loss"] for row in csv.DictReader(file)] == ["0.5", "0.5"]


def test_what_is_no_number_is_left_out() -> None:
    line = {"round": 3, "loss": 1, "epsilon": None, "epsilon_valid": True, "status": "ok", "client": 4}
    assert numbers(line) == {"loss": 1.0}


class Broken(CSV):
    """Works until the second round."""

    asked = 0

    def round(self, round: int, numbers: Mapping[str, float]) -> None:
        self.asked += 1
        if round > 1:
            raise OSError(28, "No space left on device")


def test_a_tracker_that_fails_is_one_warning_and_the_run_goes_on(folder: RunFolder) -> None:
    seen = watched(folder, broken := Broken(), range(1, 5))
    assert seen.ended == [1, 2, 3, 4]
    assert len(seen.warned) == 1
    assert "No space left" in seen.warned[0]
    assert broken.asked == 2


@pytest.mark.parametrize(
    ("tracker", "module"),
    [(TensorBoard, "torch.utils.tensorboard"), (WandB, "wandb"), (MLflow, "mlflow")],
)
def test_what_is_not_installed_says_what_to_install(
    folder: RunFolder, tracker: Callable[[], Tracker], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    seen = watched(folder, tracker(), range(1, 3))
    assert seen.ended == [1, 2]
    assert len(seen.warned) == 1
    assert f"pip install 'fedlora[{tracker.__name__.lower()}]'" in seen.warned[0]  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_back_what_was_written(folder: RunFolder) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert not watched(folder, TensorBoard(), range(1, 4)).warned
    assert not watched(folder, TensorBoard(), range(3, 5)).warned
    read = EventAccumulator(str(folder.path / "tracking")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("accuracy")] == [
        (2, pytest.approx(0.2)),
        (4, pytest.approx(0.4)),
    ]
    assert [event.step for event in read.Scalars("loss")] == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_reads_back_what_was_written(folder: RunFolder) -> None:
    mlflow = pytest.importorskip("mlflow")
    assert not watched(folder, MLflow(), range(1, 4)).warned
    own = (folder.path / "tracking" / "mlflow-id").read_text()
    client = mlflow.MlflowClient((folder.path / "tracking" / "mlruns").as_uri())
    assert [(m.step, m.value) for m in client.get_metric_history(own, "accuracy")] == [(2, 0.2)]
    assert client.get_run(own).info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_leaves_a_run_to_send(folder: RunFolder) -> None:
    pytest.importorskip("wandb")
    assert not watched(folder, WandB(), range(1, 4)).warned
    assert list((folder.path / "tracking" / "wandb").glob("offline-run-*/run-*.wandb"))
