"""What clients have spent: written before a reply leaves, never taken back, and the end of their part."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from spender import Spender

from fedlora.core.messages import Task
from fedlora.engines.client_runtime import ClientRuntime
from fedlora.errors import CheckpointError, ConfigError, PrivacyError
from fedlora.privacy import Entry, Ledger
from fedlora.rounds.codec import write_task
from fedlora.storage.client_state import ClientStore

STEP = Entry(1.0, 0.1, 10)


@pytest.fixture
def memory(tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path / "clients")


def message(lab: Any, client: int, round: int) -> tuple[Message, Context]:
    content, _ = write_task(Task(lab.adapter()), round, 0)
    asked = Message(content, 1000 + client, "train", group_id=str(round))
    asked.metadata.__dict__["_message_id"] = "m"
    return asked, Context(1, 1000 + client, {"client": client, "rank": 4}, RecordDict(), {})


def train(lab: Any, site: ClientRuntime, clients: Sequence[int], round: int) -> list[Message]:
    pairs = [message(lab, client, round) for client in clients]
    return site.train([m for m, _ in pairs], [c for _, c in pairs])


def site(lab: Any, noise: Any, memory: ClientStore | None, **more: Any) -> ClientRuntime:
    return replace(lab.site(Spender(noise(), **more)), memory=memory)


def test_a_ledger_composes_over_rounds_and_processes(lab: Any, noise: Any, tmp_path: Path) -> None:
    for round in (1, 2, 3):
        memory = ClientStore(tmp_path / "clients")  # as after a restart
        train(lab, site(lab, noise, memory), [0, 1], round)
    found = ClientStore(tmp_path / "clients").ledgers()
    assert sorted(found) == [0, 1]
    assert [(e.q, e.steps) for e in found[0].entries] == [(0.1, 30)]
    assert 4.5 < found[0].epsilon <= 5


def test_a_round_that_is_done_again_is_paid_again(lab: Any, noise: Any, memory: ClientStore) -> None:
    place = site(lab, noise, memory)
    for round in (1, 2, 2):
        train(lab, place, [0], round)
    ledger = memory.ledger(0)
    assert ledger is not None
    assert ledger.entries[0].steps == 30
    [reply] = train(lab, place, [0], 3)
    assert reply.has_error()
    assert "budget is spent" in reply.error.reason
    assert memory.ledger(0) == ledger


def test_one_client_stops_and_its_group_goes_on(lab: Any, noise: Any, memory: ClientStore) -> None:
    place = site(lab, noise, memory)
    for round in (1, 2, 3):
        train(lab, place, [1], round)
    replies = train(lab, place, [0, 1, 2], 4)
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert [r.metadata.src_node_id for r in replies] == [1000, 1001, 1002]
    assert place.client.inner.groups[-1] == [0, 2]


def test_the_ledger_is_on_disk_before_the_reply_is_made(
    lab: Any, noise: Any, memory: ClientStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="no space left"):
            train(lab, site(lab, noise, memory), [0], 1)
    train(lab, site(lab, noise, memory), [0], 1)
    assert memory.ledger(0) is not None


def test_a_client_that_fails_spends_nothing_and_its_group_goes_on(
    lab: Any, noise: Any, memory: ClientStore
) -> None:
    with pytest.raises(RuntimeError, match="no luck"):
        train(lab, site(lab, noise, memory, fail=(1,)), [0, 1], 1)
    assert memory.ledgers() == {}


def test_a_damaged_ledger_is_a_client_that_does_not_train(lab: Any, noise: Any, memory: ClientStore) -> None:
    train(lab, site(lab, noise, memory), [0], 1)
    [file] = memory._folder.rglob("ledger.json")
    file.write_text(file.read_text()[:-20])
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(lab, site(lab, noise, memory), [0], 2)


def test_a_ledger_only_ever_grows(memory: ClientStore) -> None:
    one, two = Ledger(1e-5).plus(STEP), Ledger(1e-5).plus(STEP).plus(STEP)
    memory.spend(4, None, one)
    memory.spend(4, one, two)
    for less in (Ledger(1e-5), Ledger(1e-5).plus(STEP), Ledger(1e-5).plus(Entry(9.0, 0.1, 99))):
        with pytest.raises(CheckpointError, match="can only grow"):
            memory.spend(4, two, less)
    assert memory.ledger(4) == Ledger(1e-5).plus(STEP).plus(STEP)
    assert memory.ledger(5) is None


def test_a_site_without_memory_releases_nothing(lab: Any, noise: Any) -> None:
    with pytest.raises(Exception, match="nowhere to keep"):
        train(lab, site(lab, noise, None), [0], 1)


def test_a_reply_has_no_loss_and_no_count_and_a_refusal_reaches_the_log(
    lab: Any, noise: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fedlora.strategies import FedIT

    memory = ClientStore(tmp_path / "clients")
    monkeypatch.setattr(
        type(lab),
        "site",
        lambda self, client, rows=None, compression=None: ClientRuntime(
            None, client, rows or (lambda c: [None] * (10 * (c + 1))), memory
        ),
    )
    memory.spend(1, None, Ledger(1e-5, accountant="rdp").plus(Entry(0.7, 0.1, 300)))
    ran = lab.run(FedIT(), client=Spender(noise()), rounds=2)
    lines = ran.lines("clients.jsonl")
    assert [(x["round"], x["client"], x["status"]) for x in lines] == [
        (1, 0, "ok"),
        (1, 1, "dropped"),
        (1, 2, "ok"),
        (2, 0, "ok"),
        (2, 1, "dropped"),
        (2, 2, "ok"),
    ]
    assert "the client refused: the privacy budget is spent" in lines[1]["reason"]
    for line in lines:
        assert not {"loss", "accuracy", "local_loss"} & line.keys()
        if line["status"] == "ok":
            assert line["examples"] == 1
            assert line["epsilon"] > 0
            assert line["epsilon_valid"] is True
    assert all(x["train_loss"] is None and x["clients"] == 2 for x in ran.lines("metrics.jsonl"))
    assert json.loads((tmp_path / "clients" / "client-0" / "ledger.json").read_text())["unit"] == "record"


def test_a_private_client_tells_nothing_of_rows_it_keeps_back(lab: Any, noise: Any) -> None:
    @dataclass(frozen=True)
    class Private(noise):  # type: ignore[misc]
        private = True

    with pytest.raises(ConfigError, match="not covered by epsilon"):
        replace(lab.site(Private()), held_out=True)


def test_a_ledger_that_is_deleted_while_the_run_goes_on_is_missed(
    lab: Any, noise: Any, memory: ClientStore
) -> None:
    place, (asked, context) = site(lab, noise, memory), message(lab, 0, 1)
    place.train([asked], [context])
    path = next(memory._folder.glob("*/ledger.json"))
    kept = path.read_text()
    for text in (None, Ledger(1e-5).plus(Entry(1.0, 0.1, 1)).dump()):
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(CheckpointError, match="lacks what it spent before"):
            place.train([message(lab, 0, 2)[0]], [context])
        path.write_text(kept)
    assert not place.train([message(lab, 0, 2)[0]], [context])[0].has_error()


def test_why_private_training_failed_stays_with_the_client(
    lab: Any, noise: Any, memory: ClientStore, caplog: pytest.LogCaptureFixture
) -> None:
    class Teller(Spender):
        private = True

    place = replace(lab.site(Teller(noise(), fail=(0,))), memory=memory)
    with pytest.raises(PrivacyError) as caught:
        train(lab, place, [0], 1)
    assert "no luck" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "no luck" in caplog.text
    assert memory.ledger(0) is None
