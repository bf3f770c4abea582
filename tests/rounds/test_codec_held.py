"""What a node holds is not sent again, and never taken for what it is not."""

from typing import Any

import numpy as np
import pytest
import torch

from fedlora.core.adapter import Adapter, Pair, digest
from fedlora.core.base_delta import BaseDelta
from fedlora.core.messages import Task
from fedlora.errors import CheckpointError
from fedlora.rounds.codec import Held, read_task, size, write_task
from fedlora.training.expert import GlobalExpert


def pair(seed: int, rank: int, d_out: int = 6, d_in: int = 8) -> Pair:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).float()

    return Pair(draw(rank, d_in), draw(d_out, rank))


def same(one: Task, two: Task) -> bool:
    """Bit for bit."""
    packs = [task.pack() for task in (one, two)]
    (tensors, header), (others, other) = packs
    return header == other and digest("", sorted(tensors.items())) == digest("", sorted(others.items()))


class Node:
    """A server's knowledge of one node, and the node."""

    def __init__(self) -> None:
        self.known: Held | None = None
        self.shelf: dict[str, torch.Tensor] = {}
        self.bytes = 0

    def send(self, task: Task, version: int | None = None) -> list[str]:
        content, after = write_task(task, 1, 0, self.known, version)
        self.bytes = size(content)
        read, _, _, self.shelf = read_task(content, self.shelf)
        assert same(read, task)
        self.known = after
        return sorted(content.array_records["arrays"])


def frozen_A(seed: int, A: torch.Tensor) -> Task:
    B, extra = pair(seed, 2).B, {"head": torch.full((3,), float(seed))}
    return Task(Adapter({"m": Pair(A, B)}, extra), frozenset("B"), frozenset("B"))


def test_what_is_frozen_is_sent_once_and_again_when_it_changes() -> None:
    node, A = Node(), pair(0, 2).A
    every, moving = ["adapter/head", "adapter/m.A", "adapter/m.B"], ["adapter/head", "adapter/m.B"]
    assert node.send(frozen_A(1, A), 0) == every
    first = node.bytes
    assert node.send(frozen_A(2, A.clone()), 1) == moving
    assert first - node.bytes > A.nbytes
    A = A.clone()
    A[1, 7] = torch.nextafter(A[1, 7], A[1, 7] + 1)
    assert node.send(frozen_A(3, A), 2) == every
    assert node.send(frozen_A(4, A), 9) == moving  # however many rounds it sat out


def test_what_is_trained_and_shared_always_goes() -> None:
    node, task = Node(), Task(Adapter({"m": pair(1, 2)}, {"head": torch.ones(3)}))
    assert node.send(task, 0) == node.send(task, 1) == ["adapter/head", "adapter/m.A", "adapter/m.B"]
    assert node.shelf == {}


def test_a_factor_that_was_frozen_the_last_time_is_there_when_its_turn_comes() -> None:
    node, both = Node(), pair(1, 2)
    for turn, sent in (("B", ["adapter/m.A", "adapter/m.B"]), ("A", ["adapter/m.B"]), ("B", ["adapter/m.A"])):
        task = Task(Adapter({"m": both}), frozenset(turn), frozenset(turn))
        assert node.send(task) == sent


def test_a_factor_that_changed_while_the_other_was_trained_is_sent_again() -> None:
    node, first, second = Node(), pair(1, 2), pair(2, 2)

    def task(turn: str, A: torch.Tensor) -> Task:
        return Task(Adapter({"m": Pair(A, first.B)}), frozenset(turn), frozenset(turn))

    assert node.send(task("B", first.A)) == ["adapter/m.A", "adapter/m.B"]
    assert node.send(task("A", second.A)) == ["adapter/m.A", "adapter/m.B"]


def test_an_own_part_is_sent_once_as_where_it_began() -> None:
    def task(seed: int) -> Task:
        adapter = Adapter({"m": Pair(pair(seed, 2).A, pair(0, 2).B)}, {"head": torch.ones(3)})
        return Task(adapter, share=frozenset("A"), personal=frozenset({"head"}))

    node = Node()
    assert node.send(task(1)) == ["adapter/head", "adapter/m.A", "adapter/m.B"]
    assert node.send(task(2)) == ["adapter/m.A"]


def test_a_frozen_module_and_a_part_of_the_method_are_sent_when_they_change() -> None:
    def task(seed: int, other: int, expert: int) -> Task:
        adapter = Adapter({"m": pair(seed, 2), "n": pair(other, 2)})
        more = (GlobalExpert(Adapter({"m": pair(expert, 3)})),)
        return Task(adapter, frozen=frozenset("n"), method=more)

    node, moving = Node(), ["adapter/m.A", "adapter/m.B"]
    still, expert = ["adapter/n.A", "adapter/n.B"], ["method/0/adapter/m.A", "method/0/adapter/m.B"]
    assert node.send(task(1, 5, 7)) == [*moving, *still, *expert]
    assert node.send(task(2, 5, 7)) == moving
    assert node.send(task(3, 6, 7)) == [*moving, *still]
    assert node.send(task(4, 6, 8)) == [*moving, *expert]


