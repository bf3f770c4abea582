"""Sanity checks: every round is checked, and the user is warned of what looks wrong.

A run that learns nothing, or the wrong thing, shows falling losses for a long time. Each check here is for
a wrong result that a federated LoRA code base has had: adapters that never moved, snapshots from before the
training sent as its result, heads that nobody aggregated, scales that differ between server and clients,
clients that a sum left out. `codec.read_update` checks that a reply has all keys, and a reply without one is
dropped.
"""

from collections.abc import Iterator, Sequence

import torch

from fedlora.core.algebra import mean_tensors, normalised
from fedlora.core.messages import State, Task, Update
from fedlora.core.strategy import Strategy
from fedlora.rounds.aggregation_error import aggregation_error, sizes, tail_kept

SHOWN = 3  # names in a warning


def check_updates(updates: Sequence[Update], tasks: Sequence[Task], sparse: bool = False) -> Iterator[str]:
    """What looks wrong with the updates of a round, a sentence each.

    Args:
        updates: those that passed the checks.
        tasks: the task that each update answers.
        sparse: whether they hold a few numbers of each change, so that not all that is trained moves.
    """
    asked, moved, still, seals = dict[str, None](), set[str](), list[str](), dict[str, str]()
    for task, update in zip(tasks, updates, strict=True):
        before, after = dict(task.adapter.tensors()), dict(update.adapter.tensors())
        own = {name for name in task.shared() if not torch.equal(before[name], after[name])}
        places = {name: _module(name, task) for name in task.shared()}
        asked |= dict.fromkeys(places.values())
        moved |= {places[name] for name in own}
        who = update.peer.called if update.peer else "an unknown client"
        if own:
            seals[who] = update.adapter.digest()
        else:
            still.append(who)
    if moved and not sparse and (frozen := [name for name in asked if name not in moved]):
        yield f"no client has moved {_some(frozen)}; is it trained?"
    if moved and still:
        yield f"{', '.join(still)} sent back what was sent to it; does it train?"
    for seal_ in dict.fromkeys(seals.values()):
        if len(same := [who for who, own_seal in seals.items() if own_seal == seal_]) > 1:
            yield f"{', '.join(same)} sent the same update, bit for bit; have they the same rows?"


def check_state(
    strategy: Strategy, before: State, after: State, updates: Sequence[Update], tasks: Sequence[Task]
) -> tuple[dict[str, float], list[str]]:
    """The numbers of a round's new state, and what looks wrong with it, a sentence each.

    Args:
        strategy: the algorithm that has made the new state.
        before: the state that the updates answer to.
        after: the new one.
        updates: what the strategy combined.
        tasks: the task that each update answers.
    """
    found = [*_still(before, after), *_lost(before, after), *_scales(before, after, updates, tasks)]
    if strategy.personal:  # the state is only a part of every model
        return {}, found
    if not found:
        found += _heads(strategy, before, after, updates, tasks)
    numbers = {
        **sizes(after),
        **tail_kept(before, after, updates),
        **aggregation_error(after, updates, tasks),
    }
    error = numbers.get("aggregation_error", 0.0)
    if strategy.exact and error > 1e4 * _rounding(after):
        found.append(
            f"aggregation_error is {error:.2g}, where {type(strategy).__name__} should be exact: the new ΔW "
            "is not the clients' weighted mean"
        )
    return numbers, found


def check_changed_state(
    strategy: Strategy, before: State, after: State, updates: Sequence[Update], tasks: Sequence[Task]
) -> tuple[dict[str, float], list[str]]:
    """The same as `check_state` where changes were added to a state, which is no mean of the updates then."""
    found = [*_still(before, after), *_lost(before, after), *_scales(before, after, updates, tasks)]
    if strategy.personal:
        return {}, found
    return {**sizes(after), **tail_kept(before, after, updates)}, found


def _still(before: State, after: State) -> Iterator[str]:
    """An adapter that has not moved."""
    if after.tensor_digest == before.tensor_digest:
        yield "the adapter did not move; is anything trained?"


def _lost(before: State, after: State) -> Iterator[str]:
    """Modules and extras that the new state lacks."""
    names = [*before.adapter.pairs, *before.adapter.extra]
    if gone := [name for name in names if name not in {*after.adapter.pairs, *after.adapter.extra}]:
        yield f"the new state lacks {_some(gone)}"


def _scales(before: State, after: State, updates: Sequence[Update], tasks: Sequence[Task]) -> Iterator[str]:
    """Scales that changed on the way from the task to the update, or from state to state."""
    ways = [("an update has", t.adapter, u.adapter) for t, u in zip(tasks, updates, strict=True)]
    for what, old, new in [("the new state has", before.adapter, after.adapter), *ways]:
        for name in (name for name in old.pairs if name in new.pairs):
            if (want := old.pairs[name].scale) != (got := new.pairs[name].scale):
                yield f"{what} scale {got:g} for '{name}', expected {want:g}: its ΔW counts by the ratio"
                return


def _heads(
    strategy: Strategy, before: State, after: State, updates: Sequence[Update], tasks: Sequence[Task]
) -> Iterator[str]:
    """Extras that clients changed and the new state did not, or did not set to their weighted mean."""
    weights = normalised([update.weight for update in updates])
    # A strategy of means averages every tensor that is no factor, whatever it does to factors.
    averages = strategy.exact or strategy.linear or strategy.products
    shared = set(tasks[0].shared()).intersection(*(task.shared() for task in tasks))
    for name, old in before.adapter.extra.items():
        sent, new = [update.adapter.extra.get(name) for update in updates], after.adapter.extra[name]
        # A factor of the client's rank is no head; its strategy has a mean of its own for it.
        if name not in shared or any(tensor is None or tensor.shape != old.shape for tensor in sent):
            continue
        mean = mean_tensors([tensor.double() for tensor in sent if tensor is not None], weights)
        far = float((mean - old.double()).norm())
        close = 1e4 * _rounding(after) * max(float(mean.norm()), float(old.double().norm()))
        if far > close and torch.equal(new, old):
            yield f"'{name}' was not aggregated: clients moved it by {far:.2g}, the new state has the old one"
        elif averages and (gap := float((new.double() - mean).norm())) > close:
            yield f"'{name}' lies {gap:.2g} off the clients' weighted mean"


def _module(name: str, task: Task) -> str:
    """The module that a shared tensor belongs to, or the extra itself."""
    module = name.rpartition(".")[0]
    return module if module in task.adapter.pairs else name


def _rounding(state: State) -> float:
    kinds = [tensor.dtype for _, tensor in state.adapter.tensors() if tensor.is_floating_point()]
    return max((torch.finfo(kind).eps for kind in kinds), default=0.0)


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:SHOWN]) + rest
