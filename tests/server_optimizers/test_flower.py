"""Our server optimizers beside Flower's own classes, run on the same updates in float64.

Where the conventions differ, Flower's class is given ours: its v starts at τ² instead of 0, and the factor
with which its FedAdam multiplies η in round t, √(1 − β₂^(t+1)) / (1 − β₁^(t+1)), is divided out of its η.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from fedlora.core.messages import Peer, State, Update
from fedlora.server_optimizers import FedAdagrad, FedAdam, FedAvgM, FedYogi, ServerOptimizer
from fedlora.server_optimizers.advance import next_round, without_optimizer
from fedlora.strategies import FedIT

ROUNDS = 4
WEIGHTS = (3, 1)


def ours(optimizer: ServerOptimizer, state: State, make: Any) -> Iterator[tuple[State, list[Update]]]:
    """The state after each round of FedIT with this optimizer, and what the clients had sent."""
    rng, peers = np.random.default_rng(3), [Peer(0, 3), Peer(1, 3)]
    for _ in range(ROUNDS):
        shown = without_optimizer(state)
        sent = make.round(rng, FedIT(), shown, peers, WEIGHTS, 0.1)
        tasks = [FedIT().task(shown, peer) for peer in peers]
        state = next_round(FedIT(), optimizer, state, sent, tasks, rng)
        yield state, sent


def arrays(tensors: Any) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in tensors})


def replies(updates: list[Update]) -> list[Message]:
    """The updates as Flower's strategies expect them."""
    found = []
    for number, update in enumerate(updates):
        asked = Message(RecordDict(), number + 1, "train")
        content = {
            "arrays": arrays(update.adapter.tensors()),
            "metrics": MetricRecord({"num-examples": int(update.weight)}),
        }
        found.append(Message(RecordDict(content), reply_to=asked))
    return found


def held_against(
    optimizer: ServerOptimizer, theirs: Any, begin: Callable[[int, Any], None], make: Any
) -> None:
    """Both from one state through some rounds, in which clients start from ours; the two must stay one."""
    adapter = make.adapter(np.random.default_rng(1), {"q": (5, 7), "v": (6, 4)}, 3, 0.7)
    state = FedIT().init(adapter)
    now = arrays(state.adapter.tensors())
    for number, (after, sent) in enumerate(ours(optimizer, state, make), 1):
        begin(number, now)
        now, _ = theirs.aggregate_train(number, replies(sent))
        for name, tensor in after.adapter.tensors():
            assert np.allclose(now[name].numpy(), tensor.numpy(), rtol=0, atol=1e-14), (number, name)


@pytest.mark.parametrize(("lr", "momentum"), [(1.0, 0.0), (0.5, 0.0), (1.0, 0.9), (0.5, 0.9)])
def test_fedavgm_is_flower_s(lr: float, momentum: float, make: Any) -> None:
    theirs = flower.FedAvgM(server_learning_rate=lr, server_momentum=momentum)

    def begin(round: int, now: ArrayRecord) -> None:
        if round == 1:  # it keeps its own from then on
            theirs.current_arrays = now

    held_against(FedAvgM(lr, momentum), theirs, begin, make)


@pytest.mark.parametrize("name", ["FedAdam", "FedYogi", "FedAdagrad"])
def test_adaptive_ones_are_flower_s_with_its_v_at_tau_squared(name: str, make: Any) -> None:
    tau, eta = 0.02, 0.03
    mine: dict[str, ServerOptimizer] = {
        "FedAdam": FedAdam(eta, 0.8, 0.95, tau),
        "FedYogi": FedYogi(eta, 0.8, 0.95, tau),
        "FedAdagrad": FedAdagrad(eta, tau),
    }
    betas = {} if name == "FedAdagrad" else {"beta_1": 0.8, "beta_2": 0.95}
    theirs = getattr(flower, name)(eta=eta, tau=tau, **betas)

    def begin(round: int, now: ArrayRecord) -> None:
        theirs.current_arrays = {key: array.numpy() for key, array in now.items()}
        if round == 1:
            theirs.v_t = {key: np.full_like(x, tau**2) for key, x in theirs.current_arrays.items()}
        if name == "FedAdam":
            theirs.eta = eta * (1 - 0.8 ** (round + 1)) / np.sqrt(1 - 0.95 ** (round + 1))

    held_against(mine[name], theirs, begin, make)


def test_yogi_forgets_a_large_change_by_its_own_square_and_not_by_a_share() -> None:
    """By hand: τ = 1, so v = 1; Δ = 3, then Δ = 0.1, with β₂ = 0.9."""
    large, small = torch.tensor([[3.0], [0.1]], dtype=torch.float64)
    for optimizer, first, second in (
        (FedYogi(1.0, 0.0, 0.9, 1.0), 1 + 0.1 * 9, 1.9 - 0.1 * 0.01),
        (FedAdam(1.0, 0.0, 0.9, 1.0), 0.9 + 0.1 * 9, 0.9 * 1.8 + 0.1 * 0.01),
        (FedAdagrad(1.0, 1.0), 1 + 9, 10 + 0.01),
    ):
        step, memory = optimizer.step(large, {})
        assert float(memory["v"]) == pytest.approx(first, rel=1e-12)
        assert float(step) == pytest.approx(3 / (first**0.5 + 1), rel=1e-12)
        step, memory = optimizer.step(small, memory)
        assert float(memory["v"]) == pytest.approx(second, rel=1e-12)
        assert float(step) == pytest.approx(0.1 / (second**0.5 + 1), rel=1e-12)
