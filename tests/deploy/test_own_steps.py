"""An update step in a file of its own, through public names alone: in one process, and at a site."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import fedlora as fl
from fedlora.config.translate import run_spec
from fedlora.core.messages import Peer, Task
from fedlora.rounds.codec import read_task, read_update

pytestmark = pytest.mark.slow  # whole runs

OWN = '''
"""Changes travel as whole numbers of a size, rounded at random so that they are right on average."""

from dataclasses import dataclass, replace

import torch

from fedlora import ClientUpdate, RoundUpdates, UpdateStep


@dataclass(frozen=True)
class Grid(UpdateStep):
    size: float

    def on_client(self, given: ClientUpdate) -> ClientUpdate:
        rng, made = given.generator("grid"), {}
        for name, by in given.change.items():
            made[name] = (by / self.size + torch.from_numpy(rng.random(tuple(by.shape)))).floor().float()
        return given.become(given.adapter.with_tensors(made))

    def on_server(self, given: RoundUpdates) -> RoundUpdates:
        made = []
        for update, task in zip(given.updates, given.tasks, strict=True):
            sent, whole = dict(task.adapter.tensors()), dict(update.adapter.tensors())
            own = {name: sent[name] + self.size * whole[name] for name in task.shared()}
            made.append(replace(update, adapter=update.adapter.with_tensors(own)))
        return given.become(made)
'''
STEP = "steps=[{_target_: own_grid.Grid, size: 0.001}]"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "own_grid.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("own_grid")
    del sys.modules["own_grid"]


def test_a_run_in_one_process_is_off_by_no_more_than_the_grid(own: Any) -> None:
    runs = [
        fl.simulate(
            "tiny",
            "tiny",
            strategy="flexlora",
            ranks=[4, 2],
            clients=3,
            rounds=1,
            steps=steps,
            progress=False,
        )
        for steps in ((), (own.Grid(1e-3),), (own.Grid(1e-3),))
    ]
    plain, coded, again = (run.summary["adapter_sha256"] for run in runs)
    assert coded == again != plain
    before, after = (run.metrics[-1]["loss"] for run in runs[:2])
    assert after == pytest.approx(before, abs=0.05)


def test_a_site_applies_the_client_half_of_what_it_allows(
    ask: Any, composed: Any, site: dict[str, Any], own: Any, tmp_path: Path
) -> None:
    config = composed(STEP, "allow=[own_grid]")
    assert "allow=[own_grid]" in ask(config, site).why()  # whatever the server's configuration allows itself
    replies = []
    for number, (words, run) in enumerate((({}, composed()), ({"allow": "own_grid"}, config))):
        asked = ask(run, site | words | {"state": str(tmp_path / f"state-{number}")})
        assert not asked().has_error()
        reply = asked.train()
        assert not reply.has_error(), reply.error
        task: Task = read_task(asked.work())[0]
        replies.append(dict(read_update(reply, task, Peer(0, 2), 1).adapter.tensors()))
    plain, sent = replies
    start = dict(task.adapter.tensors())
    assert sum(int(torch.count_nonzero(sent[name])) for name in task.shared()) > 0
    for name in task.shared():
        assert torch.equal(sent[name], sent[name].round())
        assert float((start[name] + 1e-3 * sent[name] - plain[name]).abs().max()) <= 1.001e-3


def test_a_private_site_pays_as_ever_and_sends_what_the_step_makes(
    ask: Any, composed: Any, site: dict[str, Any], own: Any, tmp_path: Path
) -> None:
    rows = Path(site["data"])
    rows.write_text(rows.read_text() * 9)
    config = composed(
        STEP, "allow=[own_grid]", "privacy=dp_sgd", "privacy.epsilon=2", "privacy.accountant=rdp"
    )
    asked = ask(config, site | {"allow": "own_grid", "epsilon": 2.0})
    assert not asked().has_error()
    reply = asked.train()
    assert not reply.has_error(), reply.error
    task = read_task(asked.work())[0]
    sent = dict(read_update(reply, task, Peer(0, 2), 1).adapter.tensors())
    assert all(torch.equal(sent[name], sent[name].round()) for name in task.shared())
    paid = Path(site["state"]) / "trial" / "clients" / "client-0" / "ledger.json"
    assert fl.privacy.Ledger.load(paid.read_text()).epsilon == reply.content["metrics"]["epsilon"] <= 2


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("os.system", "allow=[os]"),
        ("fedlora.robust.geometry.Segment", "expected a _target_ that makes a UpdateStep, got a Segment"),
        ("fedlora.data.files.load", "outside of what"),
    ],
)
def test_no_list_of_steps_has_a_site_make_anything_else(
    ask: Any, composed: Any, site: dict[str, Any], target: str, said: str
) -> None:
    config = OmegaConf.create(OmegaConf.to_container(composed()))
    config.steps = [{"_target_": target}]
    assert said in ask(config, site).why()


def test_the_server_of_a_deployment_makes_the_same_steps(composed: Any, own: Any) -> None:
    config = composed(STEP)
    config.allow = ["own_grid"]
    assert run_spec(config).steps == (own.Grid(1e-3),)
