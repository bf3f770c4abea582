"""What is sent to an actor and written when it has trained, with an actor in this process and without Ray."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from spender import Spender

from fedlora.core.messages import Task
from fedlora.engines.client_runtime import ClientRuntime
from fedlora.privacy import Entry, Ledger
from fedlora.rounds.codec import write_task
from fedlora.storage.client_state import ClientStore

ray = pytest.importorskip("ray")
from fedlora.engines.packed import unpack  # noqa: E402 (needs Ray)
from fedlora.engines.ray_actors import Trainer, Work  # noqa: E402
from fedlora.engines.ray_grid import RayGrid  # noqa: E402


class Here:
    """One actor in this process.

    Args:
        site: what it trains with, of which it has neither rows nor memory.
    """

    def __init__(self, site: ClientRuntime) -> None:
        self.trainer = Trainer(1)
        self.trainer._site = replace(site, memory=None, rows=lambda client: [])

    def map(self, works: Iterator[Work]) -> Iterator[tuple[Work, Any]]:
        for work in works:
            yield work, unpack(self.trainer.train(work.content, work.rows))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClientStore:
    monkeypatch.setattr(ray, "put", lambda thing: thing)
    monkeypatch.setattr(ray, "get", lambda things: things)
    return ClientStore(tmp_path / "clients")


def grid(site: ClientRuntime, clients: int, fuse: int) -> RayGrid:
    actors: Any = Here(site)
    return RayGrid(site, [{"client": c, "rank": 4} for c in range(clients)], actors, fuse)


def messages(lab: Any, clients: int, round: int) -> Iterator[Message]:
    for node in range(1000, 1000 + clients):
        yield Message(write_task(Task(lab.adapter(4)), round, 0)[0], node, "train", group_id=str(round))


def bytes_of(replies: list[Message]) -> list[dict[str, bytes]]:
    return [{n: a.data for n, a in r.content.array_records["arrays"].items()} for r in replies]


def test_the_groups_and_their_replies_are_those_of_one_process(
    lab: Any, noise: Any, store: ClientStore
) -> None:
    client = noise()
    site = replace(lab.site(client), memory=store)
    found = list(grid(site, 5, 2).send_and_receive(messages(lab, 5, 1)))
    assert client.groups == [[0, 1], [2, 3], [4]]
    alone = list(lab.grid(noise(), [4] * 5, 2).send_and_receive(messages(lab, 5, 1)))
    assert bytes_of(found) == bytes_of(alone)


def test_ledgers_are_on_disk_before_a_reply_is_seen(lab: Any, noise: Any, store: ClientStore) -> None:
    site = replace(lab.site(Spender(noise())), memory=store)
    place = grid(site, 3, 3)
    for round in (1, 2, 3):
        for seen, reply in enumerate(place.send_and_receive(messages(lab, 3, round)), 1):
            assert not reply.has_error()
            assert seen == 1 or sorted(store.ledgers()) == [0, 1, 2]
            ledger = store.ledger(reply.metadata.src_node_id - 1000)
            assert ledger is not None
            assert sum(entry.steps for entry in ledger.entries) == 10 * round
    [reply, *_] = place.send_and_receive(messages(lab, 3, 4))
    assert "budget is spent" in reply.error.reason


def test_a_client_whose_ledger_cannot_be_written_is_dropped_alone(
    lab: Any, noise: Any, store: ClientStore
) -> None:
    site = replace(lab.site(Spender(noise())), memory=store)
    place, other = grid(site, 3, 3), Ledger(1e-5, accountant="rdp").plus(Entry(1.0, 0.1, 1))
    train = Trainer.train

    def meanwhile(self: Trainer, *sent: Any) -> Any:
        store.spend(1, None, other)
        return train(self, *sent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", meanwhile)
        replies = list(place.send_and_receive(messages(lab, 3, 1)))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert "no longer the ledger that was read" in replies[1].error.reason
    assert store.ledger(1) == other
    assert sorted(store.ledgers()) == [0, 1, 2]
