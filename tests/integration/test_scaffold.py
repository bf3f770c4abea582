"""Whole runs with SCAFFOLD by the command: against plain SGD, in groups, resumed, and what is sent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.cli.main import main
from fedlora.storage.run_folder import RunFolder

SGD = (
    "weights=uniform",
    "client.optimizer._target_=torch.optim.SGD",
    "client.clip=null",
    "client.lr=0.5",
    "client.head_lr=0.1",
    "client.steps=2",
)
JOB = (*SGD, "strategy=ffalora", "ranks=[2,4]", "rounds=4", "clients_per_round=2")


@pytest.fixture(scope="module")
def whole(run: Callable[..., Any]) -> Any:
    return run(*JOB, "rule=scaffold")


def state(of: Any) -> Any:
    return RunFolder(of.path).load_state()[1]


def test_a_killed_run_goes_on_with_what_server_and_clients_remember(
    whole: Any, run: Callable[..., Any], result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the clients of round 3 have moved on and the server has not."""

    class Killed(BaseException):
        pass

    finish, calls = RunFolder.finish_round, [0]

    def dying(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise Killed
        finish(*args)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish_round", dying)
        with pytest.raises(Killed):
            run(*JOB, "rule=scaffold", out=tmp_path / "run")
    main(["run", f"resume={tmp_path / 'run'}"])
    again = result(tmp_path / "run")
    assert again.sha == whole.sha
    assert state(again).digest() == state(whole).digest()
    counted = state(again).memory["rule/counted"].tolist()
    last = {line["client"]: line["round"] - 1 for line in whole.clients}
    assert counted == sorted(map(list, last.items()))


def test_it_is_not_plain_sgd_and_groups_change_nothing(whole: Any, run: Callable[..., Any]) -> None:
    plain, alone = run(*JOB), run(*JOB, "rule=scaffold", "engine.fuse=1")
    assert whole.sha != plain.sha
    others = dict(state(alone).adapter.tensors())
    for name, tensor in state(whole).adapter.tensors():
        torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=1e-6)
    first = [line for line in whole.clients if line["round"] == 1]
    for line, free in zip(first, plain.clients, strict=False):
        assert line["loss"] == free["loss"]  # every c is 0 in the first round
        assert 1.5 < line["bytes_up"] / free["bytes_up"] < 2.1
    down = [sum(line["bytes_down"] for line in ran.clients if line["round"] > 2) for ran in (whole, plain)]
    assert 1.5 < down[0] / down[1] < 2.5


def test_of_one_client_it_is_plain_sgd_to_the_bit(run: Callable[..., Any]) -> None:
    one = (*SGD, "clients=1", "rounds=3", "ranks=4")
    assert run(*one).sha == run(*one, "rule=scaffold").sha
