"""The promises of a strategy, each a check of its own, and one call that tries them all.

    from fedlora.testing import check_strategy

    check_strategy(MyStrategy(beta=0.9))

The checks make a small federation of random layers, some wider than tall, with clients of different ranks and
scales where the strategy allows them, in float64. They look at the first round and at a later one.
"""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fedlora.core.adapter import Pair
from fedlora.core.bundle import bundle, bundled
from fedlora.core.messages import State, Update
from fedlora.core.strategy import Strategy
from fedlora.core.vectors import embed, form, scales, with_shared
from fedlora.errors import IncompatibleUpdates

from .federation import LAYERS, WEIGHTS, Round, effective, federation
from .promises import Broken, named, report, what_came
from .staleness import (
    a_change_of_an_old_version_is_added,
    a_client_that_learned_nothing_moves_nothing,
    the_order_of_changes_changes_no_bit,
    versions_are_refused_by_name,
)

CLOSE = 1e-9
FACTS = ("mixed_ranks", "linear", "products", "exact", "personal")


def check_strategy(strategy: Strategy, seed: int = 0) -> None:
    """Try every promise on a strategy.

    Args:
        strategy: an instance, with the settings that are to be checked.
        seed: of the random layers and updates.

    Raises:
        AssertionError: some promises are broken; a line names each and says what came.
    """
    report(type(strategy).__name__, broken(strategy, seed))


def broken(strategy: Strategy, seed: int = 0) -> Iterator[tuple[str, str]]:
    """The promises that a strategy breaks: the name of each, and what came."""
    try:
        rounds = [*federation(strategy, seed)]
    except Exception as error:
        yield "a federation of three rounds runs", f"{type(error).__name__}: {error}"
        return
    for promise in PROMISES:
        for number, one in enumerate(rounds, 1):
            try:
                promise(copy.deepcopy(one))
            except Exception as error:
                yield named(promise), f"{what_came(error)} (round {number})"
                break


def facts_are_stated(one: Round) -> None:
    """The class says of itself what the framework reads: mixed_ranks, linear, products, exact, personal."""
    for fact in FACTS:
        if not isinstance(getattr(one.strategy, fact, None), bool):
            raise Broken(f"expected the class to set {fact} to True or False")
    if one.strategy.staleness not in ("exact", "effective", "refused"):
        raise Broken(f"expected staleness to be exact, effective or refused, got {one.strategy.staleness!r}")
    if not (dataclasses.is_dataclass(one.strategy) and one.strategy == dataclasses.replace(one.strategy)):
        raise Broken("expected a frozen dataclass, which is equal to a copy of itself")


def the_order_of_updates_changes_no_bit(one: Round) -> None:
    """Whoever answers first must not decide the result."""
    want = one.aggregate().digest()
    for order in itertools.permutations(one.updates):
        if one.aggregate(order).digest() != want:
            who = [update.peer.id for update in order if update.peer]
            raise Broken(f"the order of clients {who} gives another state; begin aggregate with self.admit")


def nothing_that_is_given_changes(one: Round) -> None:
    """State in, state out: neither the state nor an update is written to."""
    before = _digests(one)
    for peer in one.peers:
        one.strategy.task(one.state, peer)
    one.aggregate()
    if before != _digests(one):
        raise Broken("aggregate or task writes into a tensor that it was given; make new ones")


def the_same_call_gives_the_same_state(one: Round) -> None:
    """No hidden state and no randomness but the generator."""
    if one.aggregate().digest() != one.aggregate().digest():
        raise Broken(
            "two equal calls of aggregate differ; take randomness from rng, and keep nothing on self"
        )


def the_round_counts_up(one: Round) -> None:
    """State.round is the version of the state."""
    if (after := one.aggregate()).round != one.state.round + 1:
        raise Broken(f"expected round {one.state.round + 1} after round {one.state.round}, got {after.round}")


def the_unit_of_weights_changes_nothing(one: Round) -> None:
    """A weight is a share: twice every weight is the same."""
    doubled = [dataclasses.replace(update, weight=2 * update.weight) for update in one.updates]
    _same(one.aggregate(doubled), one.aggregate(), "twice every weight gives another state")


def a_client_of_weight_zero_has_no_influence(one: Round) -> None:
    """Nor does it fail the round."""
    silent = dataclasses.replace(one.updates[0], weight=0.0)
    with_it, without = one.aggregate([silent, *one.updates[1:]]), one.aggregate(one.updates[1:])
    _same(with_it, without, "an update of weight 0 changes the state")


def a_task_fits_its_client(one: Round) -> None:
    """A client trains its own rank, and shares no more than it trains."""
    for peer in one.peers:
        task = one.strategy.task(one.state, peer)
        if not task.shared():
            raise Broken(f"a client of rank {peer.rank} shares nothing")
        if not task.share <= task.train:
            raise Broken(
                f"a client of rank {peer.rank} is to share {set(task.share)} and to train {set(task.train)}"
            )
        for module, pair in task.adapter.pairs.items():
            if pair.rank != peer.rank:
                raise Broken(f"a client of rank {peer.rank} gets rank {pair.rank} of '{module}'")


