import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

import fedlora.engines.simulation_grid as grid_module
from fedlora.core.messages import Peer, Task
from fedlora.engines.in_process import InProcess
from fedlora.errors import ConfigError
from fedlora.rounds.codec import read_update, write_task


def messages(lab: Any, clients: int, rank: int = 4, nodes: Any = None) -> Iterator[Message]:
    for node in nodes if nodes is not None else range(1000, 1000 + clients):
        yield Message(write_task(Task(lab.adapter(rank)), 1, 0)[0], node, "train", group_id="1")


def clients_of(replies: list[Message]) -> list[int]:
    return [reply.metadata.src_node_id - 1000 for reply in replies]


def digests(lab: Any, replies: list[Message]) -> dict[int, torch.Tensor]:
    found = {}
    for reply in replies:
        if not reply.has_error():
            update = read_update(reply, Task(lab.adapter()), Peer(0, 4), 1)
            found[reply.metadata.src_node_id - 1000] = update.adapter.digest()
    return found


@pytest.mark.parametrize(
    ("fuse", "groups"),
    [
        (1, [[0], [1], [2], [3], [4]]),
        (2, [[0, 1], [2, 3], [4]]),
        (5, [[0, 1, 2, 3, 4]]),
        (99, [[0, 1, 2, 3, 4]]),
    ],
)
def test_groups_keep_the_order_and_every_message(lab: Any, noise: Any, fuse: int, groups: Any) -> None:
    client = noise()
    finished: list[int] = []
    grid = lab.grid(client, [4] * 5, fuse, done=finished.append)
    replies = list(grid.send_and_receive(messages(lab, 5)))
    assert client.groups == groups
    assert clients_of(replies) == [0, 1, 2, 3, 4]
    assert finished == [len(group) for group in groups]
    ids = [reply.metadata.message_id for reply in replies]
    assert len({*ids}) == 5
    assert all(ids)


def test_auto_groups_follow_tokens(lab: Any, noise: Any) -> None:
    client = noise(tokens=6000)
    list(lab.grid(client, [4] * 5).send_and_receive(messages(lab, 5)))
    assert client.groups == [[0, 1], [2, 3], [4]]  # 3 × 6000 > 16384
    client = noise(tokens=99999)
    list(lab.grid(client, [4] * 2).send_and_receive(messages(lab, 2)))
    assert client.groups == [[0], [1]]


def test_auto_groups_follow_memory(lab: Any, noise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = next(messages(lab, 1)).content["config"]["whole"]
    assert one == sum(tensor.nbytes for _, tensor in lab.adapter().tensors())
    monkeypatch.setattr(grid_module, "MEMORY", 4 * one * 3)
    client = noise(tokens=1)
    list(lab.grid(client, [4] * 7).send_and_receive(messages(lab, 7)))
    assert client.groups == [[0, 1, 2], [3, 4, 5], [6]]


def test_messages_may_go_to_any_nodes_in_any_order(lab: Any, noise: Any) -> None:
    client = noise()
    grid = lab.grid(client, [4] * 6, 2)
    replies = list(grid.send_and_receive(messages(lab, 0, nodes=[1004, 1001, 1005])))
    assert clients_of(replies) == [4, 1, 5]
    assert list(lab.grid(client, [4]).send_and_receive([])) == []


def test_a_result_does_not_depend_on_the_group(lab: Any, noise: Any) -> None:
    seen = [
        digests(lab, list(lab.grid(noise(), [4] * 5, fuse).send_and_receive(messages(lab, 5))))
        for fuse in (1, 2, 5)
    ]
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[0].values())) == 5


@pytest.mark.parametrize("fuse", [1, 2, 5, None])
def test_one_failure_costs_its_group_nothing(lab: Any, noise: Any, fuse: int | None) -> None:
    grid = lab.grid(noise(failing=frozenset({1, 4})), [4] * 5, fuse)
    replies = list(grid.send_and_receive(messages(lab, 5)))
    assert clients_of(replies) == [0, 1, 2, 3, 4]
    assert [reply.has_error() for reply in replies] == [False, True, False, False, True]
    assert replies[1].error.reason == "RuntimeError: no luck for 1"
    alone = lab.grid(noise(), [4] * 5, 1)
    expected = digests(lab, list(alone.send_and_receive(messages(lab, 0, nodes=[1000, 1002, 1003]))))
    assert digests(lab, replies) == expected


