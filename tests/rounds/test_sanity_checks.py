"""Each canary sings for the mistake that it is there for, in a whole federation, and for nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, MetricRecord

from fedlora import strategies
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.rounds.sanity_checks import check_state, check_updates
from fedlora.storage.client_state import ClientStore
from fedlora.strategies import FedIT, FFALoRA, FlexLoRA
from fedlora.training.client import TrainRequest

PLAIN = [n for n in strategies.__all__ if not getattr(strategies, n).client]


def broken(base: Any, change: Any) -> Any:
    """The strategy with a mistake in what it makes of a round: `change` of the old and the new state."""

    class Broken(type(base)):
        def aggregate(self, state: State, updates: Any, rng: Any) -> State:
            return change(state, super().aggregate(state, updates, rng))

    return Broken()


def with_pairs(state: State, pairs: Any) -> State:
    return replace(state, adapter=Adapter(pairs, state.adapter.extra))


def with_extra(state: State, extra: Any) -> State:
    return replace(state, adapter=Adapter(state.adapter.pairs, extra))


@pytest.mark.parametrize("name", PLAIN)
def test_a_sound_run_warns_of_nothing(lab: Any, tmp_path: Path, name: str) -> None:
    strategy = getattr(strategies, name)()
    ranks = [2, 4, 3] if strategy.mixed_ranks else [4, 4, 4]
    own = {"memory": ClientStore(tmp_path / "memory")}
    ran = lab.run(strategy, ranks, rounds=4, scales={0: 0.5, 1: 3.0}, site=own)
    assert "warning" not in ran.text


def test_an_adapter_that_did_not_move(lab: Any, noise: Any) -> None:
    ran = lab.run(FedIT(), client=noise(still=True), rounds=1)
    assert ran.text.count("warning") == 1
    assert "round 1: the adapter did not move; is anything trained?" in ran.text
    lost = broken(FedIT(), lambda old, new: old)
    assert "the adapter did not move" in lab.run(lost, rounds=1).text


def test_a_module_that_no_client_moves_is_named(lab: Any, noise: Any) -> None:
    class Half(noise):
        """Trains one module of two, as when the other's name was mistyped, and one tensor of the head."""

        def _moved(self, a: TrainRequest) -> Adapter:
            moved, start = super()._moved(a), a.start
            pairs = {**moved.pairs, "b.v": start.pairs["b.v"]}
            return Adapter(pairs, {**moved.extra, "head.bias": start.extra["head.bias"]})

    for strategy in (FedIT(), FFALoRA(), FlexLoRA()):
        text = lab.run(strategy, client=Half(), rounds=1).text
        assert "no client has moved 'b.v', 'head.bias'; is it trained?" in text
        assert "a.q" not in text


def test_one_factor_at_rest_is_no_module_at_rest(lab: Any, noise: Any) -> None:
    """In the first step of a fresh pair A has no gradient."""

    class OnlyB(noise):
        def _moved(self, a: TrainRequest) -> Adapter:
            moved = super()._moved(a)
            pairs = {m: Pair(a.start.pairs[m].A, p.B, p.scale) for m, p in moved.pairs.items()}
            return Adapter(pairs, moved.extra)

    assert "warning" not in lab.run(FedIT(), client=OnlyB()).text


def test_a_snapshot_of_before_the_training_is_told(lab: Any, noise: Any) -> None:
    """As a client that detaches its parameters and uploads the copy."""

    class Snapshot(noise):
        def _moved(self, a: TrainRequest) -> Adapter:
            return a.start if a.client == 1 else super()._moved(a)

    ran = lab.run(FedIT(), client=Snapshot(), rounds=1)
    assert "client 1 sent back what was sent to it; does it train?" in ran.text
    assert ran.text.count("warning") == 1


def test_clients_with_the_same_update_are_told(lab: Any) -> None:
    """Two sites on the same rows with the same id of their choices, or one that copies another."""

    def copied(replies: list[Message]) -> list[Message]:
        replies[2].content["arrays"] = replies[0].content["arrays"]
        return replies

    ran = lab.run(FedIT(), change=copied, rounds=1)
    assert "client 0, client 2 sent the same update, bit for bit; have they the same rows?" in ran.text


@pytest.mark.parametrize("strategy", [FedIT(), FFALoRA(), FlexLoRA(), strategies.HetLoRA()], ids=repr)
def test_a_head_that_nobody_aggregated(lab: Any, strategy: Any) -> None:
    lost = broken(strategy, lambda old, new: with_extra(new, old.adapter.extra))
    text = lab.run(lost, rounds=1).text
    assert "'head.bias' was not aggregated: clients moved it by" in text
    assert "'head.weight' was not aggregated" in text


@pytest.mark.parametrize("strategy", [FedIT(), FFALoRA(), FlexLoRA()], ids=repr)
def test_a_head_off_the_clients_mean(lab: Any, strategy: Any) -> None:
    """Peers' mistake: of all clients the first alone counted."""
    first = broken(
        strategy, lambda old, new: with_extra(new, {n: t * 1.01 for n, t in new.adapter.extra.items()})
    )
    assert "'head.weight' lies" in lab.run(first, rounds=1).text
    assert "off the clients' weighted mean" in lab.run(first, rounds=1).text


