"""A client may send the ranks of one pruning where its task allows it, and no others."""

import pytest

from fedlora.core.adapter import Adapter
from fedlora.core.algebra import truncate
from fedlora.core.messages import Peer, Task
from fedlora.errors import IncompatibleUpdates
from fedlora.rounds.codec import read_update, write_update
from fedlora.training.client import TrainResult
from fedlora.training.rules import RankPruning

TAIL = RankPruning(0.5, 0.0, 2)


def answered(respond, task, ranks):
    """What the server reads of a client that has cut its modules to these ranks."""
    pairs = {m: truncate(p, ranks[m]) for m, p in task.adapter.pairs.items()}
    reply = write_update(TrainResult(Adapter(pairs, task.adapter.extra), {}), task, 1, 5)
    return {m: p.rank for m, p in read_update(respond(reply), task, Peer(5, 8), 1).adapter.pairs.items()}


def task_of(wire, ranks, method=(TAIL,)):
    adapter = wire.adapter(8)
    return Task(
        Adapter({m: truncate(p, ranks[m]) for m, p in adapter.pairs.items()}, adapter.extra), method=method
    )


@pytest.mark.parametrize(
    ("sent", "back"),
    [
        ({"a.q": 8, "b.v": 8}, {"a.q": 4, "b.v": 4}),
        ({"a.q": 8, "b.v": 8}, {"a.q": 8, "b.v": 8}),
        ({"a.q": 8, "b.v": 3}, {"a.q": 4, "b.v": 2}),
        # One module is at its least already, and says nothing about the other.
        ({"a.q": 2, "b.v": 8}, {"a.q": 2, "b.v": 8}),
        ({"a.q": 2, "b.v": 8}, {"a.q": 2, "b.v": 4}),
        ({"a.q": 1, "b.v": 2}, {"a.q": 1, "b.v": 2}),
    ],
)
def test_a_pruned_update_and_a_whole_one_are_read_in_their_ranks(wire, respond, sent, back):
    assert answered(respond, task_of(wire, sent), back) == back


@pytest.mark.parametrize("back", [{"a.q": 4, "b.v": 8}, {"a.q": 3, "b.v": 3}, {"a.q": 2, "b.v": 2}])
def test_other_ranks_are_refused(wire, respond, back):
    with pytest.raises(IncompatibleUpdates, match=r"'a.q.A': expected float32 \(8, "):
        answered(respond, task_of(wire, {"a.q": 8, "b.v": 8}), back)


def test_a_task_without_the_rule_takes_no_pruned_update(wire, respond):
    with pytest.raises(IncompatibleUpdates, match=r"expected float32 \(8, "):
        answered(respond, task_of(wire, {"a.q": 8, "b.v": 8}, ()), {"a.q": 4, "b.v": 4})
