"""Sites that are away are named in every round, and a site that cannot take part ends the wait for it."""

from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedlora.core.messages import Peer
from fedlora.engines.in_process import InProcessGrid
from fedlora.engines.polling import PollingGrid
from fedlora.errors import FedLoraError
from fedlora.report.clients import absences, left_out_table
from fedlora.report.read import Run
from fedlora.rounds.registry import ClientRegistry
from fedlora.strategies import FedIT

NAMES = {1000: "north", 1001: "south", 1002: "west"}
SITES = {"plan": {"plan": "x"}, "names": NAMES}


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Nodes that are not connected; a test changes it while a run goes on."""
    away, known = set[int](), InProcessGrid.get_node_ids

    def there(self: InProcessGrid) -> Iterable[int]:
        return [node for node in known(self) if node not in away]

    monkeypatch.setattr(InProcessGrid, "get_node_ids", there)
    return away


def leaving(gone: set[int], *nodes: int, after: int) -> Any:
    """A change of replies that takes nodes away once so many rounds have been trained."""
    trained = []

    def change(replies: list[Message]) -> list[Message]:
        if replies and replies[0].metadata.message_type.startswith("train"):
            trained.append(1)
            gone.update(nodes if len(trained) == after else ())
        return replies

    return change


def test_a_site_that_leaves_is_named_in_every_round_after(lab: Any, gone: set[int]) -> None:
    ran = lab.run(FedIT(), rounds=3, change=leaving(gone, 1001, after=1), roster=SITES, clients=3)
    assert [line["away"] for line in ran.lines("metrics.jsonl")] == [[], ["south"], ["south"]]
    assert [line["clients"] for line in ran.lines("metrics.jsonl")] == [3, 2, 2]
    lines = [line for line in ran.lines("clients.jsonl") if line["round"] == 2]
    assert [(line["client"], line["name"], line["status"]) for line in lines] == [
        (0, "north", "ok"),
        (1, "south", "away"),
        (2, "west", "ok"),
    ]
    for round in (2, 3):
        assert f"round {round}: south away, 2 of 3 clients are there" in ran.text


def test_a_site_that_never_came_is_called_by_its_registered_name(lab: Any, gone: set[int]) -> None:
    gone.add(1002)
    ran = lab.run(FedIT(), rounds=1, roster=SITES, clients=3)
    assert ran.lines("metrics.jsonl")[0]["away"] == ["west"]
    ran = lab.run(FedIT(), rounds=1, roster=SITES | {"names": {}}, clients=3)
    assert ran.lines("metrics.jsonl")[0]["away"] == ["client 2"]


def test_in_one_process_nobody_is_away(lab: Any) -> None:
    ran = lab.run(FedIT(), rounds=1)
    assert "away" not in ran.lines("metrics.jsonl")[0]
    assert all("name" not in line for line in ran.lines("clients.jsonl"))


def test_the_names_of_sites_change_no_adapter(lab: Any) -> None:
    digests = [lab.run(FedIT(), roster=more).federation.state.digest() for more in ({}, SITES)]
    assert digests[0] == digests[1]


class Refusing:
    """A grid of two nodes, of which the second refuses to take part."""

    def __init__(self) -> None:
        self.asked: list[Message] = []

    def get_node_ids(self) -> list[int]:
        return [1000, 1001]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        sent = list(messages)
        for message in sent:
            message.metadata.__dict__["_message_id"] = str(message.metadata.dst_node_id)
        self.asked += sent
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        asked, self.asked = self.asked, []
        profile = RecordDict({"profile": ConfigRecord({"client": 0, "rank": 4})})
        return [
            Message(profile, reply_to=message)
            if message.metadata.dst_node_id == 1000
            else Message(Error(2, "DataError; the reason is in its log"), reply_to=message)
            for message in asked
        ]


def test_nobody_waits_for_a_site_that_has_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    roster = ClientRegistry(Peer, 8, said.append, **SITES)
    monkeypatch.setattr("fedlora.rounds.registry.time.sleep", lambda seconds: pytest.fail("it waits"))
    assert roster.gather(PollingGrid(Refusing(), int, 0.01), 2, 600) == [1000]  # type: ignore[arg-type]
    assert said == ["south cannot take part: DataError; the reason is in its log"]
    assert roster.called(1001) == "south"


def test_a_run_does_not_begin_without_a_site_that_has_refused(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: ClientRegistry, reply: Message, taken: Any) -> Peer:
        from fedlora.errors import IncompatibleUpdates

        if reply.metadata.src_node_id == 1001:
            raise IncompatibleUpdates("DataError")
        return read(self, reply, taken)

    read = ClientRegistry._read
    monkeypatch.setattr(ClientRegistry, "_read", refused)
    with pytest.raises(FedLoraError, match="2 of 3 clients can take part, and south cannot"):
        lab.run(FedIT(), roster=SITES, clients=3)


def test_a_report_says_who_was_away(tmp_path: Any) -> None:
    line = {"client": 1, "name": "south", "rank": 4, "status": "away", "reason": "not connected"}
    summary = {"away": {"south": 3}, "rounds": 4, "strategy": "fedit"}
    run = Run(tmp_path, summary, [], [line | {"round": round} for round in (2, 3, 4)], {}, {})
    assert absences(run) == "south in 3 of 4 rounds"
    table = left_out_table([run])
    assert table is not None
    assert table.rows == [["south", "away", "3", "2–4", "not connected"]]
