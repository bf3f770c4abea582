"""What a step means in each space, and what would go wrong in another."""

import dataclasses
from typing import Any

import numpy as np
import torch

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import dense
from fedlora.core.base_delta import BaseDelta
from fedlora.core.messages import Peer, State, Update
from fedlora.server_optimizers import FedAdam, FedAvgM, ServerOptimizer
from fedlora.server_optimizers.advance import advance, next_round, without_optimizer
from fedlora.strategies import FedExLoRA, FedIT, FedRotLoRA, FedSVD, FFALoRA, FlexLoRA, FLoRA

LAYERS = {"q": (9, 7), "v": (6, 8)}
WEIGHTS = [3.0, 1.0, 2.0]


def begun(make: Any, strategy: Any, rank: int = 3) -> State:
    return strategy.init(make.adapter(np.random.default_rng(1), LAYERS, rank, 0.7))  # type: ignore[no-any-return]


def rounds(
    make: Any, strategy: Any, optimizer: ServerOptimizer, state: State, ranks: Any = (3, 3, 3), count: int = 3
) -> State:
    peers = [Peer(i, rank) for i, rank in enumerate(ranks)]
    for number in range(count):
        shown, rng = without_optimizer(state), np.random.default_rng(number)
        sent = make.round(rng, strategy, shown, peers, WEIGHTS, 0.2)
        tasks = [strategy.task(shown, peer) for peer in peers]
        state = next_round(strategy, optimizer, state, sent, tasks, rng)
    return state


def turned(state: State, G: torch.Tensor) -> State:
    """The same ΔW with A and B in another basis, G of any kind that has an inverse."""
    inverse = torch.linalg.inv(G)
    pairs = {m: Pair(G @ p.A, p.B @ inverse, p.scale) for m, p in state.adapter.pairs.items()}
    return dataclasses.replace(state, adapter=dataclasses.replace(state.adapter, pairs=pairs))


def test_momentum_of_fedit_s_factors_is_the_same_in_every_basis_that_lasts(make: Any) -> None:
    """Clients that move in one basis as in the other; coordinate-wise steps are not so."""
    G = make.tensor(np.random.default_rng(9), 3, 3)
    peers, found = [Peer(i, 3) for i in range(3)], {}
    for optimizer in (FedAvgM(0.5, 0.9), FedAdam(0.1)):
        state = begun(make, FedIT())
        pair = [state, turned(state, G)]
        for number in range(3):
            sent = make.round(
                np.random.default_rng(number), FedIT(), without_optimizer(pair[0]), peers, WEIGHTS
            )
            also = [
                dataclasses.replace(u, adapter=turned(State(u.adapter), G).adapter) for u in sent
            ]  # the same updates in the other basis
            for at, updates in enumerate((sent, also)):
                tasks = [FedIT().task(without_optimizer(pair[at]), peer) for peer in peers]
                rng = np.random.default_rng(0)
                pair[at] = next_round(FedIT(), optimizer, pair[at], updates, tasks, rng)
        found[type(optimizer)] = max(
            float((pair[0].delta(m) - pair[1].delta(m)).norm() / pair[0].delta(m).norm()) for m in LAYERS
        )
    assert found[FedAvgM] < 1e-11
    assert found[FedAdam] > 0.1


def test_beside_a_frozen_A_momentum_of_B_is_momentum_of_the_update(make: Any, np64: Any) -> None:
    """FFA-LoRA stepped in its factor, and the same strategy said to be stepped in ΔW."""

    class InProducts(FFALoRA):
        server_space = "base_delta"

    optimizer = FedAvgM(0.5, 0.9, rank=9)
    state = begun(make, FFALoRA())
    ends = [state, state]
    for number in range(4):
        for at, strategy in enumerate((FFALoRA(), InProducts())):
            shown, rng = without_optimizer(ends[at]), np.random.default_rng(number)
            peers = [Peer(i, 3) for i in range(3)]
            sent = make.round(rng, strategy, shown, peers, WEIGHTS, 0.2)
            tasks = [strategy.task(shown, peer) for peer in peers]
            ends[at] = next_round(strategy, optimizer, ends[at], sent, tasks, rng)
    for m in LAYERS:
        assert np64.close(ends[0].delta(m), ends[1].delta(m), 1e-12)


def test_clients_that_turn_their_factors_change_no_momentum_of_fedrotlora(make: Any, np64: Any) -> None:
    """The server turns every client into the frame of its own state, which therefore lasts."""
    strategy, optimizer, peers = FedRotLoRA(), FedAvgM(), [Peer(i, 3) for i in range(3)]
    state = begun(make, strategy)
    task = strategy.task(state, peers[0])
    small = make.round(np.random.default_rng(2), strategy, state, peers, WEIGHTS, 0.01)
    rng, also = np.random.default_rng(3), []
    for update in small:
        Q = torch.linalg.qr(make.tensor(rng, 3, 3)).Q
        Q = Q * torch.sign(torch.linalg.det(Q))  # of three dimensions: a rotation
        own = turned(State(update.adapter), Q).adapter
        also.append(dataclasses.replace(update, adapter=own))
    one, other = (
        next_round(strategy, optimizer, state, sent, [task] * 3, np.random.default_rng(0))
        for sent in (small, also)
    )
    assert all(np64.close(other.memory[name], tensor, 1e-9) for name, tensor in one.memory.items())


