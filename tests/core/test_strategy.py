"""What strategies share: directions enough for a peer, and a mean of one factor beside a frozen other."""

from dataclasses import replace

import pytest
import torch

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, State, Update
from fedlora.core.strategy import grow_rank
from fedlora.errors import IncompatibleUpdates
from fedlora.strategies import FedIT

LAYERS = {"a": (6, 9), "b": (5, 4)}


def test_room_is_made_with_fresh_orthonormal_rows_and_leaves_the_update(make, np64, rng):
    state = State(make.adapter(rng, LAYERS, 2, 0.5), 4, seed=3)
    room = grow_rank(state, Peer(1, 3, {"b": 7}))
    assert {m: pair.rank for m, pair in room.pairs.items()} == {"a": 3, "b": 7}
    for m, pair in room.pairs.items():
        old = state.adapter.pairs[m]
        assert pair.scale == 0.5
        assert np64.close(np64.delta(pair), np64.delta(old))
        assert torch.equal(pair.A[:2], old.A)
        assert not pair.B[:, 2:].any()
        assert np64.close(pair.A[2:].norm(dim=1), torch.ones(pair.rank - 2), 1e-12)
    assert (room.pairs["a"].A[2:] @ state.adapter.pairs["a"].A.T).abs().max() < 1e-12
    assert room.extra.keys() == state.adapter.extra.keys()


def test_room_is_the_same_for_all_clients_of_a_round_and_new_in_the_next(make, rng):
    state = State(make.adapter(rng, {**LAYERS, "c": (6, 9)}, 2), 4, seed=3)

    def row(state, id=1, rank=3, module="a"):
        return grow_rank(state, Peer(id, rank)).pairs[module].A[2]

    assert torch.equal(row(state), row(state, id=2))
    torch.testing.assert_close(row(state), row(state, rank=4), rtol=1e-12, atol=1e-12)
    for other in (replace(state, seed=4), replace(state, round=5)):
        assert not torch.equal(row(state), row(other))
    same = replace(state, adapter=Adapter({m: replace(state.adapter.pairs["a"]) for m in ("a", "c")}, {}))
    assert not torch.equal(row(same), row(same, module="c"))


def test_no_room_is_made_where_there_is_enough(make, rng):
    state = State(make.adapter(rng, LAYERS, 4))
    assert grow_rank(state, Peer(1, 4, {"b": 2})).digest() == state.adapter.digest()


@pytest.mark.parametrize("factor", ["A", "B"])
def test_the_mean_of_one_factor_beside_a_frozen_one_is_that_of_the_products(make, np64, rng, factor):
    state = State(make.adapter(rng, LAYERS, 4, 0.5))
    updates = []
    for id, (rank, weight) in enumerate([(4, 0.5), (2, 0.2), (3, 0.3)]):
        pairs = {}
        for m, old in state.adapter.pairs.items():
            A, B = old.A[:rank], old.B[:, :rank]
            moved = (
                {"A": A + make.tensor(rng, *A.shape)}
                if factor == "A"
                else {"B": B + make.tensor(rng, *B.shape)}
            )
            pairs[m] = Pair(**({"A": A, "B": B} | moved), scale=0.5)
        updates.append(Update(Adapter(pairs), weight, Peer(id, rank)))
    found = FedIT().mean_of(factor, state, updates, [u.weight for u in updates])
    frozen = "B" if factor == "A" else "A"
    for m, pair in found.items():
        assert np64.close(np64.delta(pair), np64.mean(updates, m))
        assert torch.equal(getattr(pair, frozen), getattr(state.adapter.pairs[m], frozen))
    touched = updates[1].adapter.pairs["b"]
    broken = {frozen: torch.nextafter(getattr(touched, frozen), torch.tensor(9.0, dtype=torch.float64))}
    updates[1].adapter.pairs["b"] = replace(touched, **broken)
    with pytest.raises(IncompatibleUpdates, match=rf"client 1 sent another {frozen} for 'b'"):
        FedIT().mean_of(factor, state, updates, [u.weight for u in updates])