def grown(rounds: int, rank: int = 1, first: int = 0) -> list[Task]:
    """The tasks of a run whose base delta grows by one gain a round; dense from the sixth on."""
    base_delta = BaseDelta({"n": pair(99, 2)} if first else {})
    tasks = []
    for round in range(rounds):
        base_delta = base_delta.plus({"m": pair(round, rank)})
        tasks.append(Task(Adapter({"m": pair(50 + round, 2)}), base_delta=base_delta))
    return tasks


BASE_DELTA, GAIN = ["fold/m.A", "fold/m.B"], ["gain/m.A", "gain/m.B"]
PAIR = ["adapter/m.A", "adapter/m.B"]


@pytest.mark.parametrize("first", [0, 1])
def test_who_is_one_state_behind_gets_the_gain_alone_and_has_every_bit_of_the_base_delta(first: int) -> None:
    node, tasks = Node(), grown(12, first=first)
    assert node.send(tasks[0], 1) == [*PAIR, *BASE_DELTA, *(["fold/n.A", "fold/n.B"] if first else [])]
    for version, task in enumerate(tasks[1:], 2):
        assert node.send(task, version) == [*PAIR, *GAIN]  # Node.send compares the base deltas


def test_who_missed_a_state_gets_the_whole_base_delta() -> None:
    node, tasks = Node(), grown(9)
    node.send(tasks[0], 1)
    assert node.send(tasks[2], 3) == [*PAIR, *BASE_DELTA]
    assert node.send(tasks[3], 4) == [*PAIR, *GAIN]
    assert node.send(tasks[8], 9) == [*PAIR, *BASE_DELTA]


def test_a_state_that_stayed_as_it_was_needs_nothing() -> None:
    """A round with too few updates: the same version, the same base delta, and the old gain."""
    node, tasks = Node(), grown(3)
    node.send(tasks[0], 1)
    node.send(tasks[1], 2)
    assert node.send(tasks[1], 2) == PAIR
    assert node.send(tasks[2], 3) == [*PAIR, *GAIN]


def test_a_gain_that_is_larger_than_the_base_delta_is_not_sent() -> None:
    node, tasks = Node(), grown(3, rank=9)  # 9 × (6 + 8) numbers, against 6 × 8 + 6 × 6
    assert node.send(tasks[0], 1) == [*PAIR, *BASE_DELTA]
    for version, task in enumerate(tasks[1:], 2):
        assert node.send(task, version) == [*PAIR, "fold/m.A"]  # the other factor is still the identity


@pytest.mark.parametrize("version", [None, 2])
def test_without_versions_nothing_is_left_out_of_a_base_delta(version: int | None) -> None:
    node, tasks = Node(), grown(2)
    node.send(tasks[0], None)
    assert node.send(tasks[1], version) == [*PAIR, *BASE_DELTA]


def test_a_node_of_which_nothing_is_known_gets_all_of_it() -> None:
    node, tasks = Node(), grown(3)
    node.send(tasks[0], 1)
    node.send(tasks[1], 2)
    node.known = None  # it failed, and nobody knows what it has
    assert node.send(tasks[2], 3) == [*PAIR, *BASE_DELTA]


@pytest.mark.parametrize("lost", ["all", "older"])
def test_a_restarted_node_says_so_and_never_trains_on_a_wrong_base_delta(lost: str) -> None:
    node, tasks = Node(), grown(4)
    node.send(tasks[0], 1)
    older = node.shelf
    node.send(tasks[1], 2)
    content, _ = write_task(tasks[2], 1, 0, node.known, 3)
    with pytest.raises(CheckpointError, match="restarted"):
        read_task(content, {} if lost == "all" else older)
    read, *_ = read_task(content, node.shelf)
    assert same(read, tasks[2])


def test_a_gain_that_arrives_twice_is_not_added_twice() -> None:
    node, tasks = Node(), grown(3)
    node.send(tasks[0], 1)
    content, _ = write_task(tasks[1], 1, 0, node.known, 2)
    _, _, _, after = read_task(content, node.shelf)
    with pytest.raises(CheckpointError, match="restarted"):
        read_task(content, after)


def test_a_restarted_node_lacks_its_frozen_factor_by_name() -> None:
    node, A = Node(), pair(0, 2).A
    node.send(frozen_A(1, A), 0)
    content, _ = write_task(frozen_A(2, A), 2, 0, node.known, 1)
    with pytest.raises(CheckpointError, match=r"restarted and lacks .*adapter/m\.A"):
        read_task(content, {})


def test_reading_and_writing_leave_what_is_held_as_it_was() -> None:
    node, tasks = Node(), grown(3)
    node.send(tasks[0], 1)
    known, shelf = dict(node.known.digests), dict(node.shelf)  # type: ignore[union-attr]
    content, _ = write_task(tasks[1], 1, 0, node.known, 2)
    read: Any = read_task(content, node.shelf)
    assert node.known is not None
    assert dict(node.known.digests) == known
    assert node.shelf.keys() == shelf.keys()
    assert all(torch.equal(node.shelf[name], tensor) for name, tensor in shelf.items())
    assert same(read[0], tasks[1])