def test_what_flexlora_loses_of_the_tail_gets_no_momentum(make: Any) -> None:
    """Nobody learns, small ranks cut, σ_i falls by p_i a round: and by no more, whatever the momentum."""
    strategy, peers = FlexLoRA(), [Peer(0, 1), Peer(1, 6), Peer(2, 2)]
    plain = heavy = begun(make, strategy, 6)
    for _ in range(5):
        plain, heavy = (
            next_round(
                strategy,
                optimizer,
                state,
                make.round(np.random.default_rng(0), strategy, without_optimizer(state), peers, WEIGHTS, 0.0),
                [strategy.task(without_optimizer(state), peer) for peer in peers],
                np.random.default_rng(0),
            )
            for state, optimizer in ((plain, None), (heavy, FedAvgM(1.0, 0.9)))
        )
    for m in LAYERS:
        assert float((plain.delta(m) - heavy.delta(m)).norm()) < 1e-12


def test_fedsvd_keeps_its_rank_and_orthonormal_rows_and_the_base_delta_has_the_rest(
    make: Any, np64: Any
) -> None:
    state = rounds(make, FedSVD(), FedAvgM(), begun(make, FedSVD()))
    for m, pair in state.adapter.pairs.items():
        assert pair.rank == 3
        assert np64.orthonormal_rows(pair.A)
        assert m not in state.base_delta  # B moves in the rows of A, and so does its momentum
    elsewhere = make.tensor(np.random.default_rng(4), *state.memory["server/M/q.A"].shape)
    other = dataclasses.replace(state, memory={**state.memory, "server/M/q.A": elsewhere})
    after = rounds(make, FedSVD(), FedAvgM(), other, count=1)
    assert after.base_delta["q"].rank >= 1  # a momentum beyond those rows
    assert after.adapter.pairs["q"].rank == 3


def test_the_step_joins_the_increment_that_clients_are_sent(make: Any) -> None:
    for strategy in (FLoRA(), FedExLoRA()):
        before = rounds(make, strategy, FedAvgM(), begun(make, strategy))
        after = rounds(make, strategy, FedAvgM(), before, count=1)
        grown = BaseDelta.of(before.base_delta).plus(BaseDelta.of(after.base_delta).increment)
        assert grown.digests == BaseDelta.of(after.base_delta).digests


def test_a_momentum_of_few_directions_is_the_best_of_its_rank_and_its_share_is_told(
    make: Any, np64: Any
) -> None:
    strategy, peers = FlexLoRA(), [Peer(i, 3) for i in range(3)]
    state, M = begun(make, strategy), dict.fromkeys(LAYERS, 0.0)
    for number in range(3):
        shown = without_optimizer(state)
        sent = make.round(np.random.default_rng(number), strategy, shown, peers, WEIGHTS, 0.2)
        answered = [(u, strategy.task(shown, u.peer)) for u in sent]
        rng = np.random.default_rng(0)
        after = strategy.aggregate(shown, sent, rng)
        still = strategy.aggregate(
            shown, [dataclasses.replace(u, adapter=t.adapter) for u, t in answered], rng
        )
        state, told = advance(strategy, FedAvgM(rank=2), state, after, answered, rng)
        whole = {m: 0.9 * M[m] + (after.delta(m) - still.delta(m)).numpy() for m in LAYERS}
        M = {m: np64.best(matrix, 2) for m, matrix in whole.items()}
        for m in LAYERS:
            kept = Pair(state.memory[f"server/M/{m}.A"], state.memory[f"server/M/{m}.B"])
            assert np64.close(dense(kept), M[m], 1e-12)
        energy = [sum(float((x**2).sum()) for x in found.values()) for found in (M, whole)]
        assert abs(told["momentum_kept"] - energy[0] / energy[1]) < 1e-12
        assert 0.3 < told["momentum_kept"] < 1


def test_a_head_alone_is_stepped_where_there_are_no_factors(make: Any) -> None:
    head = {"head": torch.zeros(3, dtype=torch.float64)}
    state, moved = FedIT().init(Adapter({}, head)), {"head": torch.ones(3, dtype=torch.float64)}
    for want in (1.0, 1.9, 2.71):
        task = FedIT().task(without_optimizer(state), Peer(0, 1))
        begun_at = task.adapter.extra["head"]
        sent = Update(Adapter({}, {"head": begun_at + moved["head"]}), 1.0, Peer(0, 1))
        before = float(begun_at[0])
        state = next_round(FedIT(), FedAvgM(), state, [sent], [task], np.random.default_rng(0))
        assert abs(float(state.adapter.extra["head"][0]) - before - want) < 1e-12
