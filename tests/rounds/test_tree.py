"""A tree of edges: who is where, what travels, and that a run over it is the flat run."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, RecordDict

from fedlora.callbacks.base import Callbacks
from fedlora.core.bundle import bundle, forwarded
from fedlora.core.messages import Peer, Task, Update
from fedlora.core.update_step import ClientUpdate, RoundUpdates, UpdateStep
from fedlora.errors import IncompatibleUpdates
from fedlora.privacy import ClientLevel, Plan
from fedlora.privacy.client_level import ClientLevelMechanism
from fedlora.rounds.aggregation import tree as aggregation
from fedlora.rounds.aggregation.choice import aggregation_for
from fedlora.rounds.codec import size, write_task
from fedlora.rounds.round_config import RoundConfig
from fedlora.rounds.tree import (
    Tree,
    below,
    read_sum,
    read_tasks,
    write_masked_sum,
    write_sum,
    write_tasks,
)
from fedlora.secure_aggregation.crypto import Words
from fedlora.strategies import FedExLoRA, FedIT, FFALoRA, FlexLoRA

STRATEGIES = [FFALoRA(), FlexLoRA(), FedExLoRA()]  # the kinds of sums; tests/contract has all strategies
EIGHT = [4, 2, 1, 4, 3, 2, 4, 1]


@pytest.mark.parametrize("fans", [(1, 9), (4, 8), (3, 7), (2, 3, 4), (10, 10, 10), (5, 1)])
@pytest.mark.parametrize("clients", [1, 2, 7, 23, 24, 30])
def test_clients_are_dealt_evenly_in_the_order_of_their_ids(fans: tuple[int, ...], clients: int) -> None:
    tree = Tree(fans, clients)
    edges = [tree.edge(client) for client in range(clients)]
    assert edges == sorted(edges)
    for level in range(tree.levels):
        counts: dict[tuple[int, ...], list[int]] = {}
        for path, part in below(edges, lambda edge: edge, level):
            counts.setdefault(path[:-1], []).append(len(part))
        for above, sizes in counts.items():
            whole = sum(edge[:level] == above for edge in edges)
            sizes += [0] * (fans[level] - len(sizes))
            assert sum(sizes) == whole
            assert max(sizes) - min(sizes) <= 1


def test_an_edge_is_sent_what_its_clients_share_once(wire: Any) -> None:
    task = Task(wire.adapter())
    contents = {node: write_task(task, 1, 0)[0] for node in (1000, 1001, 1002)}
    contents[1002].array_records["arrays"]["head.bias"] = Array(np.ones(2, np.float32))
    contents[1001]["mask"] = ConfigRecord({"letters": [b"a", b""], "empty": []})
    sent = write_tasks(contents)
    arrived = read_tasks(sent)
    assert arrived.keys() == contents.keys()
    for node, content in contents.items():
        assert arrived[node].keys() == content.keys()
        for name, record in content.items():
            assert dict(arrived[node][name]) == dict(record), name  # type: ignore[arg-type]
    alone = size(contents[1000])
    assert alone < size(sent) < 2 * alone  # of three messages of almost equal content


def edge_of(wire: Any, strategy: Any, ranks: tuple[int, ...]) -> tuple[Any, Task, list[str], RecordDict]:
    """What an edge makes of clients of these ranks, and its message."""
    state = strategy.init(wire.adapter(4))
    wide, sent = strategy.task(state, Peer(0, 5)), []
    for client, rank in enumerate(ranks):
        peer = Peer(client, rank)
        task = strategy.task(state, peer)
        sent.append(Update(wire.moved(task), 10.0 + client, peer))
    whole = bundle(strategy, state, wide, sent, Peer(0, 5))
    names = forwarded(strategy, wide)
    return whole, wide, names, write_sum(whole, names)


def test_what_an_edge_forwards_arrives_as_it_was(wire: Any) -> None:
    whole, wide, names, message = edge_of(wire, FlexLoRA(), (1, 3))
    read = read_sum(message, wide, names, Peer(0, 5), 0)
    assert read.adapter.digest() == whole.adapter.digest()
    assert (read.weight, read.several) == (21.0, True)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda m: m.metric_records["metrics"].__setitem__("weight", -1.0), "sum of weights"),
        (lambda m: m.array_records["arrays"].pop("head.bias"), "expected the tensors"),
        (
            lambda m: m.array_records["arrays"].__setitem__("a.q.A", Array(np.ones((900, 8), np.float32))),
            "expected float32",
        ),
        (
            lambda m: m.array_records["arrays"].__setitem__("head.bias", Array(np.ones(2))),
            "expected float32",
        ),
        (
            lambda m: m.array_records["arrays"].__setitem__("a.q.B", Array(np.ones((6, 1), np.float32))),
            "expected A",
        ),
    ],
)
def test_a_damaged_sum_is_refused(wire: Any, damage: Any, said: str) -> None:
    _, wide, names, message = edge_of(wire, FlexLoRA(), (2, 3))
    damage(message)
    with pytest.raises(IncompatibleUpdates, match=said):
        read_sum(message, wide, names, Peer(0, 5), 0)


def near(one: Any, two: Any, tol: float = 1e-12) -> bool:
    """Whether two runs have come to the same ΔW, relative to its norm."""
    gaps = [one.federation.state.delta(m) - two.federation.state.delta(m) for m in ("a.q", "b.v")]
    sizes = [float(two.federation.state.delta(m).norm()) for m in ("a.q", "b.v")]
    return all(float(gap.norm()) <= tol * norm for gap, norm in zip(gaps, sizes, strict=True))


def ran(lab: Any, strategy: Any, fans: tuple[int, ...], **more: Any) -> Any:
    """Two rounds in float64 over eight clients, five of whom are asked in a round."""
    ranks = EIGHT if strategy.mixed_ranks else [4] * 8
    found = lab.prepare(strategy, ranks, rounds=2, clients=8, clients_per_round=5, tree=fans, **more)
    found.handle.state = strategy.init(lab.adapter(4, dtype=torch.float64))
    Callbacks(found.handle).run_begin()
    found.federation.run(found.grid)
    return found


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda one: type(one).__name__)
def test_a_run_over_any_tree_is_the_flat_run(lab: Any, strategy: Any) -> None:
    flat = ran(lab, strategy, ())
    assert ran(lab, strategy, (8,)).digest == flat.digest
    for fans in [(3, 3), (2, 2, 2)]:
        tree = ran(lab, strategy, fans)
        assert tree.client.groups == flat.client.groups  # so that training cannot differ
        assert near(tree, flat)


def test_bytes_are_those_of_the_links(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(content: RecordDict) -> int:
        sizes.append(size(content))
        return sizes[-1]

    monkeypatch.setattr(aggregation, "size", counted)
    found = ran(lab, FlexLoRA(), (2, 2, 2))
    lines, clients = found.lines("metrics.jsonl"), found.lines("clients.jsonl")
    for way in ("down", "up"):
        own = sum(line[f"bytes_{way}"] for line in clients)
        assert sum(line[f"bytes_{way}"] for line in lines) == own
        assert all(line[f"root_bytes_{way}"] < line[f"all_bytes_{way}"] for line in lines)
    both = sum(line["all_bytes_down"] + line["all_bytes_up"] for line in lines)
    assert both == sum(sizes) + sum(line["bytes_down"] + line["bytes_up"] for line in clients)
    flat = ran(lab, FlexLoRA(), ()).lines("metrics.jsonl")
    assert "root_bytes_up" not in flat[0]
    assert [line["bytes_up"] for line in flat] == [line["bytes_up"] for line in lines]


def test_the_clients_of_a_lost_edge_are_dropped_by_name(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(update: Any, names: Any) -> RecordDict:
        message = write_sum(update, names)
        if update.peer.called == "edge 1.0":
            message.metric_records["metrics"]["weight"] = float("nan")
        return message

    monkeypatch.setattr(aggregation, "write_sum", broken)
    found = lab.run(FedIT(), [4] * 8, rounds=1, clients=8, tree=(2, 2, 2))
    lines = found.lines("clients.jsonl")
    assert [line["client"] for line in lines if line["status"] == "dropped"] == [4, 5]
    assert all("edge 1.0: expected a sum of weights" in line["reason"] for line in lines[4:6])
    assert "edge 1.0 was lost, and with it client 4, client 5" in found.text
    (line,) = found.lines("metrics.jsonl")
    assert (line["clients"], line["dropped"]) == (6, 2)
    few = lab.run(FedIT(), [4] * 8, rounds=1, clients=8, tree=(2, 2, 2), min_updates=7)
    assert few.digest == lab.adapter().digest()
    assert "6 good updates are left, 7 needed" in few.text
    six = lab.keep(0, 1, 2, 3, 6, 7)
    monkeypatch.undo()
    flat = lab.run(FedIT(), [4] * 8, rounds=1, clients=8, change=six)
    for module in ("a.q", "b.v"):
        assert torch.allclose(
            found.federation.state.delta(module), flat.federation.state.delta(module), atol=1e-5
        )


def test_weights_are_uniform_where_a_run_says_so(lab: Any) -> None:
    flat, tree = (ran(lab, FedIT(), fans, weights="uniform") for fans in ((), (2, 4)))
    assert torch.allclose(flat.federation.state.delta("a.q"), tree.federation.state.delta("a.q"), atol=1e-12)
    other = ran(lab, FedIT(), (2, 4))
    assert not torch.allclose(
        other.federation.state.delta("a.q"), tree.federation.state.delta("a.q"), atol=1e-3
    )


@dataclass(frozen=True)
class Negated(UpdateStep):
    """A code whose two halves undo each other."""

    def on_client(self, given: ClientUpdate) -> ClientUpdate:
        return given.moved({name: -change for name, change in given.change.items()})

    def on_server(self, given: RoundUpdates) -> RoundUpdates:
        updates = []
        for update, task in zip(given.updates, given.tasks, strict=True):
            old, new = dict(task.adapter.tensors()), dict(update.adapter.tensors())
            back = {name: 2 * old[name] - new[name] for name in task.shared()}
            updates.append(replace(update, adapter=update.adapter.with_tensors(back)))
        return given.become(updates)


def test_an_edge_undoes_the_codes_of_its_clients(lab: Any) -> None:
    config = RoundConfig(rounds=2, seed=0, clients=8, clients_per_round=5, tree=(2, 4))
    coded = ran(
        lab,
        FlexLoRA(),
        (2, 4),
        aggregation=aggregation_for(config, steps=[Negated()]),
        site={"steps": (Negated(),)},
    )
    plain = ran(lab, FlexLoRA(), (2, 4))
    assert torch.allclose(
        coded.federation.state.delta("a.q"), plain.federation.state.delta("a.q"), atol=1e-11
    )


def test_masked_vectors_are_added_up_on_their_way_and_the_masks_cancel_at_the_server(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Words] = []

    def watched(total: Words, nodes: Any) -> RecordDict:
        seen.append(total.copy())
        return write_masked_sum(total, nodes)

    monkeypatch.setattr(aggregation, "write_masked_sum", watched)
    flat = lab.run(FedIT(), [4] * 8, clients=8, secure_sum=True)
    tree = lab.run(FedIT(), [4] * 8, clients=8, secure_sum=True, tree=(2, 2, 2))
    assert tree.digest == flat.digest  # words are added, and words do not round
    assert len(seen) == 2 * (4 + 2)
    assert all(
        abs(word.astype(np.int64).astype(float)).mean() > 2**60 for word in seen
    )  # random, all of them
    line, own = tree.lines("metrics.jsonl")[0], flat.lines("metrics.jsonl")[0]
    assert line["bytes_up"] == own["bytes_up"]
    assert line["root_bytes_up"] > 2 * seen[0].nbytes


def test_clients_that_fail_under_masks_are_dropped_as_without_a_tree(lab: Any, noise: Any) -> None:
    same = {"clients": 8, "secure_sum": True, "rounds": 1}
    flat, tree = (
        lab.run(FedIT(), [4] * 8, client=noise(failing=frozenset({2, 5})), tree=fans, **same)
        for fans in ((), (2, 4))
    )
    assert tree.digest == flat.digest
    assert [line["status"] for line in tree.lines("clients.jsonl")].count("dropped") == 2


@pytest.mark.slow
def test_under_client_level_privacy_clients_clip_and_the_server_adds_the_noise_once(
    lab: Any, tmp_path: Any
) -> None:
    plan = Plan(ClientLevel(clip=0.5, accountant="rdp", epsilon=900.0), 8, 1, 1e-5, 1e-12, 1.0)
    found = []
    for name, fans in (("flat", ()), ("tree", (2, 4))):
        central = ClientLevelMechanism(ClientLevel(clip=0.5), plan, tmp_path / f"{name}.json")
        central.refusal = lambda: None  # type: ignore[method-assign]  # such a σ has no budget
        rules = {"clients": 8, "secure_sum": True, "tree": fans}
        found.append(lab.run(FFALoRA(), [4] * 8, rounds=1, central=central, **rules))
    assert near(*found, 1e-5)
