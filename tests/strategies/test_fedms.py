"""FedMS at the server: which modules are active, whose values are averaged, and what stage 2 combines."""

import dataclasses

import numpy as np
import pytest
import torch

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Peer, State, Update
from fedlora.errors import ConfigError, IncompatibleUpdates
from fedlora.strategies import FedIT, FedMS
from fedlora.training.expert import GlobalExpert

LAYERS = {
    "m.layer.0.q": (5, 7),
    "m.layer.2.q": (6, 6),
    "m.layer.10.q": (9, 4),
    "m.layer.10.v": (3, 4),
    "m.pooler": (4, 4),
}
ORDER = ["m.pooler", "m.layer.10.q", "m.layer.10.v", "m.layer.2.q", "m.layer.0.q"]


def peers(number, rank=3):
    return [Peer(i, rank) for i in range(number)]


def started(make, rng, strategy, rank=3, **more):
    return strategy.init(make.adapter(rng, LAYERS, rank, 0.7, **more), seed=3)


def with_losses(updates, *losses):
    return [dataclasses.replace(u, metrics={"loss": x}) for u, x in zip(updates, losses, strict=True)]


def step(make, rng, strategy, state, weights, losses=None):
    updates = make.round(rng, strategy, state, peers(len(weights)), weights)
    updates = with_losses(updates, *losses) if losses else updates
    return strategy.aggregate(state, updates, rng), updates


def test_the_modules_are_in_order_from_the_top_layer_down(make, rng):
    assert make.adapter(rng, LAYERS, 1).top_down() == ORDER


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_with_all_modules_active_everywhere_stage_1_is_fedit(make, rng, rank):
    strategy = FedMS(active=99)
    state = started(make, rng, strategy, rank)
    updates = make.round(rng, strategy, state, peers(3, rank), [3.0, 1.0, 0.0])
    got, want = (s.aggregate(state, updates, rng).adapter for s in (strategy, FedIT()))
    assert got.digest() == want.digest()


