"""Client-level privacy: what one client can change, how much noise there is, and what it is paid with."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora import strategies
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, Update
from fedlora.core.vectors import embed, factor_change, flat, form, product_change, split, with_shared
from fedlora.errors import CheckpointError
from fedlora.privacy import ClientLevel, Ledger, Plan
from fedlora.privacy.client_level import ClientLevelMechanism

LAYERS = {"tall": (11, 4), "square": (6, 6), "wide": (5, 9)}
NAMES = ["FedIT", "FFALoRA", "RoLoRA", "FedSVD", "FeDeRA", "SLoRA", "PrivateLoRA", "FlexLoRA", "FLoRA"]
SILENT = 1e-12  # σ
WIDEST = Peer(0, 4)


@pytest.fixture(params=NAMES)
def strategy(request):
    return getattr(strategies, request.param)()


@pytest.fixture
def peers(strategy):
    if not strategy.mixed_ranks:
        return [Peer(i, 4) for i in range(4)]
    scales = {1: 16.0, 2: 8.0, 3: 16 / 3, 4: 4.0}
    return [Peer(i, r, {}, dict.fromkeys(LAYERS, scales[r])) for i, r in enumerate((4, 1, 3, 2))]


@pytest.fixture
def state(strategy, make, rng, peers):
    """After three rounds, so that factors are no longer zero and stages have changed."""
    found = strategy.init(make.adapter(rng, LAYERS, 4, 0.7))
    for _ in range(3):
        found = strategy.aggregate(found, make.round(rng, strategy, found, peers, [1.0] * 4, 0.3), rng)
    return found


@pytest.fixture
def central(tmp_path):
    def build(sigma=SILENT, clip=1.0, clients=4, sampled=4, **settings):
        privacy = ClientLevel(epsilon=5.0, clip=clip, rounds=3, accountant="rdp", **settings)
        plan = Plan(privacy, sampled, 1, 1e-5, sigma, sampled / clients)
        return ClientLevelMechanism(privacy, plan, tmp_path / "ledger.json")

    return build


def released(central, strategy, state, updates):
    central.sample(list(updates), 1)
    tasks = [strategy.task(state, u.peer) for u in updates]
    wide = strategy.task(state, WIDEST)
    return central.release(strategy, wide, central.total(strategy, wide, updates, tasks)).adapter


def moved(strategy, state, adapter):
    """How far a release is from what a client of all ranks is sent, in the space that is clipped."""
    wide = strategy.task(state, WIDEST)
    change = factor_change(wide.adapter, adapter, wide) if strategy.linear else None
    return flat(product_change(wide.adapter, adapter) if change is None else change)


def test_one_client_moves_the_release_by_the_clip_over_the_denominator_and_no_more(
    central, strategy, make, rng, state, peers
):
    """However far it goes, and whoever else takes part; the denominator does not follow who is there."""
    for step in (0.01, 3.0, 1e5):
        own = make.round(rng, strategy, state, peers, [1.0] * 4, step)
        others = released(central(), strategy, state, own[:3])
        all_of_them = released(central(), strategy, state, own)
        gap = moved(strategy, state, all_of_them) - moved(strategy, state, others)
        # A mean of products is cut to the rank of the clients, which comes after the release.
        slack = 1 + 1e-6 if strategy.linear else 2.0
        assert float(gap.norm()) <= slack * 1.0 / 4
        alone = moved(strategy, state, released(central(), strategy, state, own[3:]))
        if step > 1:
            assert float(alone.norm()) > 0.5 / 4


def test_without_noise_and_clip_the_strategy_sees_its_mean(central, strategy, make, np64, rng, state):
    """All clients, of the largest rank: the mean of the factors, or the nearest of rank 4 to that of ΔW."""
    updates = make.round(rng, strategy, state, [Peer(i, 4) for i in range(4)], [1.0] * 4, 0.3)
    got = released(central(clip=1e9, sigma=1e-30), strategy, state, updates)
    if strategy.linear:
        want = strategy.aggregate(state, updates, np.random.default_rng(3))
        new = strategy.aggregate(state, [Update(got)], np.random.default_rng(3))
        for module in LAYERS:
            assert np64.close(new.delta(module), want.delta(module), 1e-12)
    else:
        for module, pair in got.pairs.items():
            mean = sum(np64.delta(u.adapter.pairs[module]) for u in updates) / 4
            assert np64.close(np64.delta(pair), np64.best(mean, 4), 1e-12)
    for name, extra in got.extra.items():
        assert np64.close(extra, sum(u.adapter.extra[name] for u in updates) / 4, 1e-12)


@pytest.mark.parametrize("answered", [0, 1, 4])
def test_noise_has_its_size_in_every_coordinate_whoever_answers(central, make, rng, answered):
    strategy = strategies.FedIT()
    state = strategy.init(make.adapter(rng, {"m": (150, 100)}, 4, 0.7))
    peers = [Peer(i, 4) for i in range(answered)]
    still = [Update(strategy.task(state, one).adapter, 1.0, one) for one in peers]
    found = moved(
        strategy,
        state,
        released(central(sigma=3.0, clip=0.5, clients=20, sampled=10), strategy, state, still),
    )
    want = 3.0 * 0.5 / 10
    assert abs(float(found.std()) / want - 1) < 5 / (2 * len(found)) ** 0.5
    assert abs(float(found.mean())) < 5 * want / len(found) ** 0.5


def test_noise_falls_on_what_is_shared_and_nowhere_else(central, strategy, state):
    wide = strategy.task(state, WIDEST)
    found = released(central(sigma=1.0), strategy, state, [])
    if strategy.products and not strategy.linear:
        assert all(not torch.equal(found.extra[n], x) for n, x in wide.adapter.extra.items())
        return
    before = dict(wide.adapter.tensors())
    changed = {name for name, tensor in found.tensors() if not torch.equal(tensor, before[name])}
    assert changed == {*wide.shared()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_a_client_that_sends_nothing_finite_counts_as_none(central, make, rng, value):
    strategy = strategies.FedIT()
    state = strategy.init(make.adapter(rng, LAYERS, 4, 0.7))
    good, bad = make.round(rng, strategy, state, [Peer(0, 4), Peer(1, 4)], [1.0, 1.0], 0.3)
    pairs = {m: Pair(p.A * value, p.B, p.scale) for m, p in bad.adapter.pairs.items()}
    bad = replace(bad, adapter=Adapter(pairs, bad.adapter.extra))
    one, both = (
        moved(strategy, state, released(central(), strategy, state, u)) for u in ([good], [good, bad])
    )
    torch.testing.assert_close(one, both, atol=1e-10, rtol=0)


def test_a_client_counts_by_its_examples_up_to_the_cap(central, make, rng):
    strategy = strategies.FedIT()
    state = strategy.init(make.adapter(rng, LAYERS, 4, 0.7))
    [sent] = make.round(rng, strategy, state, [Peer(0, 4)], [1.0], 5.0)
    for examples, share in ((10, 0.1), (100, 1.0), (1e9, 1.0), (-5, 0.0)):
        update = replace(sent, weight=examples)
        found = moved(strategy, state, released(central(example_cap=100), strategy, state, [update]))
        assert float(found.norm()) == pytest.approx(share / 4, rel=1e-6, abs=1e-9)


def test_a_round_is_paid_for_before_it_is_released_and_the_budget_ends_the_run(central, tmp_path):
    strategy, state = strategies.FedIT(), None
    made = central(sigma=1.0, sampled=2)
    state = strategy.init(Adapter({"m": Pair(torch.ones(4, 9), torch.zeros(5, 4), 1.0)}))
    ledgers = []
    while made.refusal() is None:
        released(made, strategy, state, [])
        assert len(ledgers) < 50
        ledgers.append(Ledger.load((tmp_path / "ledger.json").read_text()))
    assert [x.entries[0].steps for x in ledgers] == list(range(1, len(ledgers) + 1))
    assert {x.unit for x in ledgers} == {"client"}
    assert ledgers[-1].epsilon <= 5 < replace(ledgers[-1]).plus(ledgers[0].entries[0]).epsilon
    assert "privacy budget is spent" in str(made.refusal())
    again = central(sigma=1.0, sampled=2)  # as after a restart
    assert again.ledger == ledgers[-1]
    (tmp_path / "ledger.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        again.refusal()


def test_everyone_is_sampled_by_itself_and_by_no_seed(central):
    nodes = list(range(400))
    draws = [central(clients=400, sampled=100).sample(nodes, 1) for _ in range(30)]
    sizes = [len(draw) for draw in draws]
    assert len({tuple(draw) for draw in draws}) == 30
    assert abs(np.mean(sizes) - 100) < 5 * (75 / 30) ** 0.5
    assert 4 < np.std(sizes) < 15  # of binomial sizes 8.7; of a fixed number 0
    known = [central(clients=400, sampled=100, insecure_test_seed=1).sample(nodes, r) for r in (1, 1, 2)]
    assert known[0] == known[1] != known[2]


def test_a_wider_form_and_back_is_the_same_adapter(strategy, make, rng, state):
    wide = strategy.task(state, WIDEST)
    scales = {m: pair.scale for m, pair in wide.adapter.pairs.items()}
    shared = embed(wide.adapter, form(wide), scales)
    torch.testing.assert_close(flat(split(flat(shared), form(wide))), flat(shared), atol=0, rtol=0)
    for (name, got), (_, want) in zip(
        with_shared(wide, shared).tensors(), wide.adapter.tensors(), strict=True
    ):
        assert torch.equal(got, want), name
