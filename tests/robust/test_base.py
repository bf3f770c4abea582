"""Norm bounds and Krum: what they let through, by plain numpy, and what no attack of theirs moves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy.multikrum import select_multikrum

from fedlora import strategies
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, Update
from fedlora.core.update_step import RoundUpdates
from fedlora.errors import ConfigError
from fedlora.privacy import ClientLevel
from fedlora.robust.base import capped
from fedlora.robust.coordinatewise import Median, TrimmedMean
from fedlora.robust.krum import Krum, krum_scores
from fedlora.robust.norm_bound import NormBound
from fedlora.rounds.round_config import RoundConfig

LAYERS = {"tall": (11, 4), "square": (6, 6), "wide": (5, 9)}
GLOBAL = [n for n in strategies.__all__ if not getattr(strategies, n).personal]


@pytest.fixture(params=GLOBAL)
def strategy(request):
    return getattr(strategies, request.param)()


@pytest.fixture
def peers(strategy):
    ranks = (4, 2, 3, 1, 4, 4, 2) if strategy.mixed_ranks else (4,) * 7
    return [Peer(i, r, {}, dict.fromkeys(LAYERS, 8 / r)) for i, r in enumerate(ranks)]


@pytest.fixture
def state(strategy, make, rng, peers):
    """After three rounds, so that stages have changed and factors are no longer zero."""
    found = strategy.init(make.adapter(rng, LAYERS, 4, 2.0))
    for _ in range(3):
        found = strategy.aggregate(found, make.round(rng, strategy, found, peers, [1.0] * 7, 0.1), rng)
    return found


def length(np64, task, adapter):
    parts = [np64.change(adapter, m) - np64.change(task.adapter, m) for m in task.adapter.pairs]
    parts += [
        (adapter.extra[n] - old).double().numpy() for n, old in task.adapter.extra.items() if ".core" not in n
    ]
    return np.sqrt(sum((part**2).sum() for part in parts))


def screened(rule, strategy, state, updates):
    tasks = [strategy.task(state, u.peer) for u in updates]
    return rule.on_server(RoundUpdates(strategy, state, updates, tasks, Peer(0, 4))), tasks


def boosted(strategy, state, update, boost):
    """The update with its change turned round and so many times as long."""
    task = strategy.task(state, update.peer)
    old, shared = dict(task.adapter.tensors()), task.shared()

    turned = {n: old[n] - boost * (t - old[n]) for n, t in update.adapter.tensors() if n in shared}
    return replace(update, adapter=update.adapter.with_tensors(turned))


def test_no_change_is_longer_than_the_median_of_all(make, np64, rng, strategy, state, peers):
    own = make.round(rng, strategy, state, peers, [1.0] * 7, 0.1)
    sent = [*own[:5], *(boosted(strategy, state, u, 100.0) for u in own[5:])]
    (kept, tasks), before = screened(NormBound(), strategy, state, sent), []
    for update, task in zip(sent, tasks, strict=True):
        before.append(length(np64, task, update.adapter))
    bound = sorted(before)[3]
    assert kept.metrics["bound"] == pytest.approx(bound)
    after = [length(np64, t, u.adapter) for t, u in zip(tasks, kept.updates, strict=True)]
    assert max(after) <= bound * (1 + 1e-6)
    assert [n["change"] for n in kept.notes.values()] == pytest.approx(before)
    assert kept.metrics["bounded"] == sum("kept" in note for note in kept.notes.values())
    for update, got in zip(sent, kept.updates, strict=True):
        if "kept" not in kept.notes[update.peer.id]:
            assert got.adapter is update.adapter
    new = strategy.aggregate(state, kept.updates, rng)  # of a form that the strategy takes
    assert all(torch.isfinite(new.delta(m)).all() for m in LAYERS)


def test_a_bound_of_one_s_own(make, np64, rng):
    strategy = strategies.FedIT()
    state = strategy.init(make.adapter(rng, LAYERS, 4))
    own = make.round(rng, strategy, state, [Peer(i, 4) for i in range(3)], [1.0] * 3)
    kept, tasks = screened(NormBound(bound=0.25), strategy, state, own)
    assert [length(np64, t, u.adapter) for t, u in zip(tasks, kept.updates, strict=True)] == pytest.approx(
        [0.25] * 3
    )


@pytest.mark.parametrize("rule", [NormBound(), Krum(1)], ids=repr)
def test_a_product_of_enormous_factors_does_not_pass_for_a_small_change(make, rng, rule):
    """A · c and B / c have the ΔW of an honest client, and ruin a mean of factors."""
    strategy = strategies.FedIT()
    state = strategy.init(make.adapter(rng, LAYERS, 4))
    own = make.round(rng, strategy, state, [Peer(i, 4) for i in range(5)], [1.0] * 5, 0.1)
    pairs = {m: Pair(p.A * 1e4, p.B / 1e4, p.scale) for m, p in own[0].adapter.pairs.items()}
    evil = replace(own[0], adapter=Adapter(pairs, own[0].adapter.extra))
    kept, _ = screened(rule, strategy, state, [evil, *own[1:]])
    new = strategy.aggregate(state, kept.updates, rng)
    honest = strategy.aggregate(state, own, rng)
    gap = max(float((new.delta(m) - honest.delta(m)).norm() / honest.delta(m).norm()) for m in LAYERS)
    assert gap < 0.5
    assert kept.notes[0].keys() & {"kept", "rejected"}


def test_krum_rejects_the_attackers_whatever_the_strategy(make, rng, strategy, state, peers):
    """Two of seven, far off and near to each other."""
    own = make.round(rng, strategy, state, peers, [1.0] * 7, 0.05)
    evil = {1, 4}
    sent = [boosted(strategy, state, u, 50.0) if u.peer.id in evil else u for u in own]
    kept, _ = screened(Krum(2), strategy, state, sent)
    chosen = {u.peer.id for u in kept.updates}
    assert len(chosen) == 7 - 2 - 2
    assert not chosen & evil
    assert {k for k, note in kept.notes.items() if "rejected" in note} == set(range(7)) - chosen
    assert kept.metrics == {"rejected": 4.0}
    assert all(u.adapter is sent[u.peer.id].adapter for u in kept.updates)
    assert strategy.aggregate(state, kept.updates, rng).round == state.round + 1


@pytest.mark.parametrize("select", [1, 2, 4])
def test_krum_is_that_of_flower_on_dense_changes(make, np64, rng, select):
    strategy = strategies.FlexLoRA()
    state = strategy.init(make.adapter(rng, LAYERS, 4))
    peers = [Peer(i, r) for i, r in enumerate((4, 2, 3, 1, 4, 2, 3))]
    for _ in range(20):
        sent = make.round(rng, strategy, state, peers, [1.0] * 7, float(rng.uniform(0.1, 2)))
        kept, tasks = screened(Krum(1, select), strategy, state, sent)
        contents = []
        for k, (task, update) in enumerate(zip(tasks, sent, strict=True)):
            change = [
                np64.delta(update.adapter.pairs[m]) - np64.delta(p) for m, p in task.adapter.pairs.items()
            ]
            change += [(update.adapter.extra[n] - x).numpy() for n, x in task.adapter.extra.items()]
            contents.append(
                RecordDict({"arrays": ArrayRecord({f"{k}.{i}": Array(c) for i, c in enumerate(change)})})
            )
        wanted = select_multikrum(contents, 1, select)
        ids = {contents.index(content) for content in wanted}
        assert {u.peer.id for u in kept.updates} == ids


def test_scores_sum_the_nearest_others():
    apart = torch.tensor([[0, 1, 4, 9], [1, 0, 1, 4], [4, 1, 0, 1], [9, 4, 1, 0.0]])
    assert krum_scores(apart, 2) == [5, 2, 2, 5]
    assert krum_scores(apart, 1) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "rule", [NormBound(), Krum(1), Median(), TrimmedMean(0.2)], ids=lambda r: type(r).__name__
)
def test_a_client_that_lies_about_its_examples_counts_no_more_than_others(make, rng, rule):
    strategy = strategies.FlexLoRA()
    state = strategy.init(make.adapter(rng, LAYERS, 4))
    own = make.round(
        rng, strategy, state, [Peer(i, 4) for i in range(7)], [10.0, 20, 30, 40, 50, 60, 70], 0.1
    )
    lying = [replace(u, weight=1e12) if u.peer.id == 3 else u for u in own]
    kept, _ = screened(rule, strategy, state, lying)
    total = sum(u.weight for u in kept.updates)
    assert all(u.weight <= 2 * total / len(kept.updates) for u in kept.updates)
    assert all(u.weight < 1e3 for u in kept.updates)


def test_weights_are_cut_at_the_lower_median():
    updates = [Update(Adapter({}), weight) for weight in (5.0, 1.0, 9.0, 1e12)]
    assert [u.weight for u in capped(updates)] == [5.0, 1.0, 5.0, 5.0]


def rules(**more):
    return RoundConfig(1, 0, **{"clients": 8, **more})


@pytest.mark.parametrize(
    "rule", [NormBound(), Krum(), Median(), TrimmedMean()], ids=lambda r: type(r).__name__
)
def test_what_shows_the_server_no_single_update_is_refused(rule):
    with pytest.raises(ConfigError, match=r"robust: under secure_sum .*robust=none"):
        rule.check(strategies.FedIT(), rules(secure_sum=True), None)
    with pytest.raises(ConfigError, match=r"robust: under privacy=client_level"):
        rule.check(strategies.FedIT(), rules(), ClientLevel(epsilon=1.0, rounds=1))
    for name in set(strategies.__all__) - set(GLOBAL):
        with pytest.raises(ConfigError, match=rf"robust: clients of {name} keep a part"):
            rule.check(getattr(strategies, name)(), rules(), None)
    with pytest.raises(ConfigError, match=r"needs at least \d clients a round, got 2"):
        rule.check(strategies.FedIT(), rules(clients_per_round=2), None)
    rule.check(strategies.FedIT(), rules(), None)


@pytest.mark.parametrize("name", GLOBAL)
def test_rules_by_coordinate_refuse_what_needs_more_than_one_update(name):
    strategy = getattr(strategies, name)()
    for rule in (Median(), TrimmedMean()):
        if strategy.linear or strategy.products:
            rule.check(strategy, rules(), None)
        else:
            with pytest.raises(
                ConfigError, match=rf"robust: strategy {name} .*fedit, .*flexlora, flora, .*robust=norm"
            ):
                rule.check(strategy, rules(), None)


@pytest.mark.parametrize(("rule", "least"), [(Krum(1), 5), (Krum(2), 7), (Krum(1, 4), 7), (NormBound(), 3)])
def test_too_few_clients_are_refused(rule, least):
    rule.check(strategies.FedIT(), rules(clients_per_round=least), None)
    with pytest.raises(ConfigError, match=rf"at least {least} clients a round, got {least - 1}"):
        rule.check(strategies.FedIT(), rules(clients_per_round=least - 1), None)


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (NormBound, "multiple", 0),
        (NormBound, "bound", -1.0),
        (NormBound, "multiple", float("nan")),
        (Krum, "malicious", 0),
        (Krum, "select", 0),
        (Krum, "malicious", 1.5),
        (TrimmedMean, "share", 0.5),
        (TrimmedMean, "share", 0.0),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(cls, name, value):
    with pytest.raises(ConfigError, match=rf"robust.{name}: expected .* got"):
        cls(**{name: value})
