"""What every strategy promises, whichever it is: `fedlora.strategies.__all__` decides who is held to it."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fedlora import strategies
from fedlora.adapter import Adapter, Pair
from fedlora.algebra import pad
from fedlora.errors import FedLoraError, IncompatibleUpdates
from fedlora.protocol import BOTH, Peer, State, Update
from fedlora.strategy import cut

STRATEGIES = [getattr(strategies, name) for name in strategies.__all__]
LAYERS = {"tall": (11, 4), "square": (6, 6), "wide": (5, 9)}
LARGEST = 12  # over the smaller side of every layer
ALPHA = 16.0
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)


def peer(id: int, rank: int, **ranks: int) -> Peer:
    """A peer of scales alpha / r, r its own rank of each module."""
    return Peer(id, rank, ranks, {m: ALPHA / ranks.get(m, rank) for m in LAYERS})


# Ids out of order; peers of one rank hold other scales too, which no strategy may ignore.
ONE_RANK = [Peer(7, LARGEST), Peer(2, LARGEST, {}, dict.fromkeys(LAYERS, 3.0)), Peer(5, LARGEST)]
MIXED = [peer(7, LARGEST), peer(2, 1), peer(5, 3, tall=2, wide=LARGEST), peer(3, 6, square=5)]


@pytest.fixture(params=STRATEGIES, ids=strategies.__all__)
def strategy(request):
    return request.param()


@pytest.fixture
def peers(strategy):
    return MIXED if strategy.mixed_ranks else ONE_RANK


@pytest.fixture
def weights(peers):
    return [3.0, 1.0, 2.0, 5.0][: len(peers)]


@pytest.fixture
def state(strategy, make, rng, dtype):
    return strategy.init(make.adapter(rng, LAYERS, LARGEST, 0.7, dtype))


@pytest.fixture
def dtype():
    return torch.float64


@pytest.fixture
def updates(strategy, make, rng, state, peers, weights):
    return make.round(rng, strategy, state, peers, weights)


def aggregate(strategy, state, updates) -> State:
    return strategy.aggregate(state, updates, np.random.default_rng(11))


def outcome(call):
    """What a call returns, or the refusal that it raises."""
    try:
        return call()
    except IncompatibleUpdates as refusal:
        return refusal


def same_model(np64, one: State, two: State, tol: float = 1e-12) -> bool:
    """Equal effective updates and extras, whatever the factors."""
    deltas = all(np64.close(one.delta(m), two.delta(m), tol) for m in LAYERS)
    extras = one.adapter.extra.keys() == two.adapter.extra.keys()
    return (
        deltas
        and extras
        and all(np64.close(t, two.adapter.extra[n], tol) for n, t in one.adapter.extra.items())
    )


def weighted(updates, weights) -> list[Update]:
    return [dataclasses.replace(u, weight=w) for u, w in zip(updates, weights, strict=True)]


def with_pair(update: Update, module: str, pair: Pair) -> Update:
    pairs = {**update.adapter.pairs, module: pair}
    return dataclasses.replace(update, adapter=Adapter(pairs, update.adapter.extra))


# --- what it declares ---------------------------------------------------------------------------------------


def test_it_is_a_frozen_dataclass_that_states_its_three_facts(strategy):
    assert dataclasses.is_dataclass(strategy)
    assert type(strategy).__dataclass_params__.frozen
    assert {type(getattr(strategy, fact)) for fact in ("mixed_ranks", "linear", "exact")} == {bool}
    assert strategy == type(strategy)()


def test_a_task_trains_and_shares_some_of_the_two_factors(strategy, state, peers):
    for one in peers:
        task = strategy.task(state, one)
        assert task.train
        assert task.share <= task.train <= BOTH


def test_a_task_has_the_ranks_and_scales_of_its_peer(strategy, state, peers):
    for one in peers:
        pairs = strategy.task(state, one).adapter.pairs
        assert list(pairs) == sorted(LAYERS)
        for m, pair in pairs.items():
            assert pair.rank == one.ranks.get(m, one.rank)
            assert pair.scale == one.scales.get(m, state.adapter.pairs[m].scale)
            assert pair.shape == LAYERS[m]


def test_a_peer_of_a_larger_rank_than_the_run_knows_gets_it_or_is_refused_by_name(strategy, state):
    found = outcome(lambda: strategy.task(state, Peer(9, LARGEST + 1)))
    if isinstance(found, IncompatibleUpdates):
        assert re.search(rf"client 9 .*rank {LARGEST + 1} .*'square'", str(found))
    else:
        assert {pair.rank for pair in found.adapter.pairs.values()} == {LARGEST + 1}


@pytest.mark.parametrize("rank", [-1, 0])
def test_a_peer_without_a_rank_is_refused_by_name(strategy, state, rank):
    with pytest.raises(FedLoraError, match=r"client 9"):
        strategy.task(state, Peer(9, rank))
    with pytest.raises(FedLoraError, match=r"client 9.*'wide'"):
        strategy.task(state, Peer(9, 2, {"wide": rank}))


# --- what the numbers are -----------------------------------------------------------------------------------


def test_the_order_of_updates_changes_no_bit(strategy, state, updates):
    want = aggregate(strategy, state, updates).adapter.digest()
    for order in itertools.permutations(updates):
        assert aggregate(strategy, state, order).adapter.digest() == want


def test_the_unit_of_weights_changes_nothing(strategy, np64, state, updates, weights):
    base = aggregate(strategy, state, updates)
    doubled = aggregate(strategy, state, weighted(updates, [2 * w for w in weights]))
    assert doubled.adapter.digest() == base.adapter.digest()
    for unit in (1e-6, 0.37, 1e5):
        assert same_model(
            np64, aggregate(strategy, state, weighted(updates, [unit * w for w in weights])), base
        )


@pytest.mark.parametrize("who", range(3))
def test_one_client_with_all_the_weight_is_the_result(strategy, np64, state, updates, who):
    weights = [float(i == who) for i in range(len(updates))]
    for sent in (weighted(updates, weights), [updates[who]]):
        new = aggregate(strategy, state, sent)
        for m in LAYERS:
            assert np64.close(new.delta(m), np64.delta(updates[who].adapter.pairs[m]))
        for name, tensor in updates[who].adapter.extra.items():
            assert np64.close(new.adapter.extra[name], tensor, 1e-14)


@pytest.mark.parametrize("who", range(3))
def test_a_client_of_weight_zero_has_no_influence(
    strategy, make, np64, rng, state, peers, weights, updates, who
):
    weights = [w * (i != who) for i, w in enumerate(weights)]
    updates = weighted(updates, weights)
    loud = Update(make.trained(rng, strategy.task(state, peers[who]), step=100.0), 0.0, peers[who])
    without = aggregate(strategy, state, [u for i, u in enumerate(updates) if i != who])
    for silent in (updates[who], loud):
        sent = [silent if i == who else u for i, u in enumerate(updates)]
        assert same_model(np64, aggregate(strategy, state, sent), without)


def test_exact_means_the_weighted_mean_of_effective_updates(strategy, np64, state, updates):
    new = aggregate(strategy, state, updates)
    errors = [np.linalg.norm(new.delta(m).numpy() - np64.mean(updates, m)) for m in LAYERS]
    assert all(error < 1e-10 for error in errors) == strategy.exact


def test_linear_means_the_weighted_mean_of_what_was_sent(strategy, np64, state, peers, updates, weights):
    new, share = aggregate(strategy, state, updates), strategy.task(state, peers[0]).share
    power = 1 / len(share)  # a scale is absorbed by what is sent: all of it on one factor, its root on two
    fits = []
    for m, pair in new.adapter.pairs.items():
        for factor in share:
            sent = [u.adapter.pairs[m] for u in updates]
            if max(p.rank for p in sent) > pair.rank:
                fits.append(False)
                continue
            mean = sum(
                w / sum(weights) * (p.scale / pair.scale) ** power * getattr(pad(p, pair.rank), factor)
                for p, w in zip(sent, weights, strict=True)
            )
            found = getattr(pair, factor)
            fits.append(found.shape == mean.shape and np64.close(found, mean, 1e-12))
    assert all(fits) == strategy.linear


def test_extras_are_averaged_with_the_weights(strategy, np64, state, updates, weights):
    for name, tensor in aggregate(strategy, state, updates).adapter.extra.items():
        mean = sum(w * u.adapter.extra[name] for w, u in zip(weights, updates, strict=True)) / sum(weights)
        assert np64.close(tensor, mean, 1e-14)


def test_several_rounds_stay_finite_and_count_up(strategy, make, rng, state, peers, weights):
    for done in range(1, 6):
        state = aggregate(strategy, state, make.round(rng, strategy, state, peers, weights, step=0.1))
        assert state.round == done
        assert all(tensor.isfinite().all() for _, tensor in state.adapter.tensors())


# --- what is kept -------------------------------------------------------------------------------------------


def test_inputs_are_not_mutated(strategy, state, updates, peers):
    before = [state.adapter.digest(), *(update.adapter.digest() for update in updates)]
    aggregate(strategy, state, updates)
    for one in peers:
        strategy.task(state, one)
    assert [state.adapter.digest(), *(update.adapter.digest() for update in updates)] == before


def test_a_client_that_trains_its_task_in_place_leaves_the_state_alone(strategy, state, peers):
    # A head trained in place would go on from client to client (peers.md, 5).
    before = state.adapter.digest()
    for _, tensor in strategy.task(state, peers[0]).adapter.tensors():
        tensor.add_(1.0)
    assert state.adapter.digest() == before


@pytest.mark.parametrize("clients", [1, 3])
def test_a_state_does_not_share_memory_with_the_updates_it_came_from(strategy, state, updates, clients):
    new = aggregate(strategy, state, updates[:clients])
    before = new.adapter.digest()
    for _, tensor in updates[0].adapter.tensors():
        tensor.add_(1.0)
    assert new.adapter.digest() == before


def test_a_state_carries_no_autograd_graph(strategy, state, updates):
    for update in updates:
        for _, tensor in update.adapter.tensors():
            tensor.requires_grad_()
    assert not any(t.requires_grad for _, t in aggregate(strategy, state, updates).adapter.tensors())


@DTYPES
def test_names_shapes_dtypes_and_scales_are_kept(strategy, state, updates, dtype):
    new = aggregate(strategy, state, updates)
    for m, pair in new.adapter.pairs.items():
        assert pair.shape == LAYERS[m]
        assert pair.A.dtype == pair.B.dtype == dtype
        assert pair.scale == state.adapter.pairs[m].scale == 0.7
    assert list(new.adapter.pairs) == list(state.adapter.pairs)
    kept = {name: (t.shape, t.dtype) for name, t in state.adapter.extra.items()}
    assert {name: (t.shape, t.dtype) for name, t in new.adapter.extra.items()} == kept


@DTYPES
def test_low_precision_costs_its_own_rounding_and_no_more(strategy, np64, state, updates, dtype):
    def double(adapter: Adapter) -> Adapter:
        pairs = {m: Pair(p.A.double(), p.B.double(), p.scale) for m, p in adapter.pairs.items()}
        return Adapter(pairs, {name: tensor.double() for name, tensor in adapter.extra.items()})

    new = aggregate(strategy, state, updates)
    wide = [dataclasses.replace(u, adapter=double(u.adapter)) for u in updates]
    want = aggregate(strategy, State(double(state.adapter)), wide)
    wider = State(double(new.adapter))
    assert same_model(np64, wider, want, max(1e-12, 3 * torch.finfo(dtype).eps))


@DTYPES
def test_a_state_survives_a_checkpoint_and_the_run_goes_on_alike(
    strategy, make, state, updates, peers, weights, dtype
):
    new = aggregate(strategy, state, updates)
    tensors, header = new.pack()
    back = State.unpack(load(save(tensors)), header)
    assert (back.adapter.digest(), back.round) == (new.adapter.digest(), new.round)

    def go_on(state: State) -> str:
        sent = make.round(np.random.default_rng(5), strategy, state, peers, weights)
        return aggregate(strategy, state, sent).adapter.digest()

    assert go_on(back) == go_on(new)


@DTYPES
def test_the_same_inputs_give_the_same_bits(strategy, make, state, peers, weights, dtype):
    def run() -> str:
        now = state
        for r in range(3):
            now = aggregate(
                strategy, now, make.round(np.random.default_rng(r), strategy, now, peers, weights)
            )
        return now.adapter.digest()

    assert run() == run()


# --- what is refused ----------------------------------------------------------------------------------------


def test_no_updates_are_refused(strategy, state):
    with pytest.raises(IncompatibleUpdates, match=f"{type(strategy).__name__}: expected at least one update"):
        aggregate(strategy, state, [])


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused_by_client(strategy, state, updates, weight):
    updates[1] = dataclasses.replace(updates[1], weight=weight)
    with pytest.raises(IncompatibleUpdates, match=f"{type(strategy).__name__}: client 2 .*{weight}"):
        aggregate(strategy, state, updates)


def test_weights_that_are_all_zero_are_refused(strategy, state, updates):
    with pytest.raises(IncompatibleUpdates, match="above 0"):
        aggregate(strategy, state, weighted(updates, [0.0] * len(updates)))


def test_a_missing_module_is_refused_by_client_and_name(strategy, state, updates):
    pairs = {m: pair for m, pair in updates[1].adapter.pairs.items() if m != "square"}
    updates[1] = dataclasses.replace(updates[1], adapter=Adapter(pairs, updates[1].adapter.extra))
    with pytest.raises(IncompatibleUpdates, match=r"client 2 .*missing \['square'\]"):
        aggregate(strategy, state, updates)


def test_an_unknown_module_is_refused_by_client_and_name(strategy, state, updates):
    updates[1] = with_pair(updates[1], "lm_head", updates[1].adapter.pairs["square"])
    with pytest.raises(IncompatibleUpdates, match=r"client 2 .*unknown \['lm_head'\]"):
        aggregate(strategy, state, updates)


def test_a_module_missing_everywhere_is_refused_too(strategy, state, updates):
    short = [
        dataclasses.replace(
            u, adapter=Adapter({m: p for m, p in u.adapter.pairs.items() if m != "tall"}, u.adapter.extra)
        )
        for u in updates
    ]
    with pytest.raises(IncompatibleUpdates, match=r"client 2 .*missing \['tall'\]"):
        aggregate(strategy, state, short)


@pytest.mark.parametrize("turn", ["transposed", "one output more", "one input less"])
def test_another_shape_is_refused_by_client_and_module(strategy, state, updates, turn):
    pair = updates[1].adapter.pairs["wide"]
    A, B = {
        "transposed": (pair.B.T, pair.A.T),
        "one output more": (pair.A, torch.cat([pair.B, pair.B[:1]])),
        "one input less": (pair.A[:, 1:], pair.B),
    }[turn]
    updates[1] = with_pair(updates[1], "wide", Pair(A, B, pair.scale))
    with pytest.raises(IncompatibleUpdates, match=r"client 2 .*'wide'"):
        aggregate(strategy, state, updates)


@pytest.mark.parametrize(
    "extra", [{}, {"head.bias": torch.tensor(0.5, dtype=torch.float64)}, {"other": torch.ones(2)}]
)
def test_other_extras_are_refused_by_client_and_name(strategy, state, updates, extra):
    updates[1] = dataclasses.replace(updates[1], adapter=Adapter(updates[1].adapter.pairs, extra))
    with pytest.raises(IncompatibleUpdates, match=r"client 2 .*missing .*'head.weight'"):
        aggregate(strategy, state, updates)


@pytest.mark.parametrize("shape", [(3, 2), (2, 1), (1, 3), (6,), ()])
def test_extras_of_another_shape_are_refused_by_client_and_name(strategy, state, updates, shape):
    extra = {**updates[1].adapter.extra, "head.weight": torch.zeros(shape, dtype=torch.float64)}
    updates[1] = dataclasses.replace(updates[1], adapter=Adapter(updates[1].adapter.pairs, extra))
    with pytest.raises(IncompatibleUpdates, match=r"client 2 .*'head.weight'"):
        aggregate(strategy, state, updates)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_client_that_diverged_is_refused_by_name(strategy, state, updates, factor, value):
    pair = updates[1].adapter.pairs["wide"]
    broken = {"A": pair.A.clone(), "B": pair.B.clone()}
    broken[factor][0, 0] = value
    updates[1] = with_pair(updates[1], "wide", Pair(broken["A"], broken["B"], pair.scale))
    with pytest.raises(IncompatibleUpdates, match=r"client 2.*'wide'"):
        aggregate(strategy, state, updates)


def test_a_head_that_diverged_is_refused_by_client_and_name(strategy, state, updates):
    updates[1].adapter.extra["head.weight"][0, 0] = math.nan
    with pytest.raises(IncompatibleUpdates, match=r"client 2.*'head.weight'"):
        aggregate(strategy, state, updates)


def test_a_coarser_update_does_not_lower_the_precision_of_the_state(strategy, state, updates):
    if strategy.task(state, Peer(0, 1)).share != {"A", "B"}:
        pytest.skip("a frozen factor in another dtype is another factor")
    pair = updates[1].adapter.pairs["wide"]
    updates[1] = with_pair(updates[1], "wide", Pair(pair.A.bfloat16(), pair.B.bfloat16(), pair.scale))
    after = strategy.aggregate(state, updates, None)
    assert after.adapter.pairs["wide"].A.dtype == state.adapter.pairs["wide"].A.dtype


def test_mixed_ranks_are_combined_or_refused_with_a_way_out(strategy, make, rng, state):
    def run() -> State:
        return aggregate(strategy, state, make.round(rng, strategy, state, MIXED, [1.0] * len(MIXED)))

    if strategy.mixed_ranks:
        assert run().round == 1
        return
    with pytest.raises(IncompatibleUpdates, match=r"client \d .*rank \d+ .*expected \d+.*; use .*FlexLoRA"):
        run()


@pytest.mark.parametrize("low", [1, 3])
def test_a_round_of_one_smaller_rank_never_shrinks_the_state_in_silence(strategy, make, rng, state, low):
    # Clients 8 and 9 alone may be sampled; who was not must find in the next round what it had.
    few = [Peer(8, low), Peer(9, low)]
    new = outcome(lambda: aggregate(strategy, state, make.round(rng, strategy, state, few, [1.0, 1.0])))
    if isinstance(new, IncompatibleUpdates):
        assert not strategy.mixed_ranks
        assert "rank" in str(new)
        return
    task = strategy.task(new, Peer(1, LARGEST))
    assert {pair.rank for pair in task.adapter.pairs.values()} == {LARGEST}
    # Every direction can learn: its A row or its B column is not zero.
    for pair in task.adapter.pairs.values():
        assert (pair.A.norm(dim=1) + pair.B.norm(dim=0) > 0).all()


def test_clients_by_hand_without_peers_are_named_by_position(strategy, state, updates):
    nameless = [dataclasses.replace(u, peer=None) for u in updates]
    assert aggregate(strategy, state, nameless).round == 1
    nameless[1] = dataclasses.replace(nameless[1], adapter=Adapter({}, nameless[1].adapter.extra))
    with pytest.raises(IncompatibleUpdates, match=r"client #1"):
        aggregate(strategy, state, nameless)


def test_a_cut_is_the_first_directions_in_the_scale_of_the_peer(make, np64, rng):
    whole = make.adapter(rng, LAYERS, LARGEST, 0.7)
    part = cut(whole, Peer(1, 4, {"wide": 2}, {"tall": 3.0}))
    for m, rank in (("tall", 4), ("square", 4), ("wide", 2)):
        pair = whole.pairs[m]
        assert torch.equal(part.pairs[m].A, pair.A[:rank])
        assert np64.close(np64.delta(part.pairs[m]), 0.7 * (pair.B[:, :rank] @ pair.A[:rank]), 1e-14)
    assert [part.pairs[m].scale for m in ("square", "tall", "wide")] == [0.7, 3.0, 0.7]
