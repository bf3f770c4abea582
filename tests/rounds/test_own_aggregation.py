"""Update steps and aggregations that are defined outside the package, through public names alone."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import fedlora as fl
from fedlora import RoundUpdates, UpdateStep
from fedlora.errors import ConfigError, IncompatibleUpdates
from fedlora.robust.krum import Krum
from fedlora.rounds.aggregation.base import Aggregated, Aggregation
from fedlora.rounds.aggregation.plain import PlainAggregation
from fedlora.strategies import FedIT, FFALoRA

OWN = '''
"""Half of every change, and only those of even clients."""

from dataclasses import dataclass, replace

from fedlora import Adapter, Pair, RoundUpdates, UpdateStep


@dataclass(frozen=True)
class Shrink(UpdateStep):
    share: float

    def on_server(self, given: RoundUpdates) -> RoundUpdates:
        made = []
        for update, task in zip(given.updates, given.tasks):
            sent = task.adapter.pairs
            pairs = {
                m: Pair(p.A, sent[m].B + self.share * (p.B - sent[m].B), p.scale)
                for m, p in update.adapter.pairs.items()
            }
            made.append(replace(update, adapter=Adapter(pairs, update.adapter.extra)))
        return given.become(made, metrics={"shrunk": len(made)})


@dataclass(frozen=True)
class EvenOnly(UpdateStep):
    def on_server(self, given: RoundUpdates) -> RoundUpdates:
        kept = [k for k, update in enumerate(given.updates) if update.peer.id % 2 == 0]
        notes = {u.peer.id: {"rejected": "odd"} for u in given.updates if u.peer.id % 2}
        return given.become([given.updates[k] for k in kept], [given.tasks[k] for k in kept], notes)
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "own_steps.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("own_steps")
    del sys.modules["own_steps"]


def test_own_steps_in_a_file_of_their_own_clip_and_screen_the_last_one_first(lab: Any, own: Any) -> None:
    steps = [own.Shrink(0.5), own.EvenOnly()]
    ran = lab.run(FFALoRA(), rounds=1, aggregation=PlainAggregation(steps))
    whole = lab.run(FFALoRA(), rounds=1, change=lab.keep(0, 2))
    for name, pair in whole.federation.state.adapter.pairs.items():  # B begins at zero
        assert ran.federation.state.adapter.pairs[name].B.allclose(pair.B / 2)
    assert [line.get("rejected") for line in ran.lines("clients.jsonl")] == [None, "odd", None]
    assert ran.lines("metrics.jsonl")[0]["shrunk"] == 2
    other = lab.run(FFALoRA(), rounds=1, aggregation=PlainAggregation(steps[::-1]))
    assert other.digest == ran.digest
    assert other.lines("metrics.jsonl")[0]["shrunk"] == 3


def test_notes_and_numbers_of_steps_add_up(lab: Any, own: Any) -> None:
    steps = [Krum(1), own.Shrink(1.0)]  # as a run puts them: the robust rule judges what the others have made
    ran = lab.run(FFALoRA(), (4,) * 5, rounds=1, aggregation=PlainAggregation(steps))
    line = ran.lines("metrics.jsonl")[0]
    assert line["shrunk"] == 5
    assert line["rejected"] > 0
    assert all("krum_score" in line for line in ran.lines("clients.jsonl"))


def test_a_step_that_needs_more_updates_than_came_leaves_the_state(lab: Any) -> None:
    class Many(UpdateStep):
        least = 4

        def on_server(self, given: RoundUpdates) -> RoundUpdates:
            raise AssertionError("never asked")

    ran = lab.run(FedIT(), rounds=1, aggregation=PlainAggregation([Many()]))
    assert ran.federation.state.round == 0
    assert "3 good updates, 4 needed; the state stays as it was" in ran.text


def test_a_step_that_can_make_nothing_of_the_updates_leaves_the_state(lab: Any) -> None:
    class Nothing(UpdateStep):
        def on_server(self, given: RoundUpdates) -> RoundUpdates:
            raise IncompatibleUpdates("they all look alike")

    ran = lab.run(FedIT(), rounds=1, aggregation=PlainAggregation([Nothing()]))
    assert ran.federation.state.round == 0
    assert "round 1: they all look alike; the state stays as it was" in ran.text
    assert ran.lines("metrics.jsonl")[0]["clients"] == 3


@dataclass(frozen=True)
class First(Aggregation):
    """Samples the last two clients, and takes the update of the one with the smaller id as it is."""

    shows_losses = False

    def sample(self, there: Any, busy: Any, round: int, config: Any) -> list[int]:
        return list(there)[-2:]

    def aggregate(self, given: RoundUpdates, delivery: Any, rng: Any) -> Aggregated:
        update = given.updates[0]
        state = replace(given.state, adapter=update.adapter, round=given.state.round + 1)
        notes = {update.peer.id: {"taken": True}} if update.peer else {}
        return Aggregated(state, {"taken": 1.0}, notes, ["only one counts"], [update])


def test_an_own_aggregation_decides_on_all_of_it(lab: Any) -> None:
    ran = lab.run(FedIT(), (4,) * 4, rounds=2, aggregation=First())
    assert ran.sampled() == [[2, 3], [2, 3]]
    assert ran.federation.state.round == 2
    assert [line.get("taken") for line in ran.lines("clients.jsonl")] == [True, None, True, None]
    line = ran.lines("metrics.jsonl")[0]
    assert (line["taken"], line["train_loss"]) == (1.0, None)
    assert "round 1: only one counts" in ran.text


def test_a_run_takes_steps_from_python_and_refuses_them_where_there_are_no_updates(own: Any) -> None:
    small = {"clients": 3, "rounds": 1, "progress": False}
    run = fl.simulate("tiny", "tiny", steps=[own.Shrink(0.5), own.EvenOnly()], **small)
    assert run.metrics[0]["shrunk"] == 2
    assert run.clients[1]["rejected"] == "odd"
    assert run.config["from_python"] == ["steps"]
    with pytest.raises(ConfigError, match=r"^steps: under secure_sum .* for Shrink to work on"):
        fl.simulate("tiny", "tiny", steps=[own.Shrink(0.5)], secure_sum=True, **small)
    many = type("Many", (own.Shrink,), {"least": 4})(0.5)
    with pytest.raises(ConfigError, match=r"^steps: Many needs at least 4 clients a round, got 3"):
        fl.simulate("tiny", "tiny", steps=[many], **small)