def test_a_client_trains_the_first_of_the_active_modules_up_to_its_capacity(make, rng):
    state = started(make, rng, strategy := FedMS(active=3, capacity=[1, 5]))
    frozen = [strategy.task(state, Peer(i, 3)).frozen for i in range(4)]
    assert frozen == [frozenset(ORDER[1:]), frozenset(ORDER[3:])] * 2
    every = FedMS(active=2).task(started(make, rng, FedMS(active=2)), Peer(9, 3))
    assert every.frozen == frozenset(ORDER[2:])
    assert set(every.shared()) == {f"{m}.{f}" for m in ORDER[:2] for f in "AB"} | {"head.weight", "head.bias"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_module_is_averaged_over_those_who_had_it_active(make, np64, rng, dtype):
    strategy = FedMS(active=3, capacity=(3, 1, 2))
    state = started(make, rng, strategy, dtype=dtype)
    after, updates = step(make, rng, strategy, state, [3.0, 1.0, 2.0])
    holders = {ORDER[0]: [0, 1, 2], ORDER[1]: [0, 2], ORDER[2]: [0], ORDER[3]: [], ORDER[4]: []}
    tol = 1e-12 if dtype == torch.float64 else 1e-2
    for module, who in holders.items():
        pair, old = after.adapter.pairs[module], state.adapter.pairs[module]
        assert pair.scale == old.scale
        for factor in ("A", "B"):
            got = getattr(pair, factor)
            assert got.dtype == dtype
            if not who:
                assert torch.equal(got, getattr(old, factor))
                continue
            weights = np.array([[3.0, 1.0, 2.0][k] for k in who])
            own = [getattr(updates[k].adapter.pairs[module], factor).double().numpy() for k in who]
            want = np.tensordot(weights / weights.sum(), np.stack(own), 1)
            assert np64.close(got.double().numpy(), want, tol)
    assert torch.equal(after.adapter.pairs[ORDER[2]].B, updates[0].adapter.pairs[ORDER[2]].B)


def test_a_client_of_weight_zero_does_not_move_a_module_it_holds_alone(make, rng):
    strategy = FedMS(active=2, capacity=(2, 1))
    state = started(make, rng, strategy)
    after, _ = step(make, rng, strategy, state, [0.0, 1.0])
    assert torch.equal(after.adapter.pairs[ORDER[1]].A, state.adapter.pairs[ORDER[1]].A)
    assert not torch.equal(after.adapter.pairs[ORDER[0]].A, state.adapter.pairs[ORDER[0]].A)


def test_one_more_module_is_activated_when_the_loss_stalls(make, rng):
    strategy = FedMS(global_rounds=99, active=1, threshold=0.25)
    state, seen = started(make, rng, strategy), []
    # Means with weights 3:1 are 2.0, 1.5 (fell by 0.5), 1.375 (by 0.125), 1.5 (rose), 1.0, 0.75 (by 0.25).
    for losses in [(2.0, 2.0), (1.0, 3.0), (1.5, 1.0), (1.5, 1.5), (1.0, 1.0), (0.5, 1.5)]:
        state, _ = step(make, rng, strategy, state, [3.0, 1.0], losses)
        seen.append((int(state.metrics["active_modules"]), int(state.memory["active"])))
    assert seen == [(1, 1), (1, 1), (1, 2), (2, 3), (3, 3), (3, 3)]
    for _ in range(9):
        state, _ = step(make, rng, strategy, state, [1.0], [0.75])
    assert int(state.memory["active"]) == len(LAYERS)


def test_without_losses_nothing_more_is_activated(make, rng):
    strategy = FedMS(active=2)
    state = started(make, rng, strategy)
    for losses in (None, [1.0, 1.0], None):
        state, _ = step(make, rng, strategy, state, [1.0, 1.0], losses)
    assert int(state.memory["active"]) == 2


def test_stage_2_sends_the_gate_and_the_expert_and_averages_the_gate_alone(make, np64, rng):
    strategy = FedMS(global_rounds=1, gate_rank=2)
    state, _ = step(make, rng, strategy, started(make, rng, strategy), [1.0, 2.0])
    task = strategy.task(state, Peer(1, 3))
    assert task.shared() == ["gate.A", "gate.B"]
    assert task.own() == []
    assert task.part(GlobalExpert).adapter.digest() == state.adapter.digest()
    assert task.adapter.extra["gate.A"].shape == (2, 4 + 1)  # of the topmost module's input, and 1
    assert task.adapter.extra["gate.B"].shape == (2, 2)
    assert not task.adapter.extra["gate.B"].any()
    after, updates = step(make, rng, strategy, state, [1.0, 3.0])
    for name in ("gate.A", "gate.B"):
        want = sum(
            w * u.adapter.extra[name].double().numpy() for w, u in zip((0.25, 0.75), updates, strict=True)
        )
        assert np64.close(after.memory[name].double().numpy(), want, 1e-6)
    assert after.adapter.digest() == state.adapter.digest()
    assert after.round == 2
    assert not after.metrics


def test_a_state_in_the_middle_survives_packing(make, rng):
    strategy = FedMS(global_rounds=1)
    state, _ = step(make, rng, strategy, started(make, rng, strategy), [1.0], [0.5])
    assert State.unpack(*state.pack()).digest() == state.digest()


def test_the_gate_starts_from_the_seed(make, rng):
    adapter = make.adapter(rng, LAYERS, 2)
    one, same, other = (FedMS().init(adapter, seed=s).memory["gate.A"] for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_stage_2_refuses_what_is_not_the_gate(make, rng):
    strategy = FedMS(global_rounds=0)
    state = started(make, rng, strategy)
    with pytest.raises(IncompatibleUpdates, match="modules"):
        strategy.aggregate(state, [Update(state.adapter)], rng)
    with pytest.raises(IncompatibleUpdates, match=r"gate\.B"):
        strategy.aggregate(state, [Update(Adapter({}, {"gate.A": torch.zeros(4, 5)}))], rng)


@pytest.mark.parametrize(
    "wrong",
    [{"global_rounds": -1}, {"active": 0}, {"gate_rank": 0}, {"capacity": [0]}, {"threshold": np.nan}],
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FedMS(**wrong)
