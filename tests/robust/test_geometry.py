"""Changes, their inner products and their paths, against dense matrices in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora import strategies
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, Task
from fedlora.robust import geometry
from fedlora.robust.geometry import Segment, change, distances, factor_distances, gram

LAYERS = {"tall": (11, 4), "square": (6, 6), "wide": (5, 9)}
BIG = {"tall": (60, 40), "wide": (30, 70)}


def moved(np64, task, adapter):
    """What a client changed, as one dense vector: every ΔW, and the extras."""
    parts = [np64.change(adapter, m) - np64.change(task.adapter, m) for m in task.adapter.pairs]
    parts += [
        (adapter.extra[n] - old).double().numpy() for n, old in task.adapter.extra.items() if ".core" not in n
    ]
    return np.concatenate([part.reshape(-1) for part in parts])


@pytest.mark.parametrize("layers", [LAYERS, BIG], ids=["dense", "factors"])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 4, 3, 2), (1,)], ids=str)
@pytest.mark.parametrize("name", ["FlexLoRA", "FFALoRA", "PrivateLoRA", "HetLoRA", "FLoRA"])
def test_distances_are_those_of_dense_changes(make, np64, rng, layers, ranks, name):
    strategy = getattr(strategies, name)()
    state = strategy.init(make.adapter(rng, layers, 4, 0.7))
    peers = [Peer(i, r, {}, dict.fromkeys(layers, 8 / r)) for i, r in enumerate(ranks)]
    sent = make.round(rng, strategy, state, peers, [1.0] * len(peers), 0.3)
    tasks = [strategy.task(state, peer) for peer in peers]
    rows = np.stack([moved(np64, t, u.adapter) for t, u in zip(tasks, sent, strict=True)])
    want = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    assert np64.close(distances(tasks, [u.adapter for u in sent]), want, 1e-12)


def test_no_dense_matrix_is_made_while_the_ranks_are_below_the_layer(make, rng, monkeypatch):
    monkeypatch.setattr(geometry, "dense", lambda pair: pytest.fail("a dense matrix was made"))
    pairs = [make.pair(rng, 30, 40, r) for r in (2 * 8, 2 * 4, 2 * 17)]  # changes of ranks 8 + 4 + 17 = 29
    gram(pairs)
    with pytest.raises(pytest.fail.Exception, match="dense"):
        gram([*pairs, make.pair(rng, 30, 40, 2)])


def test_a_small_change_of_a_large_update_loses_nothing_to_cancellation(make, np64, rng):
    old = make.pair(rng, 50, 40, 3, 1e6)
    dA, dB = 1e-7 * torch.randn_like(old.A), 1e-7 * torch.randn_like(old.B)
    got = change(old, Pair(old.A + dA, old.B + dB, old.scale))
    dA, dB = (old.A + dA) - old.A, (old.B + dB) - old.B
    want = 1e6 * (dB @ (old.A + dA) + old.B @ dA).numpy()
    assert np.linalg.norm(np64.delta(got) - want) < 1e-13 * np.linalg.norm(want)


def test_two_honest_clients_are_told_apart_beside_an_enormous_one(make, np64, rng):
    """Each distance is as exact as its own two clients allow, whoever else is there."""
    state = strategies.FlexLoRA().init(make.adapter(rng, BIG, 4))
    task = strategies.FlexLoRA().task(state, Peer(0, 4))
    adapters = [make.trained(rng, task, step) for step in (1e-3, 1e-3, 1e6)]
    want = np.linalg.norm(moved(np64, task, adapters[0]) - moved(np64, task, adapters[1])) ** 2
    assert float(distances([task] * 3, adapters)[0, 1]) == pytest.approx(want, rel=1e-9)


def test_a_pruned_update_is_a_change_of_its_whole_rank(make, np64, rng):
    old, new = make.pair(rng, 6, 9, 4, 2.0), make.pair(rng, 6, 9, 3, 2.0)
    assert np64.close(np64.delta(change(old, new)), np64.delta(new) - np64.delta(old), 1e-13)


def test_a_change_of_scale_is_a_change(make, np64, rng):
    old, new = make.pair(rng, 6, 9, 3, 2.0), make.pair(rng, 6, 9, 3, 5.0)
    assert np64.close(np64.delta(change(old, new)), np64.delta(new) - np64.delta(old), 1e-13)


def test_distances_of_factors_are_those_of_padded_tensors(make, np64, rng):
    strategy = strategies.HetLoRA()
    state = strategy.init(make.adapter(rng, LAYERS, 4))
    peers = [Peer(0, 4), Peer(1, 2), Peer(2, 3)]
    sent = [u.adapter for u in make.round(rng, strategy, state, peers, [1.0] * 3)]
    tasks, wide = [strategy.task(state, p) for p in peers], strategy.task(state, peers[0])

    def row(task, got):
        found = []
        for name, tensor in wide.adapter.tensors():
            full = torch.zeros_like(tensor)
            delta = dict(got.tensors())[name] - dict(task.adapter.tensors())[name]
            full[tuple(slice(0, n) for n in delta.shape)] = delta
            found.append(full.numpy().reshape(-1))
        return np.concatenate(found)

    rows = np.stack([row(t, g) for t, g in zip(tasks, sent, strict=True)])
    assert np64.close(factor_distances(tasks, sent, wide), ((rows[:, None] - rows[None]) ** 2).sum(-1), 1e-12)


@pytest.mark.parametrize("name", ["FedIT", "FFALoRA", "PrivateLoRA", "FLoRA", "SLoRA"])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_the_length_on_the_way_is_that_of_what_lies_there(make, np64, rng, name, rank, t):
    strategy = getattr(strategies, name)()
    state = strategy.init(make.adapter(rng, LAYERS, rank, 0.7))
    task = strategy.task(state, Peer(0, rank))
    way = Segment.of(task, make.trained(rng, task))
    want = np.linalg.norm(moved(np64, task, way.at(t)))
    assert way.length(t) == pytest.approx(want, rel=1e-12, abs=1e-12)


def test_a_point_on_the_way_leaves_what_is_not_shared_to_the_bit(make, rng):
    strategy = strategies.FFALoRA()
    state = strategy.init(make.adapter(rng, LAYERS, 3, dtype=torch.float32))
    task = strategy.task(state, Peer(0, 3))
    there = Segment.of(task, make.trained(rng, task)).at(0.37)
    assert all(torch.equal(pair.A, there.pairs[m].A) for m, pair in task.adapter.pairs.items())
    assert {tensor.dtype for _, tensor in there.tensors()} == {torch.float32}


@pytest.mark.parametrize("bound", [1e-6, 0.5, 3.0])
def test_within_a_bound_is_as_far_as_the_bound_allows(make, rng, bound):
    task = Task(make.adapter(rng, LAYERS, 3))
    way = Segment.of(task, make.trained(rng, task))
    assert way.length(way.within(bound)) == pytest.approx(bound, rel=1e-9)
    assert way.within(1e9) == 1.0
    assert way.within(1e9, way.raw / 4) == pytest.approx(0.25)
    assert way.within(0.0) == 0.0


def test_an_update_that_did_not_move_has_no_length(make, rng):
    task = Task(make.adapter(rng, LAYERS, 3))
    way = Segment.of(task, task.adapter)
    assert (way.length(), way.raw, way.within(0.0)) == (0.0, 0.0, 1.0)
    assert way.at(1.0) is task.adapter


def test_a_head_alone_has_distances(rng):
    task = Task(Adapter({}, {"head": torch.zeros(3)}))
    adapters = [Adapter({}, {"head": torch.full((3,), float(x))}) for x in (0, 1, 3)]
    want = [[0, 3, 27], [3, 0, 12], [27, 12, 0]]
    assert distances([task] * 3, adapters).tolist() == want
    assert distances([replace(task)], adapters[:1]).tolist() == [[0]]
