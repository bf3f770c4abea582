"""Every strategy over a tree: what an edge forwards of its clients gives the state of the flat round."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from fedlora import strategies
from fedlora.core.bundle import bundle, bundled
from fedlora.core.messages import Peer
from fedlora.errors import ConfigError

TABLE = Path(__file__).parents[2] / "docs" / "trees.md"  # with the reason where updates do not add up
# Edges of edges of clients, by the clients' places.
TREES = [[[0, 1, 2]], [[0], [1], [2]], [[0, 1], 2], [[[2], [1, 0]]], [[[0], 2], [[[1]]]]]


def test_the_table_of_the_page_is_that_of_the_classes() -> None:
    said = dict(re.findall(r"^\| `(\w+)` \| (\w+|–) \|", TABLE.read_text("utf-8"), flags=re.MULTILINE))
    found = {name.lower(): bundled(getattr(strategies, name)) or "–" for name in strategies.__all__}
    assert said == found
    assert bundled(strategies.SLoRA(second="flexlora")) == "products"


@pytest.fixture
def summed(strategy, state, largest):
    """From a tree and its leaves to the updates that the server sees."""
    if bundled(strategy) is None:
        pytest.skip("its updates do not add up")
    wide = strategy.task(state, Peer(0, largest))

    def up(tree, leaves, number=0):
        if isinstance(tree, int):
            return leaves[tree]
        below = [up(part, leaves, i) for i, part in enumerate(tree)]
        return bundle(strategy, state, wide, below, Peer(number, largest, name=f"edge {number}"))

    return lambda tree, leaves: [up(part, leaves, i) for i, part in enumerate(tree)]


def test_any_tree_gives_the_flat_state(strategy, np64, state, updates, summed, aggregate, same_model) -> None:
    flat = aggregate(strategy, state, updates[:3])
    for tree in TREES:
        assert same_model(np64, aggregate(strategy, state, summed(tree, updates)), flat), tree


def test_an_edge_forwards_no_more_than_the_ranks_of_its_clients(
    strategy, state, updates, summed, largest, layers
) -> None:
    before = [update.adapter.digest() for update in updates]
    (one,) = summed([[0, 1, 2]], updates)
    assert [update.adapter.digest() for update in updates] == before
    assert one.several
    assert one.weight == sum(update.weight for update in updates[:3])
    for m, pair in one.adapter.pairs.items():
        own = sum(update.adapter.pairs[m].rank for update in updates[:3])
        assert pair.rank <= max(own, largest) + largest * (bundled(strategy) == "own")
        assert pair.rank <= min(layers[m]) or bundled(strategy) != "products"


def test_an_edge_of_weight_zero_has_no_influence(
    strategy, np64, state, updates, summed, aggregate, same_model
) -> None:
    silent = [dataclasses.replace(u, weight=u.weight * (i == 2)) for i, u in enumerate(updates)]
    alone = aggregate(strategy, state, updates[2:3])
    assert same_model(np64, aggregate(strategy, state, summed([[0, 1], [2]], silent)), alone)


def test_updates_that_do_not_add_up_are_refused(strategy, state, updates, largest) -> None:
    if bundled(strategy) is not None:
        pytest.skip("they do")
    wide = strategy.task(state, Peer(0, largest))
    with pytest.raises(ConfigError, match=type(strategy).__name__):
        bundle(strategy, state, wide, updates, Peer(0, largest))


def test_an_own_mean_keeps_the_factors_of_the_flat_round(make, rng, aggregate) -> None:
    """FedEx-LoRA's clients go on from the mean factors, which a sum of products alone would not tell."""
    strategy, layers = strategies.FedExLoRA(), {"q": (7, 5)}
    state = strategy.init(make.adapter(rng, layers, 2, 0.7))
    peers = [Peer(i, 2) for i in range(4)]
    sent = make.round(rng, strategy, state, peers, [1.0, 2.0, 3.0, 4.0])
    wide = strategy.task(state, peers[0])
    edges = [bundle(strategy, state, wide, part, Peer(i, 2)) for i, part in enumerate((sent[:1], sent[1:]))]
    flat, tree = aggregate(strategy, state, sent), aggregate(strategy, state, edges)
    for name in ("A", "B"):
        one, two = (getattr(found.adapter.pairs["q"], name) for found in (flat, tree))
        assert torch.allclose(one, two, rtol=0, atol=1e-13)
