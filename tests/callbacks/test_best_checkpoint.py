"""Which state is selected, by lists of scores; whole runs are in tests/integration."""

from pathlib import Path

import pytest
import torch

from fedlora import Adapter, State
from fedlora.callbacks import BestCheckpoint, RunHandle
from fedlora.callbacks.base import Callbacks
from fedlora.errors import CheckpointError
from fedlora.storage.run_folder import RunFolder


def after(round: int) -> State:
    return State(Adapter({}, {"head": torch.tensor([float(round)])}), round)


def watched(path: Path | None, accuracies: list[float], done: int = 0) -> RunHandle:
    """A run of these rounds, begun after some of them."""
    lines = [{"round": k, "loss": 1.0, "accuracy": found} for k, found in enumerate(accuracies, 1)]
    run = RunHandle(9, after(done), done, path=path, validation=True, metrics=lines[:done])
    run.callbacks = [BestCheckpoint()]
    callbacks = Callbacks(run)
    callbacks.run_begin()
    for line in lines[done:]:
        callbacks.round_end(line, [], after(int(line["round"])))
    return run


def test_the_first_of_the_best_rounds_is_selected_and_the_last_state_goes_on() -> None:
    run = watched(None, [0.5, 0.7, 0.7, 0.6])
    assert (run.selected_round, run.result.round) == (2, 2)
    assert run.state is not None
    assert run.state.round == 4


def test_a_run_that_lost_its_last_rounds_selects_among_those_that_are_left(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "a: 1\n")
    assert watched(folder.path, [0.5, 0.4, 0.6]).selected_round == 3
    run = watched(folder.path, [0.5, 0.4], done=2)  # the checkpoint of round 3 was damaged
    assert (run.selected_round, run.result.digest()) == (1, after(1).digest())
    again = watched(folder.path, [0.5, 0.4, 0.6], done=2)  # and round 3 is done again
    assert (again.selected_round, again.result.digest()) == (3, after(3).digest())


def test_a_best_state_that_was_not_kept_is_not_replaced_by_another(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "a: 1\n")
    watched(folder.path, [0.5])  # keeps round 1; the better round 2 ran without the callback
    with pytest.raises(CheckpointError, match="the state after round 2, the best so far, was not kept"):
        watched(folder.path, [0.5, 0.7, 0.6], done=3)


def test_only_the_last_two_selected_states_are_kept(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "a: 1\n")
    watched(folder.path, [0.1, 0.2, 0.3, 0.4])
    kept = sorted(path.name for path in (folder.path / "checkpoint").glob("selected-*"))
    assert kept == ["selected-000003.safetensors", "selected-000004.safetensors"]
