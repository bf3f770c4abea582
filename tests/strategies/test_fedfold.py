"""FedFold: exact for any ranks, still where nothing is learned, whatever part of D* is trained or sent."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import dense
from fedlora.core.messages import Peer, State, Update
from fedlora.errors import ConfigError
from fedlora.strategies import FedFold

seeds, dims = st.integers(0, 2**32 - 1), st.integers(1, 9)
clients = st.lists(
    st.tuples(st.integers(1, 12), st.floats(0.1, 9), st.floats(0.1, 9)), min_size=1, max_size=5
)
energies, shares = st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])


def model(np64, task, pair, m="m"):
    """What a client's base has added to it, with a pair of its own."""
    base_delta = task.base_delta.get(m)
    return np64.delta(pair) + (0 if base_delta is None else np64.delta(base_delta))


def sampled(clients):
    """Peers of these ranks and scales, and their weights."""
    return [Peer(k, r, {}, {"m": s}) for k, (r, s, _) in enumerate(clients)], [w for _, _, w in clients]


def started(make, rng, d_out, d_in, rank, scale=2.0, base_delta=None, **options):
    strategy = FedFold(**options)
    return strategy, strategy.init(Adapter({"m": make.pair(rng, d_out, d_in, rank, scale)}), base_delta)


def test_the_facts():
    assert (FedFold.mixed_ranks, FedFold.linear, FedFold.exact) == (True, False, True)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", ["energy", "fresh"])
def test_what_is_no_share_is_refused_by_name(name, share):
    with pytest.raises(ConfigError, match=rf"FedFold.{name}: expected a number from 0 to 1, got"):
        FedFold(**{name: share})


