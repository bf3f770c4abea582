import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, State
from fedlora.errors import IncompatibleUpdates

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)


def test_inputs_are_not_mutated(strategy, state, updates, peers, aggregate):
    before = [state.digest(), *(update.adapter.digest() for update in updates)]
    aggregate(strategy, state, updates)
    for one in peers:
        strategy.task(state, one)
    assert [state.digest(), *(update.adapter.digest() for update in updates)] == before


def test_a_client_that_trains_its_task_in_place_leaves_the_state_alone(strategy, state, peers):
    # A head trained in place would go on from client to client (peers.md, 5).
    before = state.digest()
    for _, tensor in strategy.task(state, peers[0]).adapter.tensors():
        tensor.add_(1.0)
    assert state.digest() == before


@pytest.mark.parametrize("clients", [1, 3])
def test_a_state_does_not_share_memory_with_the_updates_it_came_from(
    strategy, state, updates, clients, aggregate
):
    new = aggregate(strategy, state, updates[:clients])
    before = new.digest()
    for _, tensor in updates[0].adapter.tensors():
        tensor.add_(1.0)
    assert new.digest() == before


def test_a_state_carries_no_autograd_graph(strategy, state, updates, aggregate):
    for update in updates:
        for _, tensor in update.adapter.tensors():
            tensor.requires_grad_()
    assert not any(t.requires_grad for t in aggregate(strategy, state, updates).pack()[0].values())


@DTYPES
def test_names_shapes_dtypes_and_scales_are_kept(strategy, state, updates, dtype, aggregate, layers):
    new = aggregate(strategy, state, updates)
    for m, pair in new.adapter.pairs.items():
        assert pair.shape == layers[m]
        assert pair.A.dtype == pair.B.dtype == dtype
        assert pair.scale == state.adapter.pairs[m].scale == 0.7
    assert list(new.adapter.pairs) == list(state.adapter.pairs)
    for m, pair in (*new.base_delta.items(), *new.base_delta.increment.items()):
        assert pair.shape == layers[m]
        assert (pair.A.dtype, pair.scale) == (dtype, 1.0)
    kept = {name: (t.shape, t.dtype) for name, t in state.adapter.extra.items()}
    assert {name: (t.shape, t.dtype) for name, t in new.adapter.extra.items()} == kept


@DTYPES
def test_low_precision_costs_its_own_rounding_and_no_more(
    strategy, make, np64, rng, state, peers, weights, dtype, aggregate, same_model
):
    def wide(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
        return dict(double(Adapter(pairs)).pairs)

    def double(adapter: Adapter) -> Adapter:
        return adapter.with_tensors({name: tensor.double() for name, tensor in adapter.tensors()})

    def doubled(state: State) -> State:
        memory = {n: t.double() if t.is_floating_point() else t for n, t in state.memory.items()}
        return dataclasses.replace(
            state, adapter=double(state.adapter), base_delta=wide(state.base_delta), memory=memory
        )

    # In the state's scale: a frozen factor in another has a rounding of its own, by which it is recognised.
    peers = [dataclasses.replace(one, scales={}) for one in peers]
    updates = make.round(rng, strategy, state, peers, weights)
    new = doubled(aggregate(strategy, state, updates))
    want = aggregate(
        strategy, doubled(state), [dataclasses.replace(u, adapter=double(u.adapter)) for u in updates]
    )
    dtypes = {tensor.dtype for tensor in state.pack()[0].values() if tensor.is_floating_point()}
    assert same_model(np64, new, want, max(1e-12, 3 * max(torch.finfo(each).eps for each in dtypes)))


@DTYPES
def test_a_state_survives_a_checkpoint_and_the_run_goes_on_alike(
    strategy, make, state, updates, peers, weights, dtype, aggregate
):
    new = aggregate(strategy, state, updates)
    tensors, header = new.pack()
    back = State.unpack(load(save(tensors)), header)
    assert (back.digest(), back.round, back.seed) == (new.digest(), new.round, new.seed)

    def go_on(state: State) -> str:
        sent = make.round(np.random.default_rng(5), strategy, state, peers, weights)
        return aggregate(strategy, state, sent).digest()

    assert go_on(back) == go_on(new)


@DTYPES
def test_the_same_inputs_give_the_same_bits(strategy, make, state, peers, weights, dtype, aggregate):
    def run() -> str:
        now = state
        for r in range(3):
            now = aggregate(
                strategy, now, make.round(np.random.default_rng(r), strategy, now, peers, weights)
            )
        return now.digest()

    assert run() == run()


def test_what_is_random_follows_the_seed_of_the_state(strategy, make, state, peers, weights, aggregate):
    """And nothing else: no state of torch's or numpy's own generators."""

    def run(noise: int) -> str:
        torch.manual_seed(noise)
        np.random.seed(noise)
        sent = make.round(np.random.default_rng(1), strategy, state, peers, weights)
        return aggregate(strategy, state, sent).digest()

    assert run(1) == run(2)


def test_a_coarser_update_does_not_lower_the_precision_of_the_state(strategy, state, updates, with_pair):
    task = strategy.task(state, Peer(0, 1))
    if task.share != {"A", "B"} or not task.adapter.pairs:
        pytest.skip("a frozen factor in another dtype is another factor")
    pair = updates[1].adapter.pairs["wide"]
    updates[1] = with_pair(updates[1], "wide", Pair(pair.A.bfloat16(), pair.B.bfloat16(), pair.scale))
    after = strategy.aggregate(state, updates, None)
    assert after.adapter.pairs["wide"].A.dtype == state.adapter.pairs["wide"].A.dtype


@pytest.mark.parametrize("low", [1, 3])
def test_a_round_of_one_smaller_rank_never_shrinks_the_state_in_silence(
    strategy, make, rng, state, low, aggregate, outcome, largest
):
    # Clients 8 and 9 alone may be sampled; who was not must find in the next round what it had.
    few = [Peer(8, low), Peer(9, low)]
    new = outcome(lambda: aggregate(strategy, state, make.round(rng, strategy, state, few, [1.0, 1.0])))
    if isinstance(new, IncompatibleUpdates):
        assert not strategy.mixed_ranks
        assert "rank" in str(new)
        return
    task = strategy.task(new, Peer(1, largest))
    if not task.adapter.pairs:
        return  # no pair is trained in this round
    assert {pair.rank for pair in task.adapter.pairs.values()} == {largest}
    # Every direction can learn: its A row or its B column is not zero.
    for pair in task.adapter.pairs.values():
        assert (pair.A.norm(dim=1) + pair.B.norm(dim=0) > 0).all()
