"""What each algorithm sends a client in a round, counted in numbers, against the formula of its paper.

R is the sum of the clients' ranks, S_in and S_out the sums of the layers' inputs and outputs.
"""

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlora import strategies
from fedlora.core.messages import Peer, Update
from fedlora.rounds.codec import Held, read_task, read_update, write_task, write_update
from fedlora.training.client import TrainResult

LAYERS = {"tall": (60, 40), "square": (50, 50), "wide": (40, 70)}
S_OUT, S_IN = (sum(shape[side] for shape in LAYERS.values()) for side in (0, 1))
HEAD = 7  # numbers in the extras that `make.adapter` makes
RANKS = [4, 4, 4]
MIXED = [4, 2, 1]


def both(r):
    return r * (S_OUT + S_IN) + HEAD


# For a client of rank r among clients of ranks `all`, in a round after the first: (down, up).
FORMULAS = {
    "FedIT": lambda r, all: (both(r), both(r)),
    "FeDeRA": lambda r, all: (both(r), both(r)),
    "FedRotLoRA": lambda r, all: (both(r), both(r)),
    "FlexLoRA": lambda r, all: (both(r), both(r)),
    "HetLoRA": lambda r, all: (both(r), both(r)),
    "RaFLoRA": lambda r, all: (both(r), both(r)),
    "SLoRA": lambda r, all: (both(r), both(r)),
    "PFedLoRA": lambda r, all: (both(r), both(r)),
    "FFALoRA": lambda r, all: (r * S_OUT + HEAD, r * S_OUT + HEAD),
    "FedSVD": lambda r, all: (both(r), r * S_OUT + HEAD),
    "FedSALoRA": lambda r, all: (r * S_IN, r * S_IN),
    "PrivateLoRA": lambda r, all: (len(LAYERS) * r * r + HEAD, len(LAYERS) * r * r + HEAD),
    # The stack, and the fresh factors that the next round starts from.
    "FLoRA": lambda r, all: (both(r) + sum(all) * (S_OUT + S_IN), both(r)),
    "FedExLoRA": lambda r, all: (both(r) + (len(all) - 1) * r * (S_OUT + S_IN), both(r)),
}


@pytest.fixture(autouse=True, scope="module")
def _identity():
    """Without one, Flower makes no message."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def numbers(record):
    return sum(int(np.prod(array.shape)) for array in record.array_records["arrays"].values())


def rounds(strategy, make, rng, ranks, count):
    """(down, up) in numbers of every client in every round, over the wire, and the state after the last."""
    state = strategy.init(make.adapter(rng, LAYERS, max(ranks), 2.0, torch.float32), seed=3)
    held, kept = {}, {}
    sizes = []
    for round in range(1, count + 1):
        updates, line = [], []
        for id, rank in enumerate(ranks):
            peer = Peer(id, rank)
            task = strategy.task(state, peer)
            down, held[id] = write_task(task, round, 0, held.get(id, Held()), state.round)
            got, _, _, kept[id] = read_task(down, kept.get(id))
            outcome = TrainResult(make.trained(rng, got, step=0.1), {"loss": 1.0 / round})
            up = write_update(outcome, got, round, 10)
            reply = Message(up, reply_to=Message(RecordDict(), 1, "train", group_id="1"))
            updates.append(read_update(reply, task, peer, round))
            line.append((numbers(down), numbers(up)))
        assert all(isinstance(update, Update) for update in updates)
        state = strategy.aggregate(state, updates, np.random.default_rng(0))
        sizes.append(line)
    return sizes, state


@pytest.mark.parametrize("name", sorted(FORMULAS))
@pytest.mark.parametrize("count", [3, 4])
def test_a_round_sends_what_the_formula_says(make, rng, name, count):
    strategy = getattr(strategies, name)()
    ranks = MIXED if strategy.mixed_ranks else RANKS
    sizes, _ = rounds(strategy, make, rng, ranks, count)
    assert sizes[-1] == [FORMULAS[name](rank, ranks) for rank in ranks]


@pytest.mark.parametrize("ranks", [RANKS, MIXED])
def test_rolora_sends_one_factor_up_and_the_other_one_down(make, rng, ranks):
    sizes, _ = rounds(strategies.RoLoRA(), make, rng, ranks, 4)
    for line in (sizes[2], sizes[3]):
        odd = line is sizes[2]  # B is trained, and A is what the round before has changed
        up, down = (S_OUT, S_IN) if odd else (S_IN, S_OUT)
        assert line == [(rank * down + HEAD, rank * up + HEAD) for rank in ranks]


def test_what_is_frozen_for_good_goes_down_once(make, rng):
    first = rounds(strategies.FFALoRA(), make, rng, RANKS, 1)[0][0]
    assert first == [(both(4), 4 * S_OUT + HEAD)] * 3
    [line] = rounds(strategies.PrivateLoRA(), make, rng, RANKS, 1)[0]
    # A and B, and what the adapter that the run began with had learned, in the base delta.
    assert line == [(4 * 4 * len(LAYERS) + HEAD + 2 * 4 * (S_OUT + S_IN), 4 * 4 * len(LAYERS) + HEAD)] * 3


def test_fedfold_sends_every_direction_that_there_is(make):
    sizes, _ = rounds(strategies.FedFold(), make, np.random.default_rng(7), MIXED, 3)
    before = rounds(strategies.FedFold(), make, np.random.default_rng(7), MIXED, 2)[1]
    width = sum(pair.rank * sum(pair.shape) for pair in before.adapter.pairs.values())
    fresh = [rank - rank // 2 for rank in MIXED]  # the half of each rank that goes to new directions
    assert [down for down, _ in sizes[-1]] == [width + both(count) for count in fresh]
    assert [up for _, up in sizes[-1]] == [both(rank) for rank in MIXED]


def test_fedms_sends_active_modules_then_its_expert_once_and_then_the_gate(make, rng):
    strategy = strategies.FedMS(global_rounds=3, active=1, capacity=(1, 2, 3), threshold=9.0)
    sizes, _ = rounds(strategy, make, rng, RANKS, 5)
    order = ["square", "tall", "wide"]  # by name, since none has a number

    def trained(modules):
        return 4 * sum(sum(LAYERS[m]) for m in modules) + HEAD

    # From round 2 on there is a round before to compare with, and no loss falls by 9: one more each time, of
    # which a client trains as many as it can.
    for line in sizes[:2]:
        assert [up for _, up in line] == [trained(order[:1])] * 3
    assert [up for _, up in sizes[2]] == [trained(order[:n]) for n in (1, 2, 2)]
    gate = 4 * (LAYERS[order[0]][1] + 1) + 2 * 4
    assert [down for down, _ in sizes[3]] == [both(4) + gate] * 3
    assert sizes[4] == [(gate, gate)] * 3


def test_every_strategy_has_a_formula():
    assert set(strategies.__all__) == set(FORMULAS) | {"RoLoRA", "FedFold", "FedMS"}