@given(seed=seeds, d_out=dims, d_in=dims, rank=st.integers(1, 12), clients=clients, fresh=shares)
def test_every_client_starts_from_the_whole_of_it(make, np64, seed, d_out, d_in, rank, clients, fresh):
    rng = np.random.default_rng(seed)
    strategy, state = started(make, rng, d_out, d_in, rank, fresh=fresh)
    for peer in sampled(clients)[0]:
        task = strategy.task(state, peer)
        pair, led = task.adapter.pairs["m"], int(peer.rank * (10 - 10 * fresh) // 10)
        assert (pair.rank, pair.scale) == (peer.rank, peer.scales["m"])
        assert np64.close(np64.delta(pair), np64.best(state.delta("m").numpy(), led))
        assert not pair.B[:, min(led, state.adapter.pairs["m"].rank) :].any()
        assert np64.orthonormal_rows(pair.A[: min(peer.rank, d_in)])
        assert np64.close(model(np64, task, pair), state.delta("m"))
        assert all(p.scale == 1.0 for p in task.base_delta.values())


@given(
    seed=seeds,
    d_out=dims,
    d_in=dims,
    rank=st.integers(1, 12),
    rounds=st.lists(clients, min_size=1, max_size=3),
    fresh=shares,
)
def test_the_new_one_is_the_mean_of_the_clients_models(make, np64, seed, d_out, d_in, rank, rounds, fresh):
    rng = np.random.default_rng(seed)
    strategy, state = started(make, rng, d_out, d_in, rank, fresh=fresh)
    for clients in rounds:
        peers, weights = sampled(clients)
        tasks = [strategy.task(state, peer) for peer in peers]
        updates = make.round(rng, strategy, state, peers, weights, 0.3)
        ends = [model(np64, t, u.adapter.pairs["m"]) for t, u in zip(tasks, updates, strict=True)]
        want = sum(w / sum(weights) * end for w, end in zip(weights, ends, strict=True))
        state = strategy.aggregate(state, updates, rng)
        assert np64.close(state.delta("m"), want)
        assert state.adapter.pairs["m"].scale == 2.0


@given(seed=seeds, rank=st.integers(1, 12), clients=clients, energy=energies, fresh=shares)
def test_the_recipe_holds_for_any_energy(make, np64, seed, rank, clients, energy, fresh):
    # D*_new = D* + Σ w_k (s_k B_k A_k − s_k B_k_in A_k_in), with what the tasks said, and no peers to ask.
    rng = np.random.default_rng(seed)
    strategy, state = started(make, rng, 7, 9, rank, energy=energy, fresh=fresh)
    peers, weights = sampled(clients)
    updates = make.round(rng, strategy, state, peers, weights)
    want = state.delta("m").numpy()
    for peer, update in zip(peers, updates, strict=True):
        moved = np64.delta(update.adapter.pairs["m"]) - np64.delta(
            strategy.task(state, peer).adapter.pairs["m"]
        )
        want = want + update.weight / sum(weights) * moved
    by_hand = [Update(u.adapter, u.weight) for u in updates]
    assert np64.close(strategy.aggregate(state, by_hand, rng).delta("m"), want)


@given(
    seed=seeds,
    d_out=dims,
    d_in=dims,
    rank=st.integers(1, 12),
    clients=clients,
    energy=energies,
    fresh=shares,
)
def test_a_still_round_is_the_identity(make, np64, seed, d_out, d_in, rank, clients, energy, fresh):
    rng = np.random.default_rng(seed)
    strategy, state = started(make, rng, d_out, d_in, rank, energy=energy, fresh=fresh)
    start, directions = state.delta("m"), state.adapter.pairs["m"].rank
    for _ in range(3):
        state = strategy.aggregate(state, make.round(rng, strategy, state, *sampled(clients), 0.0), rng)
        assert np64.close(state.delta("m"), start, 1e-12)
        assert state.adapter.pairs["m"].rank == directions


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_thirty_still_rounds_add_no_direction_and_lose_none(make, np64, rng, dtype, tol):
    pair = make.spectrum(rng, 40, 30, [10.0 / 2**i for i in range(16)])
    state = State(Adapter({"m": Pair(pair.A.to(dtype), (pair.B / 2).to(dtype), 2.0)}))
    start, strategy = state.delta("m"), FedFold()
    for _ in range(30):
        ranks = rng.choice([2, 4, 8, 16], 3)
        peers = [Peer(k, int(r), {}, {"m": 16.0 / int(r)}) for k, r in enumerate(ranks)]
        state = strategy.aggregate(state, make.round(rng, strategy, state, peers, [1.0, 2.0, 3.0], 0.0), rng)
    assert np64.close(state.delta("m"), start, tol)
    sigma = np.linalg.svd(state.delta("m").double().numpy(), compute_uv=False)[:16]
    assert np.allclose(sigma, [10.0 / 2**i for i in range(16)], rtol=0, atol=10 * tol)
    assert state.adapter.pairs["m"].rank == 16
    assert state.metrics == {"rank": 16.0}


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("energy", [0.0, 0.5, 0.85, 0.98, 1.0])
def test_what_is_sent_holds_the_energy_in_the_fewest_directions(make, np64, rng, rank, energy):
    sigma = np.array([4.0, 3.0, 2.0, 1.0, 0.5, 0.1])
    state = State(Adapter({"m": make.spectrum(rng, 9, 8, list(sigma))}))
    task = FedFold(fresh=0.0, energy=energy).task(state, Peer(0, rank))
    share = np.cumsum(sigma**2) / (sigma**2).sum()
    q = max(rank, 0 if energy == 0 else int(np.argmax(share >= energy - 1e-12)) + 1)
    assert sum(p.rank for p in task.base_delta.values()) == q - rank
    assert (q > rank) == ("m" in task.base_delta)
    assert np64.close(model(np64, task, task.adapter.pairs["m"]), np64.best(state.delta("m").numpy(), q))


def test_all_of_the_energy_is_all_of_it_however_small_the_tail(make, np64, rng):
    # A sum from the large end would not see the tail, and lose half of the digits.
    state = State(Adapter({"m": make.spectrum(rng, 9, 8, [1.0, 1e-9, 1e-12])}))
    assert FedFold().task(state, Peer(0, 2)).base_delta["m"].rank == 2


def test_a_base_delta_from_the_start_stays(make, np64, rng):
    given = make.pair(rng, 7, 9, 2)
    strategy, state = started(make, rng, 7, 9, 4, base_delta={"m": given})
    assert np64.close(state.delta("m"), np64.delta(given) + dense(state.adapter.pairs["m"]).numpy())
    for rank in (1, 9):
        task = strategy.task(state, Peer(0, rank))
        assert np64.close(model(np64, task, task.adapter.pairs["m"]), state.delta("m"))
    new = strategy.aggregate(state, make.round(rng, strategy, state, [Peer(0, 2)], [1.0], 0.0), rng)
    assert np64.close(new.delta("m"), state.delta("m"))


def test_a_share_of_a_rank_is_rounded_in_whole_numbers(make, rng):
    # (1 − 0.9) · 10 is a little below 1 in floats.
    state = State(Adapter({"m": make.pair(rng, 12, 12, 12)}))
    led = [
        int(FedFold(fresh=0.9).task(state, Peer(0, r)).adapter.pairs["m"].B.any(dim=0).sum()) for r in (9, 10)
    ]
    assert led == [0, 1]


def test_loras_own_start_is_left_as_it_is(make, rng):
    A = make.tensor(rng, 4, 9)
    state = FedFold().init(Adapter({"m": Pair(A, torch.zeros(7, 4, dtype=torch.float64), 2.0)}))
    for share, led in ((0.0, 3), (0.5, 1), (1.0, 0)):
        task = FedFold(fresh=share).task(state, Peer(0, 3))
        assert torch.equal(task.adapter.pairs["m"].A[:led], A[:led])
        assert not task.adapter.pairs["m"].B.any()
        assert task.base_delta == {}


def test_fresh_directions_are_others_in_every_module_and_round(make, rng):
    pairs, strategy = {name: make.pair(rng, 7, 9, 4, 2.0) for name in "mn"}, FedFold(fresh=1.0)
    one, two = State(Adapter(pairs), 1), State(Adapter(pairs), 2)
    first = strategy.task(one, Peer(0, 3)).adapter.pairs
    assert not torch.equal(first["m"].A, first["n"].A)
    assert not torch.equal(first["m"].A, strategy.task(two, Peer(0, 3)).adapter.pairs["m"].A)
    assert torch.equal(first["m"].A, strategy.task(one, Peer(5, 3)).adapter.pairs["m"].A)


def test_what_the_leading_directions_cannot_see_is_learned_by_fresh_ones(make, np64, rng):
    # D* has the first two singular directions of the target, so that the error is orthogonal to both.
    target = make.spectrum(rng, 9, 8, [5.0, 4.0, 3.0, 2.0])
    W, left = dense(target), {}
    for share in (0.0, 0.5):
        strategy, state = FedFold(fresh=share), State(Adapter({"m": Pair(target.A[:2], target.B[:, :2])}))
        for _ in range(100):
            task = strategy.task(state, Peer(0, 2))
            pair = task.adapter.pairs["m"]
            A, B, base = pair.A, pair.B, dense(task.base_delta["m"]) if task.base_delta else 0
            for _ in range(10):
                G = base + B @ A - W
                A, B = A - 0.05 * B.T @ G, B - 0.05 * G @ A.T
            state = strategy.aggregate(state, [Update(Adapter({"m": Pair(A, B)}))], rng)
        left[share] = float((state.delta("m") - W).norm())
    assert left[0.0] == pytest.approx(13**0.5, rel=1e-9)  # √(3² + 2²), as at the start
    assert left[0.5] < 0.05


def test_who_has_weight_zero_has_no_influence_and_one_client_is_followed(make, np64, rng):
    strategy, state = started(make, rng, 7, 9, 6)
    peers = [Peer(0, 2), Peer(1, 5)]
    updates = make.round(rng, strategy, state, peers, [1.0, 0.0])
    task = strategy.task(state, peers[0])
    want = model(np64, task, updates[0].adapter.pairs["m"])
    for sent in (updates, updates[:1]):
        assert np64.close(strategy.aggregate(state, sent, rng).delta("m"), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_costs_its_rounding(make, np64, rng, dtype):
    strategy = FedFold(fresh=0.0)
    state = State(Adapter({"m": make.pair(rng, 7, 9, 5, 2.0, dtype)}))
    peers, weights = [Peer(0, 2, {}, {"m": 0.7}), Peer(1, 4)], [1.0, 3.0]
    updates = make.round(rng, strategy, state, peers, weights)
    new = strategy.aggregate(state, updates, rng).adapter.pairs["m"]
    assert new.A.dtype == new.B.dtype == dtype
    old = state.adapter.pairs["m"]
    kept = [np64.delta(Pair(old.A[r:], old.B[:, r:], old.scale)) for r in (2, 4)]
    want = sum(
        w / 4 * (np64.delta(u.adapter.pairs["m"]) + k) for w, u, k in zip(weights, updates, kept, strict=True)
    )
    assert np64.close(np64.delta(new), want, 3 * torch.finfo(dtype).eps)


def test_a_capped_download_is_not_called_exact():
    assert FedFold().exact
    assert FedFold(fresh=0.0).exact
    assert not FedFold(energy=0.999).exact


@pytest.mark.parametrize("sent", [1, 3, 9])
def test_what_a_client_began_with_follows_from_its_task_whatever_rank_it_sends(make, np64, rng, sent):
    strategy, state = started(make, rng, 9, 8, 6)
    peers = [Peer(0, 6), Peer(1, 4, {"m": 5})]
    tasks = [strategy.task(state, peer) for peer in peers]
    pairs = [make.pair(rng, 9, 8, sent, 2.0), make.pair(rng, 9, 8, 5, 2.0)]
    updates = [
        Update(Adapter({"m": pair}), w, p) for pair, w, p in zip(pairs, (1.0, 3.0), peers, strict=True)
    ]
    want = sum(w * model(np64, t, p) for w, t, p in zip((0.25, 0.75), tasks, pairs, strict=True))
    assert np64.close(strategy.aggregate(state, updates, rng).delta("m"), want)
