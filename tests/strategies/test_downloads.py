"""What strategies cost on the wire, round by round: their formulas, and what a client that sat out gets."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer
from fedlora.rounds.codec import read_task, write_task
from fedlora.strategies import FedExLoRA, FedIT, FedRotLoRA, FedSVD, FFALoRA, FLoRA, RoLoRA

OUT, IN, RANK, CLIENTS, BYTES = 40, 60, 2, 3, 8
UP, BOTH = BYTES * RANK * OUT, BYTES * RANK * (OUT + IN)
EVERY = {k: list(range(CLIENTS)) for k in range(1, 6)}
SOME = {1: [0, 1, 2], 2: [1, 2], 3: [0, 1, 2], 4: [1, 2], 5: [0, 2]}


def downloads(make, strategy, sampled):
    """Bytes of the tensors that client 0 is sent, by round; every client's task must arrive as it is."""
    rng = np.random.default_rng(0)
    pair = Pair(make.tensor(rng, RANK, IN), torch.zeros(OUT, RANK, dtype=torch.float64), 2.0)
    state, known, shelf, seen = strategy.init(Adapter({"m": pair})), {}, {}, {}
    for round, clients in sampled.items():
        peers = [Peer(k, RANK, {}, {"m": 0.5 if k else 2.0}) for k in clients]
        for peer in peers:
            task = strategy.task(state, peer)
            content, known[peer.id] = write_task(task, round, 0, known.get(peer.id), state.round)
            read, _, _, shelf[peer.id] = read_task(content, shelf.get(peer.id))
            assert read.adapter.digest() == task.adapter.digest()
            assert Adapter(read.base_delta).digest() == Adapter(task.base_delta).digest()
            assert (read.train, read.share) == (task.train, task.share)
            if peer.id == 0:
                seen[round] = sum(array.numpy().nbytes for array in content["arrays"].values())
        state = strategy.aggregate(state, make.round(rng, strategy, state, peers, [1.0] * len(peers)), rng)
    return seen


@pytest.mark.parametrize("strategy", [FedIT(), FedRotLoRA()], ids=repr)
def test_both_factors_every_round(make, strategy):
    assert set(downloads(make, strategy, EVERY).values()) == {BOTH}


def test_a_frozen_A_comes_once(make):
    assert list(downloads(make, FFALoRA(), EVERY).values()) == [BOTH, UP, UP, UP, UP]
    assert list(downloads(make, FFALoRA(), SOME).values()) == [BOTH, UP, UP]


def test_a_new_A_comes_when_it_is_new(make):
    assert set(downloads(make, FedSVD(), EVERY).values()) == {BOTH}
    assert list(downloads(make, FedSVD(2), EVERY).values()) == [BOTH, UP, BOTH, UP, BOTH]
    assert downloads(make, FedSVD(0), EVERY) == downloads(make, FFALoRA(), EVERY)


def test_in_turns_only_the_factor_that_changed_comes(make):
    up, across = BYTES * RANK * OUT, BYTES * RANK * IN
    assert list(downloads(make, RoLoRA(), EVERY).values()) == [BOTH, up, across, up, across]
    # Who sat out the round before needs both.
    assert downloads(make, RoLoRA(), SOME) == {1: BOTH, 3: BOTH, 5: BOTH}
    # Even where the factor of the round was frozen when it was last there.
    assert downloads(make, RoLoRA(), {1: [0, 1], 2: [1], 3: [1], 4: [0, 1]}) == {1: BOTH, 4: BOTH}


def test_the_stack_comes_besides_the_fresh_factors(make):
    stacked = BYTES * CLIENTS * RANK * (OUT + IN)
    assert list(downloads(make, FLoRA(), EVERY).values()) == [BOTH] + [BOTH + stacked] * 4
    # All that was merged so far, for who sat out: ranks 6 + 4 by round 3, twice that by round 5.
    found = downloads(make, FLoRA(), SOME)
    assert [found[3] - BOTH, found[5] - BOTH] == [BYTES * rank * (OUT + IN) for rank in (10, 20)]


def test_the_residual_is_one_client_smaller_than_the_stack(make):
    residual = BYTES * (CLIENTS - 1) * RANK * (OUT + IN)
    assert list(downloads(make, FedExLoRA(), EVERY).values()) == [BOTH] + [BOTH + residual] * 4
    found = downloads(make, FedExLoRA(), SOME)
    assert [found[3] - BOTH, found[5] - BOTH] == [BYTES * rank * (OUT + IN) for rank in (6, 12)]


@pytest.mark.parametrize("strategy", [FLoRA(), FedExLoRA()], ids=repr)
def test_a_sum_that_has_grown_over_the_layer_never_costs_more_than_the_layer(make, strategy):
    found = list(downloads(make, strategy, {k: [0, 1, 2] for k in range(1, 21)}).values())
    dense = BYTES * OUT * IN
    assert max(found) <= BOTH + dense + BYTES * OUT * OUT
    assert all(now <= BOTH + dense for _, now in pairwise(found[10:]))