def test_the_mean_of_the_head_is_weighted(lab: Any) -> None:
    """With weights lost on the way the head is the plain mean, and not where 10, 20, 30 rows put it."""

    class Plain(FedIT):
        def aggregate(self, state: State, updates: Any, rng: Any) -> State:
            return super().aggregate(state, [replace(u, weight=1.0) for u in updates], rng)

    assert "off the clients' weighted mean" in lab.run(Plain(), rounds=1).text
    assert "warning" not in lab.run(Plain(), rounds=1, weights="uniform").text


def test_a_frozen_head_is_no_head_that_was_lost(lab: Any) -> None:
    task = Task(Adapter({"m": Pair(torch.ones(1, 3), torch.ones(2, 1))}, {}))
    moved = Adapter({"m": Pair(torch.ones(1, 3), torch.zeros(2, 1))}, {})
    update = Update(moved, 1.0, Peer(0, 1))
    assert check_state(FedIT(), State(task.adapter), State(moved, 1), [update], [task])[1] == []


def test_a_scale_that_changed_on_the_server(lab: Any) -> None:
    def rescaled(old: State, new: State) -> State:
        pairs = {**new.adapter.pairs}
        pairs["b.v"] = Pair(pairs["b.v"].A, pairs["b.v"].B, 16.0)
        return with_pairs(new, pairs)

    text = lab.run(broken(FedIT(), rescaled), rounds=1).text
    assert "the new state has scale 16 for 'b.v', expected 2" in text


def test_a_scale_that_changed_at_a_client() -> None:
    task = Task(Adapter({"m": Pair(torch.ones(1, 3), torch.ones(2, 1), 2.0)}))
    update = Update(Adapter({"m": Pair(torch.zeros(1, 3), torch.ones(2, 1), 4.0)}), 1.0, Peer(0, 1))
    found = check_state(FedIT(), State(task.adapter), State(task.adapter, 1), [update], [task])[1]
    assert any("an update has scale 4 for 'm', expected 2" in text for text in found)


def test_a_module_that_the_server_lost(lab: Any) -> None:
    lost = broken(FedIT(), lambda old, new: with_pairs(new, {"a.q": new.adapter.pairs["a.q"]}))
    before, updates = FedIT().init(lab.adapter()), []
    task = FedIT().task(before, Peer(0, 4))
    moved = Adapter(
        {m: Pair(p.A + 1, p.B, p.scale) for m, p in task.adapter.pairs.items()}, task.adapter.extra
    )
    updates = [Update(moved, 1.0, Peer(0, 4))]
    after = lost.aggregate(before, updates, None)
    updates = [replace(updates[0], adapter=Adapter({"a.q": moved.pairs["a.q"]}, moved.extra))]
    assert "the new state lacks 'b.v'" in check_state(FedIT(), before, after, updates, [task])[1]


@pytest.mark.parametrize("strategy", [FFALoRA(), FlexLoRA()], ids=repr)
def test_a_strategy_that_is_not_as_exact_as_it_says(lab: Any, strategy: Any) -> None:
    def halved(old: State, new: State) -> State:
        return with_pairs(new, {m: Pair(p.A, p.B * 0.5, p.scale) for m, p in new.adapter.pairs.items()})

    text = lab.run(broken(strategy, halved), rounds=1).text
    assert "aggregation_error is 0.5, where Broken should be exact" in text
    assert "aggregation_error" not in lab.run(broken(FedIT(), halved), rounds=1).text


def test_a_missing_key_is_told_before_anything_is_combined(lab: Any) -> None:
    def torn(replies: list[Message]) -> list[Message]:
        del replies[1].content["arrays"]["b.v.A"]
        return replies

    assert (
        "client 1 dropped: wrong tensors: missing ['b.v.A']" in lab.run(FedIT(), change=torn, rounds=1).text
    )


def test_warnings_name_no_more_than_a_few() -> None:
    pairs = {f"layer.{i}": Pair(torch.ones(1, 3), torch.ones(2, 1)) for i in range(9)}
    task = Task(Adapter(pairs, {"head": torch.ones(2)}))
    update = Update(Adapter(pairs, {"head": torch.zeros(2)}), 1.0, Peer(0, 1))
    (said,) = check_updates([update], [task])
    assert said == "no client has moved 'layer.0', 'layer.1', 'layer.2' and 6 more; is it trained?"


def test_metrics_of_clients_do_not_matter(lab: Any) -> None:
    def with_metrics(replies: list[Message]) -> list[Message]:
        for reply in replies:
            more = {"rejected": 1.0, "change": 3.0}
            reply.content["metrics"] = MetricRecord(dict(reply.content.metric_records["metrics"]) | more)
        return replies

    assert "warning" not in lab.run(FedIT(), change=with_metrics, rounds=1).text
