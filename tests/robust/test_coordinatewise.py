"""The median and the trimmed mean, by plain numpy; what an attack can reach, and who has a vote."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from hypothesis import given
from hypothesis import strategies as st

from fedlora import strategies
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, Update
from fedlora.core.update_step import RoundUpdates
from fedlora.robust.coordinatewise import Median, TrimmedMean, middle

LAYERS = {"tall": (11, 4), "square": (6, 6), "wide": (5, 9)}
NAMES = [
    n for n in strategies.__all__ if getattr(strategies, n)().linear or getattr(strategies, n)().products
]
WORKING = [n for n in NAMES if not getattr(strategies, n).personal]
MIXED = [Peer(i, r) for i, r in enumerate((4, 2, 3, 1, 4))]


def one_update(rule, strategy, state, updates, widest=4):
    tasks = [strategy.task(state, u.peer) for u in updates]
    kept = rule.on_server(RoundUpdates(strategy, state, updates, tasks, Peer(0, widest)))
    assert len(kept.updates) == len(kept.tasks) == 1
    return kept, tasks


def padded(tensors, shape, value):
    """Tensors of smaller ranks with a value where they hold nothing, (n, ...)."""
    whole = torch.full((len(tensors), *shape), value, dtype=torch.float64)
    for row, tensor in zip(whole, tensors, strict=True):
        row[tuple(slice(0, n) for n in tensor.shape)] = tensor
    return whole


@given(n=st.integers(1, 9), share=st.sampled_from([0.1, 0.2, 0.25, 0.34, 0.49]))
def test_without_gaps_it_is_flower_s_trimmed_mean_and_numpy_s_median(n, share):
    values = np.random.default_rng(n).standard_normal((n, 4, 3))
    cut = min(int(np.ceil(share * n - 1e-9)), (n - 1) // 2)
    want = trim_mean(values, (cut + 0.25) / n)  # its own share rounds down: of 3 clients 0.3 would trim none
    assert np.allclose(middle(torch.from_numpy(values), share), want, rtol=1e-14, atol=1e-15)
    assert np.allclose(middle(torch.from_numpy(values), 0.5), np.median(values, 0), rtol=1e-14, atol=1e-15)


def test_gaps_do_not_vote():
    nan = float("nan")
    values = torch.tensor([[1.0, nan, nan], [2.0, 5.0, nan], [9.0, nan, nan], [-90.0, 7.0, nan]]).double()
    assert middle(values, 0.5).tolist() == [1.5, 6.0, 0.0]
    assert middle(values, 0.25).tolist() == [1.5, 6.0, 0.0]


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.parametrize("rule", [Median(), TrimmedMean(0.3)], ids=lambda r: type(r).__name__)
def test_one_client_is_its_own_median(make, np64, rng, name, rule):
    strategy = getattr(strategies, name)()
    state = strategy.init(make.adapter(rng, LAYERS, 4))
    own = make.round(rng, strategy, state, [Peer(3, 4)], [7.0])
    kept, _ = one_update(rule, strategy, state, own)
    for m, pair in kept.updates[0].adapter.pairs.items():
        assert np64.close(np64.delta(pair), np64.delta(own[0].adapter.pairs[m]), 1e-12)
    assert kept.notes[3]["distance"] < 1e-7
    new, want = (strategy.aggregate(state, u, np.random.default_rng(1)) for u in (kept.updates, own))
    assert all(np64.close(new.delta(m), want.delta(m), 1e-10) for m in LAYERS)


def test_factors_are_combined_over_the_clients_that_hold_a_direction(make, np64, rng):
    """FFA-LoRA of mixed ranks, in other scales: column i of B over the clients of a rank above i."""
    strategy, scales = strategies.FFALoRA(), (2.0, 4.0, 3.0, 8.0, 2.0)
    peers = [replace(p, scales=dict.fromkeys(LAYERS, s)) for p, s in zip(MIXED, scales, strict=True)]
    state = strategy.init(make.adapter(rng, LAYERS, 4, 2.0))
    sent = make.round(rng, strategy, state, peers, [1e9, 1.0, 1.0, 1.0, 1.0])
    kept, _ = one_update(Median(), strategy, state, sent)
    for m, old in state.adapter.pairs.items():
        for i in range(4):
            votes = [
                u.adapter.pairs[m].B[:, i].numpy() * u.adapter.pairs[m].scale / 2.0 - old.B[:, i].numpy()
                for u in sent
                if u.peer.rank > i
            ]
            want = old.B[:, i].numpy() + np.median(votes, axis=0)
            assert np64.close(kept.updates[0].adapter.pairs[m].B[:, i], want, 1e-12)
        assert torch.equal(kept.updates[0].adapter.pairs[m].A, old.A)
    heads = np.stack([u.adapter.extra["head.weight"].numpy() for u in sent])
    assert np64.close(kept.updates[0].adapter.extra["head.weight"], np.median(heads, 0), 1e-12)
    # The fourth direction is held by two of five, the head and the others by three or more.
    held = sum(shape[0] for shape in LAYERS.values())
    assert kept.metrics["unprotected"] == pytest.approx(held / (4 * held + 7))


def test_a_core_is_held_by_those_of_its_rank(make, np64, rng):
    strategy = strategies.PrivateLoRA()
    state = strategy.init(make.adapter(rng, LAYERS, 4))
    sent = make.round(rng, strategy, state, MIXED, [1.0] * 5)
    kept, _ = one_update(Median(), strategy, state, sent)
    got = kept.updates[0].adapter.extra["tall.core"]
    for i, j in np.ndindex(4, 4):
        votes = [float(u.adapter.extra["tall.core"][i, j]) for u in sent if u.peer.rank > max(i, j)]
        assert float(got[i, j]) == pytest.approx(np.median(votes))


@pytest.mark.parametrize("name", ["FlexLoRA", "FLoRA"])
def test_products_are_combined_dense(make, np64, rng, name):
    strategy = getattr(strategies, name)()
    state = strategy.init(make.adapter(rng, LAYERS, 4, 2.0))
    sent = make.round(rng, strategy, state, MIXED, [1.0, 1e12, 1.0, 1.0, 1.0], 0.3)
    kept, tasks = one_update(TrimmedMean(0.2), strategy, state, sent)
    wide = strategy.task(state, Peer(0, 4)).adapter
    for m in LAYERS:
        own = [
            np64.delta(u.adapter.pairs[m]) - np64.delta(t.adapter.pairs[m])
            for u, t in zip(sent, tasks, strict=True)
        ]
        want = np64.best(np64.delta(wide.pairs[m]) + np.sort(own, axis=0)[1:-1].mean(0), 4)
        assert np64.close(np64.delta(kept.updates[0].adapter.pairs[m]), want, 1e-10)
        assert kept.updates[0].adapter.pairs[m].scale == wide.pairs[m].scale
    assert kept.metrics["unprotected"] == 0


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.parametrize("rule", [Median(), TrimmedMean(0.2)], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("size", [10.0, 1e5])
def test_an_attack_moves_no_coordinate_out_of_the_honest_range(make, np64, rng, name, rule, size):
    """One of five, of the largest rank; at least three hold every direction."""
    strategy = getattr(strategies, name)()
    mixed = [Peer(i, r) for i, r in enumerate((4, 4, 3, 4, 4))]
    peers = mixed if strategy.mixed_ranks else [Peer(i, 4) for i in range(5)]
    state = strategy.init(make.adapter(rng, LAYERS, 4))
    sent = make.round(rng, strategy, state, peers, [1.0] * 5, 0.1)
    evil = make.round(rng, strategy, state, peers[:1], [1e12], size)
    honest, _ = one_update(rule, strategy, state, sent[1:])
    kept, _ = one_update(rule, strategy, state, [*evil, *sent[1:]])
    wide = strategy.task(state, Peer(0, 4))
    for name in wide.shared() if strategy.linear else []:
        got = dict(kept.updates[0].adapter.tensors())[name]
        own = [dict(u.adapter.tensors())[name] for u in sent[1:]]
        low, high = (padded(own, got.shape, end) for end in (np.inf, -np.inf))
        assert bool(((got >= low.amin(0) - 1e-12) & (got <= high.amax(0) + 1e-12)).all())
    for m in wide.adapter.pairs:
        own = [np64.delta(u.adapter.pairs[m]) for u in sent[1:]]
        spread = np.linalg.norm(np.max(own, 0) - np.min(own, 0))
        a, b = (np64.delta(k.updates[0].adapter.pairs[m]) for k in (kept, honest))
        assert np.linalg.norm(a - b) <= 3 * spread
    assert kept.notes[0]["distance"] > 5 * max(kept.notes[k]["distance"] for k in (1, 2, 3, 4))


def test_nobody_moved(make, rng):
    strategy = strategies.FedIT()
    state = strategy.init(make.adapter(rng, LAYERS, 4))
    still = [Update(strategy.task(state, Peer(i, 4)).adapter, 1.0, Peer(i, 4)) for i in range(3)]
    kept, _ = one_update(Median(), strategy, state, still)
    assert kept.updates[0].adapter.digest() == state.adapter.digest()
    assert {note["distance"] for note in kept.notes.values()} == {0.0}


def test_extras_and_pairs_alone(make, rng):
    strategy = strategies.FedIT()
    for adapter in (
        Adapter({}, {"head": torch.zeros(3)}),
        Adapter({"m": Pair(torch.ones(1, 3), torch.ones(2, 1))}),
    ):
        state = strategy.init(adapter)
        sent = make.round(rng, strategy, state, [Peer(i, 1) for i in range(3)], [1.0] * 3)
        kept, _ = one_update(Median(), strategy, state, sent, 1)
        strategy.aggregate(state, kept.updates, rng)
