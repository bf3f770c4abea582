"""What a server optimizer does to every strategy that names a space for it."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from fedlora.core.messages import State
from fedlora.server_optimizers import FedAdam, FedAvgM
from fedlora.server_optimizers.advance import OWN, next_round, without_optimizer

PLAIN = FedAvgM(lr=1.0, momentum=0.0)
HEAVY = FedAvgM(lr=0.7, momentum=0.9, rank=99)


@pytest.fixture
def done():
    """From here three rounds see every stage: SLoRA's hand-over, both of RoLoRA's turns, FedMS's gate."""
    return 1


@pytest.fixture
def stepped(strategy):
    if not strategy.server_space:
        pytest.skip("refused with every server optimizer")

    def step(optimizer, before, updates):
        shown = without_optimizer(before)
        tasks = [strategy.task(shown, update.peer) for update in updates]
        return next_round(strategy, optimizer, before, updates, tasks, np.random.default_rng(11))

    return step


@pytest.fixture
def optimizers(strategy):
    return [HEAVY, FedAdam(lr=0.1)] if strategy.server_space == "factors" else [HEAVY]


@pytest.fixture
def on_the_way(strategy, stepped, make, state, peers, weights):
    """From an optimizer to the state after one more round with it, so that it remembers something."""

    def go(optimizer):
        sent = make.round(np.random.default_rng(5), strategy, state, peers, weights, 0.3)
        return stepped(optimizer, state, sent)

    return go


def test_rate_1_without_momentum_is_the_strategy_to_the_bit(stepped, state, updates, aggregate, strategy):
    assert stepped(PLAIN, state, updates).digest() == aggregate(strategy, state, updates).digest()


def test_the_step_is_that_of_the_dense_definition(strategy, stepped, make, state, peers, weights, layers):
    """ΔW ← F(x, u) + (η − 1) Δ + η β M, with Δ = F(x, u) − F(x, u₀), by plain matrices; the head alike."""
    if strategy.server_space == "factors":
        pytest.skip("it is stepped in the factors' own coordinates")
    M, now = dict.fromkeys([*layers, "head.weight"], 0.0), state
    for seed in range(3):
        shown = without_optimizer(now)
        sent = make.round(np.random.default_rng(seed), strategy, shown, peers, weights, 0.3)
        tasks = [strategy.task(shown, update.peer) for update in sent]
        idle = [dataclasses.replace(u, adapter=t.adapter) for u, t in zip(sent, tasks, strict=True)]
        after, still = (strategy.aggregate(shown, u, np.random.default_rng(11)) for u in (sent, idle))
        now = stepped(HEAVY, now, sent)
        for name in M:
            new, end, begun = (
                (s.adapter.extra[name] if name == "head.weight" else s.delta(name)).numpy()
                for s in (now, after, still)
            )
            # Values on a sparse mask are no factors: while those are trained, the head alone is stepped.
            change = end - begun if tasks[0].adapter.pairs or name == "head.weight" else 0.0
            want = end + (0.7 - 1) * change + 0.7 * 0.9 * M[name]
            assert np.allclose(new, want, rtol=0, atol=1e-9 * max(1, np.abs(want).max())), name
            M[name] = 0.9 * M[name] + change


def test_factors_are_stepped_each_in_its_own_coordinates(strategy, stepped, make, state, peers, weights):
    if strategy.server_space != "factors":
        pytest.skip("it is stepped in ΔW")
    M, now = dict[str, torch.Tensor](), state
    for seed in range(3):
        shown = without_optimizer(now)
        sent = make.round(np.random.default_rng(seed), strategy, shown, peers, weights, 0.3)
        tasks = [strategy.task(shown, u.peer) for u in sent]
        idle = [dataclasses.replace(u, adapter=t.adapter) for u, t in zip(sent, tasks, strict=True)]
        after, still = (strategy.aggregate(shown, u, np.random.default_rng(11)) for u in (sent, idle))
        now, shared = stepped(HEAVY, now, sent), {name for task in tasks for name in task.shared()}
        idle_tensors, new = dict(still.adapter.tensors()), dict(now.adapter.tensors())
        for name, tensor in after.adapter.tensors():
            if name not in shared:  # frozen, or a client's own
                assert torch.equal(new[name], tensor), name
                continue
            change, past = tensor - idle_tensors[name], M.get(name, torch.zeros_like(tensor))
            assert torch.allclose(new[name], tensor - 0.3 * change + 0.63 * past, rtol=0, atol=1e-10), name
            M[name] = 0.9 * past + change


def test_a_client_of_weight_zero_moves_nothing_and_is_remembered_nowhere(
    stepped, on_the_way, optimizers, strategy, make, peers, weights, same_model, np64, weighted
):
    for optimizer in optimizers:
        before = on_the_way(optimizer)
        sent = make.round(np.random.default_rng(3), strategy, without_optimizer(before), peers, weights)
        silent = weighted(sent, [0.0, *weights[1:]])
        with_it, without = stepped(optimizer, before, silent), stepped(optimizer, before, sent[1:])
        assert same_model(np64, without_optimizer(with_it), without_optimizer(without))
        for name, tensor in without.memory.items():
            if name.startswith(OWN) and "/M/" not in name:  # the factors of M may be turned
                assert np64.close(with_it.memory[name], tensor, 1e-9), name


def test_a_round_in_which_nobody_learns_is_the_strategy_s_own(
    stepped, optimizers, strategy, state, peers, weights, aggregate, same_model, np64, make
):
    idle = make.round(np.random.default_rng(3), strategy, state, peers, weights, 0.0)
    for optimizer in optimizers:
        now = without_optimizer(stepped(optimizer, state, idle))
        assert same_model(np64, now, aggregate(strategy, state, idle), 1e-9)


def test_the_order_of_updates_and_a_checkpoint_change_no_bit(
    stepped, on_the_way, optimizers, strategy, make, peers, weights
):
    for optimizer in optimizers:
        before = on_the_way(optimizer)
        assert any(name.startswith(OWN) for name in before.memory)
        sent = make.round(np.random.default_rng(3), strategy, without_optimizer(before), peers, weights)
        want, digest = stepped(optimizer, before, sent).digest(), before.digest()
        for order in itertools.islice(itertools.permutations(sent), 1, 3):
            assert stepped(optimizer, before, order).digest() == want
        again = State.unpack(*before.pack())
        assert stepped(optimizer, again, sent).digest() == want
        assert before.digest() == digest


def test_clients_start_from_what_the_server_has_stepped_to(
    stepped, on_the_way, optimizers, strategy, np64, peers, layers, largest
):
    for optimizer in optimizers:
        now = on_the_way(optimizer)
        shown = without_optimizer(now)
        task = strategy.task(shown, dataclasses.replace(peers[0], rank=largest))
        for m, shape in layers.items():
            if task.adapter.pairs or strategy.server_space != "factors":
                assert np64.close(np64.effective(task, np64.working(task), m, shape), now.delta(m), 1e-9)
        assert {name for name in shown.memory if name.startswith(OWN)} == set()