def test_a_keyboard_interrupt_is_not_a_clients_failure(lab: Any, noise: Any, monkeypatch: Any) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(noise, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        list(lab.grid(noise(), [4] * 2).send_and_receive(messages(lab, 2)))


def test_push_and_pull(lab: Any, noise: Any) -> None:
    grid = lab.grid(noise(failing=frozenset({2})), [4] * 3)
    sent = list(messages(lab, 3))
    ids = list(grid.push_messages(sent))
    assert ids == [message.metadata.message_id for message in sent]
    replies = list(grid.pull_messages([ids[2], ids[0], "unknown"]))
    assert clients_of(replies) == [2, 0]
    assert replies[0].has_error()
    assert [reply.metadata.reply_to_message_id for reply in replies] == [ids[2], ids[0]]
    assert list(grid.pull_messages([ids[0]])) == []  # taken once
    assert clients_of(list(grid.pull_messages(ids))) == [1]


def test_every_node_says_who_it_is(lab: Any, noise: Any) -> None:
    grid = lab.grid(noise(), [2, 8])
    questions = [Message(RecordDict(), node, "query.profile") for node in grid.get_node_ids()]
    profiles = [dict(r.content.config_records["profile"]) for r in grid.send_and_receive(questions)]
    assert profiles == [{"client": 0, "rank": 2}, {"client": 1, "rank": 8}]


def test_kinds_of_messages_are_never_in_one_group(lab: Any, noise: Any) -> None:
    client = noise()
    grid = lab.grid(client, [4] * 4)
    query = [Message(RecordDict(), node, "query.profile") for node in (1000, 1001)]
    train = list(messages(lab, 4))
    replies = list(grid.send_and_receive([query[0], train[0], train[1], query[1], train[2], train[3]]))
    assert clients_of(replies) == [0, 0, 1, 1, 2, 3]
    assert not any(reply.has_error() for reply in replies)
    assert client.groups == [[0, 1], [2, 3]]


def test_an_unknown_handler_is_an_error_reply(lab: Any, noise: Any) -> None:
    replies = list(lab.grid(noise(), [4]).send_and_receive([Message(RecordDict(), 1000, "evaluate")]))
    assert replies[0].has_error()


def test_what_is_delivered_does_not_alias_the_senders_records(lab: Any, noise: Any, monkeypatch: Any) -> None:
    sent = next(messages(lab, 1))
    before = {name: array.data for name, array in sent.content.array_records["arrays"].items()}

    def spoil(site: Any, received: list[Message], contexts: Any) -> list[Message]:
        content = received[0].content
        content.array_records["arrays"].clear()
        content.config_records["config"]["round"] = 99
        content["more"] = ConfigRecord()
        return [Message(RecordDict(), reply_to=received[0])]

    monkeypatch.setattr(type(lab.site(noise())), "train", spoil)
    (reply,) = lab.grid(noise(), [4]).send_and_receive([sent])
    assert not reply.has_error()
    assert reply.metadata.reply_to_message_id == sent.metadata.message_id
    assert {name: array.data for name, array in sent.content.array_records["arrays"].items()} == before
    assert sent.content.config_records["config"]["round"] == 1
    assert set(sent.content) == {"arrays", "config"}


def test_replies_and_requests_are_made_when_they_are_asked_for(lab: Any, noise: Any) -> None:
    client = noise()
    asked: list[int] = []

    def watched() -> Iterator[Message]:
        for i, message in enumerate(messages(lab, 100)):
            asked.append(i)
            yield message

    replies = lab.grid(client, [4] * 100, 2).send_and_receive(watched())
    assert asked == []
    seen: list[weakref.ref[Any]] = []
    for count, reply in enumerate(replies, 1):
        assert len(asked) <= count + 2
        assert sum(map(len, client.groups)) <= count + 1
        seen.append(weakref.ref(reply.content.array_records["arrays"]))
        del reply
        assert sum(ref() is not None for ref in seen) <= 6  # of 100: the groups of two at hand
    assert len(seen) == 100


def test_a_round_trips_cost_is_small(lab: Any, monkeypatch: Any, noise: Any) -> None:
    """flower.md §3: 0.8 ms of CPU a message; ten times as much is refused."""
    import time

    monkeypatch.setattr(noise, "_moved", lambda self, a: a.task.adapter)
    grid = lab.grid(noise(), [4] * 200)
    began = time.process_time()
    assert len(list(grid.send_and_receive(messages(lab, 200)))) == 200
    assert time.process_time() - began < 200 * 0.008


def test_replies_carry_only_what_the_task_shares(lab: Any, noise: Any) -> None:
    task = Task(lab.adapter(), frozenset("B"), frozenset("B"))
    sent = Message(write_task(task, 1, 0)[0], 1000, "train")
    reply = next(iter(lab.grid(noise(), [4]).send_and_receive([sent])))
    arrays = reply.content.array_records["arrays"]
    assert isinstance(arrays, ArrayRecord)
    assert not [name for name in arrays if name.endswith(".A")]


def test_devices_are_an_expected_list() -> None:
    for wrong in ("gpu", []):
        with pytest.raises(ConfigError, match=r"engine\.devices: expected auto or a list"):
            InProcess(devices=wrong)
    assert InProcess(devices=["cpu", 0]).devices == ["cpu", 0]


@pytest.mark.parametrize(("device", "clients"), [("cpu", 2), ("cuda", 32)])
def test_a_gpu_trains_more_clients_together(device: str, clients: int) -> None:
    site: Any = SimpleNamespace(base=SimpleNamespace(device=torch.device(device)))
    of_one = 256 * 2**20  # bytes of a client's factors, gradients and moments
    assert grid_module.memory_of_group(site) // of_one == clients
