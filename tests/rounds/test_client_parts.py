"""Whole runs of strategies whose clients hold on to something: what is sent, lost, kept and added up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

import fedlora.engines.client_runtime as site_module
import fedlora.engines.replies as replies_module
import fedlora.rounds.exchange as inbox_module
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Peer
from fedlora.core.strategy import Strategy
from fedlora.storage.client_state import ClientStore
from fedlora.strategies import FedExLoRA, FedIT, FedSALoRA, FFALoRA, FLoRA, RoLoRA
from fedlora.training.client import TrainRequest, TrainResult

HOLDING = [FFALoRA(), RoLoRA(), FLoRA(), FedExLoRA(), FedSALoRA()]
RANKS = [1, 1, 1]  # so small that a gain is less than the base delta
Fails = Callable[[TrainRequest], bool]
strategies = pytest.mark.parametrize("strategy", HOLDING, ids=lambda s: type(s).__name__)


@pytest.fixture
def watched(noise: Any) -> Any:
    """A client that notes the base delta and the start of every training, and fails where it is told to."""

    @dataclass(frozen=True)
    class Watched(noise):  # type: ignore[misc]
        fails: Fails = lambda a: False
        seen: dict[tuple[int, int], tuple[str, str]] = field(default_factory=dict)

        def train(self, base: Any, assignments: Sequence[TrainRequest]) -> list[TrainResult]:
            self.groups.append([a.client for a in assignments])
            for a in assignments:
                if self.fails(a):
                    raise RuntimeError(f"no luck for {a.client}")
            for a in assignments:
                self.seen[a.round, a.client] = (Adapter(a.task.base_delta).digest(), a.start.digest())
            return [self._outcome(a) for a in assignments]

    return Watched


def everything(task: Any, round: int, seed: int, held: Any = None, version: Any = None) -> Any:
    """`write_task` of a server that counts on nothing."""
    return write_task(task, round, seed)


write_task = inbox_module.write_task


def site(tmp_path: Path, name: str) -> dict[str, Any]:
    return {"memory": ClientStore(tmp_path / f"memory-{name}")}


def downs(ran: Any, client: int) -> dict[int, int]:
    return {x["round"]: x["bytes_down"] for x in ran.lines("clients.jsonl") if x["client"] == client}


@strategies
def test_a_run_is_the_same_with_nothing_held_and_costs_less_with_it(
    lab: Any, watched: Any, tmp_path: Path, strategy: Strategy, monkeypatch: Any
) -> None:
    """With clients that sit out rounds, and one that fails."""
    runs = []
    for name in ("held", "all"):
        client = watched(fails=lambda a: (a.round, a.client) == (3, 1))
        if name == "all":
            monkeypatch.setattr(inbox_module, "write_task", everything)
        options = {"clients_per_round": 3, "rounds": 7, "site": site(tmp_path, name)}
        runs.append(lab.run(strategy, [1] * 4, client=client, **options))
    held, every = runs
    assert held.digest == every.digest
    assert held.client.seen == every.client.seen
    assert held.federation.state.digest() == every.federation.state.digest()
    down = [sum(line["bytes_down"] for line in ran.lines("metrics.jsonl")) for ran in runs]
    assert down[0] < 0.95 * down[1]
    assert "restarted" not in held.text


def test_a_frozen_factor_is_paid_for_once(lab: Any) -> None:
    ran = lab.run(FFALoRA(), rounds=4)
    frozen = 4 * 4 * (8 + 8)  # rank × float32 × d_in of both layers
    for client in range(3):
        down = downs(ran, client)
        assert down[2] == down[3] == down[4]
        assert down[1] - down[2] > frozen
    metrics = ran.lines("metrics.jsonl")
    assert metrics[1]["bytes_down"] == sum(downs(ran, client)[2] for client in range(3))


def test_a_client_that_failed_is_sent_everything_again(lab: Any, watched: Any) -> None:
    client = watched(fails=lambda a: (a.round, a.client) == (3, 1))
    down = downs(lab.run(FFALoRA(), rounds=5, client=client), 1)
    assert down[1] == down[4] > down[2] == down[3] == down[5]


def test_a_client_whose_reply_was_lost_or_bad_is_sent_everything_again(lab: Any) -> None:
    def change(replies: list[Message]) -> list[Message]:
        found = []
        for reply in replies:
            client = reply.metadata.src_node_id - 1000
            round = int(reply.content.metric_records["metrics"]["round"])  # type: ignore[arg-type]
            if (round, client) == (2, 0):
                continue
            if (round, client) == (2, 1):
                reply.content.metric_records["metrics"]["round"] = 9
            found.append(reply)
        return found

    ran = lab.run(FFALoRA(), rounds=4, change=change)
    for client in (0, 1):
        down = downs(ran, client)
        assert down[1] == down[3] > down[2] == down[4]
    assert downs(ran, 2)[3] == downs(ran, 2)[2]


@pytest.mark.parametrize("strategy", [FFALoRA(), FLoRA(), FedSALoRA()], ids=lambda s: type(s).__name__)
def test_a_restarted_node_says_so_once_and_is_served_in_full_the_round_after(
    lab: Any, watched: Any, tmp_path: Path, strategy: Strategy
) -> None:
    client, grids = watched(), list[Any]()

    def change(replies: list[Message]) -> list[Message]:
        if len(client.groups) == 3:  # after the third round the process of client 1 dies
            grids[0]._site.shelf.hold(1, {})
        return replies

    grid = lab.grid

    def kept(*args: Any, **more: Any) -> Any:
        grids.append(grid(*args, **more))
        return grids[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(lab), "grid", lambda self, *args, **more: kept(*args, **more))
        ran = lab.run(strategy, RANKS, rounds=5, client=client, change=change, site=site(tmp_path, "a"))
    dropped = [x for x in ran.lines("clients.jsonl") if x["status"] == "dropped"]
    assert [(x["round"], x["client"]) for x in dropped] == [(4, 1)]
    assert "restarted" in dropped[0]["reason"]
    for round in (2, 3, 4, 5):
        assert (
            len({client.seen[at][0] for at in client.seen if at[0] == round}) == 1
        )  # one base delta for all


@pytest.mark.parametrize("strategy", [FLoRA(), FedExLoRA(), FedSALoRA()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("when", ["training", "writing", "remembering"])
def test_a_group_that_is_tried_again_adds_nothing_twice(
    lab: Any, watched: Any, tmp_path: Path, strategy: Strategy, when: str, monkeypatch: Any
) -> None:
    """The first try of the group fails at its last client, before or after others of it have been served."""
    want = lab.run(strategy, RANKS, rounds=4, fuse=1, client=watched(), site=site(tmp_path, "a"))
    broken: set[int] = set()

    def once(a: TrainRequest, group: bool = True) -> bool:
        if a.client == 2 and a.round > 1 and a.round not in broken and group:
            broken.add(a.round)
            return True
        return False

    client = watched(fails=once) if when == "training" else watched()
    if when == "writing":
        write = replies_module.write_update

        def write_update(outcome: TrainResult, task: Any, round: int, examples: int) -> Any:
            if examples == 30 and round > 1 and round not in broken:
                broken.add(round)
                raise OSError("no memory")
            return write(outcome, task, round, examples)

        monkeypatch.setattr(replies_module, "write_update", write_update)
    if when == "remembering":
        remember = site_module.ClientRuntime._remember

        def _remember(self: Any, a: TrainRequest, *kept: Any) -> None:
            if once(a):
                raise OSError("disk full")
            remember(self, a, *kept)

        monkeypatch.setattr(site_module.ClientRuntime, "_remember", _remember)
    got = lab.run(strategy, RANKS, rounds=4, fuse=3, client=client, site=site(tmp_path, "b"))
    assert broken == {2, 3, 4}
    assert not [x for x in got.lines("clients.jsonl") if x["status"] == "dropped"]
    assert got.digest == want.digest
    assert client.seen == want.client.seen


def test_own_parts_go_on_from_where_the_client_left_them(lab: Any, watched: Any, tmp_path: Path) -> None:
    client = watched()
    ran = lab.run(FedSALoRA(), rounds=3, client=client, site=site(tmp_path, "a"))
    memory, state = ClientStore(tmp_path / "memory-a"), ran.federation.state
    parts = [memory.read(c, 4) for c in range(3)]
    names = {*(f"{m}.B" for m in state.adapter.pairs), "head.weight", "head.bias"}
    assert all(found.keys() == names for found in parts)
    assert len({float(found["a.q.B"].sum()) for found in parts}) == 3
    for c, found in enumerate(parts):
        task, before = FedSALoRA().task(state, Peer(c, 4)), memory.read(c, 3)
        last = client._outcome(TrainRequest(c, 3, 0, task, [], before)).memory
        assert last.keys() == names
        assert all(torch.equal(found[name], tensor) for name, tensor in last.items())
        assert not torch.equal(found["a.q.B"], before["a.q.B"])
    # Nothing of them has reached the server.
    assert all(not pair.B.any() for pair in state.adapter.pairs.values())
    assert torch.equal(state.adapter.extra["head.bias"], lab.adapter().extra["head.bias"])


def test_a_site_without_a_place_for_own_parts_says_so(lab: Any) -> None:
    ran = lab.run(FedSALoRA(), rounds=1)
    assert {x["status"] for x in ran.lines("clients.jsonl")} == {"dropped"}
    assert "nowhere to keep it" in ran.text


def test_the_last_look_is_at_what_every_client_then_has(lab: Any, watched: Any, tmp_path: Path) -> None:
    rules = {"clients_per_round": 2, "evaluate_clients": True, "rounds": 3}
    options = {**site(tmp_path, "a"), "held_out": True}
    ran = lab.run(FedSALoRA(), [4] * 4, client=watched(), site=options, **rules)
    before = len(ran.client.seen)
    own = ran.federation.evaluate_clients(ran.grid)
    assert list(own) == [0, 1, 2, 3]  # those that were not sampled, too
    assert len(ran.client.seen) == before
    memory, state = ClientStore(tmp_path / "memory-a"), ran.federation.state
    for c, metrics in own.items():
        kept = memory.read(c, 4) or {
            name: t for name, t in state.adapter.tensors() if not name.endswith(".A")
        }
        want = sum(float(t.double().sum()) for t in kept.values())
        want += sum(float(pair.A.double().sum()) for pair in state.adapter.pairs.values())
        assert metrics["local_loss"] == pytest.approx(want)
        assert metrics["num-examples"] == c + 1  # a tenth of its rows
    again = ran.federation.evaluate_clients(ran.grid)
    assert again == own


def test_a_last_look_that_fails_or_diverged_is_told_and_left_out(
    lab: Any, watched: Any, monkeypatch: Any
) -> None:
    ran = lab.run(FedIT(), client=watched(), evaluate_clients=True, site={"held_out": True})

    def evaluate(self: Any, base: Any, assignments: Sequence[TrainRequest]) -> list[tuple[float, float]]:
        if assignments[0].client == 1:
            raise RuntimeError("shy")
        return [(float("nan") if assignments[0].client == 2 else 2.0, 0.5)]

    monkeypatch.setattr(watched, "evaluate", evaluate)
    own = ran.federation.evaluate_clients(ran.grid)
    assert own[0] == {"num-examples": 1, "local_loss": 2.0, "local_accuracy": 0.5}
    assert 1 not in own
    assert "local_loss" not in own[2]
    assert "could not evaluate its model: RuntimeError: shy" in ran.text


def test_without_the_rule_there_is_no_last_look(lab: Any) -> None:
    ran = lab.run(FedIT())
    assert ran.federation.evaluate_clients(ran.grid) == {}
