import dataclasses
import math

import pytest
import torch

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import State
from fedlora.errors import IncompatibleUpdates


def test_no_updates_are_refused(strategy, state, aggregate):
    with pytest.raises(IncompatibleUpdates, match=f"{type(strategy).__name__}: expected at least one update"):
        aggregate(strategy, state, [])


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused_by_client(strategy, state, updates, weight, aggregate):
    updates[1] = dataclasses.replace(updates[1], weight=weight)
    with pytest.raises(IncompatibleUpdates, match=f"{type(strategy).__name__}: client 2 .*{weight}"):
        aggregate(strategy, state, updates)


def test_weights_that_are_all_zero_are_refused(strategy, state, updates, aggregate, weighted):
    with pytest.raises(IncompatibleUpdates, match="above 0"):
        aggregate(strategy, state, weighted(updates, [0.0] * len(updates)))


@pytest.mark.usefixtures("needs_pairs")
def test_a_missing_module_is_refused_by_client_and_name(strategy, state, updates, aggregate):
    pairs = {m: pair for m, pair in updates[1].adapter.pairs.items() if m != "square"}
    updates[1] = dataclasses.replace(updates[1], adapter=Adapter(pairs, updates[1].adapter.extra))
    with pytest.raises(IncompatibleUpdates, match=r"client 2 .*missing \['square'\]"):
        aggregate(strategy, state, updates)


@pytest.mark.usefixtures("needs_pairs")
def test_an_unknown_module_is_refused_by_client_and_name(strategy, state, updates, aggregate, with_pair):
    updates[1] = with_pair(updates[1], "lm_head", updates[1].adapter.pairs["square"])
    with pytest.raises(IncompatibleUpdates, match=r"client 2 .*unknown \['lm_head'\]"):
        aggregate(strategy, state, updates)


@pytest.mark.usefixtures("needs_pairs")
def test_a_module_missing_everywhere_is_refused_too(strategy, state, updates, aggregate):
    short = [
        dataclasses.replace(
            u, adapter=Adapter({m: p for m, p in u.adapter.pairs.items() if m != "tall"}, u.adapter.extra)
        )
        for u in updates
    ]
    with pytest.raises(IncompatibleUpdates, match=r"client 2 .*missing \['tall'\]"):
        aggregate(strategy, state, short)


@pytest.mark.usefixtures("needs_pairs")
@pytest.mark.parametrize("turn", ["transposed", "one output more", "one input less"])
def test_another_shape_is_refused_by_client_and_module(strategy, state, updates, turn, aggregate, with_pair):
    pair = updates[1].adapter.pairs["wide"]
    A, B = {
        "transposed": (pair.B.T, pair.A.T),
        "one output more": (pair.A, torch.cat([pair.B, pair.B[:1]])),
        "one input less": (pair.A[:, 1:], pair.B),
    }[turn]
    updates[1] = with_pair(updates[1], "wide", Pair(A, B, pair.scale))
    with pytest.raises(IncompatibleUpdates, match=r"client 2 .*'wide'"):
        aggregate(strategy, state, updates)


@pytest.mark.usefixtures("needs_extra")
@pytest.mark.parametrize(
    "extra", [{}, {"head.bias": torch.tensor(0.5, dtype=torch.float64)}, {"other": torch.ones(2)}]
)
def test_other_extras_are_refused_by_client_and_name(strategy, state, updates, extra, aggregate):
    updates[1] = dataclasses.replace(updates[1], adapter=Adapter(updates[1].adapter.pairs, extra))
    with pytest.raises(IncompatibleUpdates, match=r"client 2 .*missing .*'head.weight'"):
        aggregate(strategy, state, updates)


@pytest.mark.usefixtures("needs_extra")
@pytest.mark.parametrize("shape", [(3, 2), (2, 1), (1, 3), (6,), ()])
def test_extras_of_another_shape_are_refused_by_client_and_name(strategy, state, updates, shape, aggregate):
    extra = {**updates[1].adapter.extra, "head.weight": torch.zeros(shape, dtype=torch.float64)}
    updates[1] = dataclasses.replace(updates[1], adapter=Adapter(updates[1].adapter.pairs, extra))
    with pytest.raises(IncompatibleUpdates, match=r"client 2 .*'head.weight'"):
        aggregate(strategy, state, updates)


@pytest.mark.usefixtures("needs_pairs")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_client_that_diverged_is_refused_by_name(
    strategy, state, updates, factor, value, aggregate, with_pair
):
    pair = updates[1].adapter.pairs["wide"]
    broken = {name: tensor.clone() for name, tensor in pair.factors()}
    broken[factor][0, 0] = value
    updates[1] = with_pair(updates[1], "wide", Pair(scale=pair.scale, **broken))
    with pytest.raises(IncompatibleUpdates, match=r"client 2.*'wide'"):
        aggregate(strategy, state, updates)


@pytest.mark.usefixtures("needs_extra")
def test_a_head_that_diverged_is_refused_by_client_and_name(strategy, state, updates, aggregate):
    updates[1].adapter.extra["head.weight"][0, 0] = math.nan
    with pytest.raises(IncompatibleUpdates, match=r"client 2.*'head.weight'"):
        aggregate(strategy, state, updates)


def test_mixed_ranks_are_combined_or_refused_with_a_way_out(strategy, make, rng, state, aggregate, mixed):
    def run() -> State:
        return aggregate(strategy, state, make.round(rng, strategy, state, mixed, [1.0] * len(mixed)))

    if strategy.mixed_ranks or not strategy.task(state, mixed[0]).adapter.pairs:
        assert run().round == state.round + 1
        return
    with pytest.raises(IncompatibleUpdates, match=r"client \d .*rank \d+ .*expected \d+.*; use .*FlexLoRA"):
        run()


def test_clients_by_hand_without_peers_are_named_by_position(strategy, state, updates, aggregate):
    nameless = [dataclasses.replace(u, peer=None) for u in updates]
    assert aggregate(strategy, state, nameless).round == state.round + 1
    nameless[1] = dataclasses.replace(nameless[1], adapter=Adapter({}, {"other": torch.ones(1)}))
    with pytest.raises(IncompatibleUpdates, match=r"client #1"):
        aggregate(strategy, state, nameless)


def test_a_client_that_sent_twice_is_refused_by_name(strategy, state, updates, aggregate):
    again = dataclasses.replace(updates[1], weight=9.0)
    with pytest.raises(IncompatibleUpdates, match=f"{type(strategy).__name__}: client 2 .*more than one"):
        aggregate(strategy, state, [*updates, again])