def a_refused_update_is_named(one: Round) -> None:
    """Wrong updates raise IncompatibleUpdates, with the client in the message, and nothing else."""
    bad = one.updates[0]
    if not bad.adapter.pairs:
        return
    module, pair = next(iter(bad.adapter.pairs.items()))
    ruined = Pair(torch.full_like(pair.A, float("nan")), pair.B, pair.scale)
    adapter = dataclasses.replace(bad.adapter, pairs={**bad.adapter.pairs, module: ruined})
    try:
        one.aggregate([dataclasses.replace(bad, adapter=adapter), *one.updates[1:]])
    except IncompatibleUpdates as error:
        if bad.peer is not None and bad.peer.called not in str(error):
            raise Broken(f"a refusal must name the client, got '{error}'") from None
        return
    raise Broken("NaN from a client is combined; begin aggregate with self.admit")


def exact_means_the_weighted_mean(one: Round) -> None:
    """With exact=True the new ΔW is Σ w_k s_k B_k A_k, whatever the ranks, the base delta included."""
    if not one.strategy.exact or one.strategy.personal:
        return
    after = one.aggregate()
    for module, shape in LAYERS.items():
        ideal = torch.zeros(shape, dtype=torch.float64)
        for update, weight in zip(one.updates, WEIGHTS, strict=True):
            assert update.peer is not None
            task = one.strategy.task(one.state, update.peer)
            ideal += weight / sum(WEIGHTS) * effective(task, update.adapter, module)
        gap = float((after.delta(module) - ideal).norm() / max(1.0, float(ideal.norm())))
        if gap > CLOSE:
            raise Broken(f"exact is True, and ΔW of '{module}' is {gap:.1e} from the clients' weighted mean")


def linear_means_that_a_mean_is_enough(one: Round) -> None:
    """With linear=True one update that is the clients' mean, of factors and head, gives the same state.

    The mean is that of a secure sum: what clients share, in the form of the largest ranks.
    """
    if not one.strategy.linear or one.strategy.personal:
        return
    widest = max(one.peers, key=lambda peer: peer.rank)
    wide = one.strategy.task(one.state, widest)
    shared = [embed(update.adapter, form(wide), scales(wide)) for update in one.updates]
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    mean = {
        name: _tensor(sum(w * t[name] for w, t in zip(shares, shared, strict=True))) for name in shared[0]
    }
    alone = Update(with_shared(wide, mean), 1.0, widest)
    _same(
        one.aggregate([alone]),
        one.aggregate(),
        "linear is True, and the mean of the updates gives another state",
    )


def a_bundle_stands_for_its_clients(one: Round) -> None:
    """What an edge of a tree makes of some updates, with linear, products or a bundle of its own, adds up."""
    if bundled(one.strategy) is None or one.strategy.personal:
        return
    widest = max(one.peers, key=lambda peer: peer.rank)
    wide = one.strategy.task(one.state, widest)
    edges = [
        bundle(one.strategy, one.state, wide, part, dataclasses.replace(widest, id=number))
        for number, part in enumerate((one.updates[:1], one.updates[1:]))
    ]
    _same(
        one.aggregate(edges),
        one.aggregate(),
        f"updates are said to add up ({bundled(one.strategy)}), and what edges make of them gives another "
        "state",
    )


def a_state_survives_its_file(one: Round) -> None:
    """A checkpoint gives back the same state."""
    tensors, header = one.aggregate().pack()
    if State.unpack(tensors, header).digest() != one.aggregate().digest():
        raise Broken("a state that was packed and unpacked is another one; keep tensors in State.memory")


PROMISES: tuple[Callable[[Round], None], ...] = (
    facts_are_stated,
    the_order_of_updates_changes_no_bit,
    nothing_that_is_given_changes,
    the_same_call_gives_the_same_state,
    the_round_counts_up,
    the_unit_of_weights_changes_nothing,
    a_client_of_weight_zero_has_no_influence,
    a_task_fits_its_client,
    a_refused_update_is_named,
    exact_means_the_weighted_mean,
    linear_means_that_a_mean_is_enough,
    a_bundle_stands_for_its_clients,
    a_state_survives_its_file,
    versions_are_refused_by_name,
    a_client_that_learned_nothing_moves_nothing,
    a_change_of_an_old_version_is_added,
    the_order_of_changes_changes_no_bit,
)


def _digests(one: Round) -> list[str]:
    """Digests of all that a round was given, of copies, since a state keeps its own."""
    adapters = [dataclasses.replace(update.adapter) for update in one.updates]
    return [dataclasses.replace(one.state).digest(), *(adapter.digest() for adapter in adapters)]


def _same(one: State, two: State, what: str) -> None:
    gaps = [float((one.delta(m) - two.delta(m)).norm()) for m in LAYERS if m in one.adapter.pairs]
    gaps += [float((t - two.adapter.extra[name]).norm()) for name, t in one.adapter.extra.items()]
    if not max(gaps, default=0.0) <= CLOSE:
        raise Broken(f"{what}, {max(gaps):.1e} away")


def _tensor(value: Tensor | int) -> Tensor:
    assert isinstance(value, Tensor)
    return value
