"""The promises of a strategy about updates of old versions, which a scheduler without a barrier brings."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch

from fedlora.core.algebra import dense
from fedlora.core.changes import Change
from fedlora.core.messages import State, Update
from fedlora.errors import IncompatibleUpdates

from .federation import LAYERS, WEIGHTS, Round, effective
from .promises import Broken

CLOSE = 1e-9
FACTOR = 0.7  # what is left of an update for its age


def versions_are_refused_by_name(one: Round) -> None:
    """With staleness="refused" a change raises IncompatibleUpdates, which names the strategy."""
    if one.strategy.staleness != "refused":
        return
    try:
        one.strategy.apply_changes(one.state, _changes(one, one.late))
    except IncompatibleUpdates as error:
        if type(one.strategy).__name__ not in str(error):
            raise Broken(f"a refusal must name the strategy, got '{error}'") from None
        return
    raise Broken("staleness is refused, and an update of an old version is taken; begin with admit_changes")


def a_client_that_learned_nothing_moves_nothing(one: Round) -> None:
    """Whatever its rank and its version: what it sends back is what it was sent, to the bit."""
    if one.strategy.staleness == "refused":
        return
    sent = [replace(u, adapter=one.strategy.task(one.old, u.peer).adapter) for u in one.late if u.peer]
    after = one.strategy.apply_changes(one.state, _changes(one, sent))
    if after.round != one.state.round + 1:
        raise Broken(f"expected round {one.state.round + 1} after round {one.state.round}, got {after.round}")
    for module in one.state.adapter.plain().pairs:
        if not torch.equal(after.delta(module), one.state.delta(module)):
            raise Broken(f"clients that sent back what they were sent have moved ΔW of '{module}'")
    for name, tensor in one.state.adapter.extra.items():
        if not torch.equal(after.adapter.extra[name], tensor):
            raise Broken(f"clients that sent back what they were sent have moved '{name}'")


def a_change_of_an_old_version_is_added(one: Round) -> None:
    """The new ΔW is the old one and the weighted change of a client against what it was sent.

    With staleness="exact" to the last digits; with "effective" as near as the new rank allows. The same holds
    for the extras, which the client shares.
    """
    if one.strategy.staleness == "refused":
        return
    for update in one.late:
        assert update.peer is not None
        task = one.strategy.task(one.old, update.peer)
        after = one.strategy.apply_changes(one.state, [Change(update, task, 1.0, FACTOR)])
        for name in {*task.shared()} & {*one.state.adapter.heads()}:
            change = update.adapter.extra[name] - task.adapter.extra[name]
            gap = float((after.adapter.extra[name] - one.state.adapter.extra[name] - FACTOR * change).norm())
            if gap > CLOSE:
                raise Broken(f"'{name}' is {gap:.1e} from the old one and the client's change")
        for module in () if one.strategy.personal else LAYERS:
            change = effective(task, update.adapter, module) - effective(task, task.adapter, module)
            ideal = one.state.delta(module) + FACTOR * change
            gap, least = float((after.delta(module) - ideal).norm()), 0.0
            if one.strategy.staleness == "effective":
                rest = ideal - _base(one.state, module)
                rank = after.adapter.pairs[module].rank
                least = float(torch.linalg.svdvals(rest)[rank:].norm())
            if gap > least + CLOSE * max(1.0, float(ideal.norm())):
                raise Broken(
                    f"ΔW of '{module}' is {gap:.1e} from the old one and the change of {update.peer.called}, "
                    f"where {least:.1e} is the least that staleness={one.strategy.staleness!r} allows"
                )


def the_order_of_changes_changes_no_bit(one: Round) -> None:
    """Whoever comes first into a buffer must not decide the result; nor is the state written to."""
    if one.strategy.staleness == "refused":
        return
    before = replace(one.state).digest()
    changes = _changes(one, one.late)
    want = one.strategy.apply_changes(one.state, changes).digest()
    for order in itertools.permutations(changes):
        if one.strategy.apply_changes(one.state, order).digest() != want:
            raise Broken("the order of changes gives another state; begin apply_changes with admit_changes")
    if replace(one.state).digest() != before:
        raise Broken("apply_changes writes into the state that it was given; make a new one")


def _changes(one: Round, updates: Sequence[Update]) -> list[Change]:
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    return [
        Change(update, one.strategy.task(one.old, update.peer), share, FACTOR)
        for update, share in zip(updates, shares, strict=True)
        if update.peer
    ]


def _base(state: State, module: str) -> torch.Tensor:
    """What a state adds to the base besides its adapter, which changes leave as it is."""
    pair = state.base_delta.get(module)
    return torch.zeros(LAYERS[module], dtype=torch.float64) if pair is None else dense(pair)
