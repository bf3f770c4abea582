"""Measures of a round's new state, against the mean of the round's updates and the state before."""

import math
import statistics
from collections.abc import Sequence

from fedlora.core.adapter import Pair
from fedlora.core.algebra import compress, effective_rank, error_and_norm, norm, normalised
from fedlora.core.messages import State, Task, Update

ROUNDING = 1e-10  # the share of ‖ΔW‖² below which a tail counts as none


def aggregation_error(state: State, updates: Sequence[Update], tasks: Sequence[Task]) -> dict[str, float]:
    """How far the new global ΔW is from the clients' weighted mean, relative, over all modules.

    A client's ΔW is its pair with its base delta. Zero where a strategy is exact; FedIT's is the
    cross-covariance of its factors.
    """
    weights = normalised([update.weight for update in updates])
    result = state.whole().pairs
    errors, lengths = [], []
    sent = [update.adapter.plain().pairs for update in updates]
    for name in sent[0]:
        terms = [(pairs[name], w) for pairs, w in zip(sent, weights, strict=True)]
        base_deltas: dict[int, tuple[Pair, float]] = {}  # one that several clients share is added up once
        for task, weight in zip(tasks, weights, strict=True):
            if (base_delta := task.base_delta.get(name)) is not None:
                _, total = base_deltas.get(id(base_delta), (base_delta, 0.0))
                base_deltas[id(base_delta)] = (base_delta, total + weight)
        terms += base_deltas.values()
        error, length = error_and_norm([pair for pair, _ in terms], [w for _, w in terms], result[name])
        errors.append(error)
        lengths.append(length)
    total = math.hypot(*lengths)
    return {"aggregation_error": math.hypot(*errors) / total if total else 0.0} if lengths else {}


def sizes(state: State) -> dict[str, float]:
    """‖ΔW‖ over all modules, and the mean of their effective ranks."""
    pairs = state.whole().pairs.values()
    if not pairs:
        return {}
    return {
        "delta_norm": math.hypot(*(norm(pair) for pair in pairs)),
        "effective_rank": statistics.fmean(effective_rank(pair) for pair in pairs),
    }


def tail_kept(before: State, after: State, updates: Sequence[Update]) -> dict[str, float]:
    """The share that a round has kept of ΔW's tail T, its directions beyond the clients' smallest rank.

    ⟨ΔW_after, T⟩ / ‖T‖², over all modules. Where nobody learns it is 1, or the weight of those who hold such
    directions if the others count as zeros, round after round: rank collapse. Empty where all ranks are
    equal, where there is no tail yet, or where the base holds ΔW, which no client can cut.
    """
    kept, length, whole, now = 0.0, 0.0, 0.0, after.adapter.plain().pairs
    for name, pair in {} if before.base_delta else before.adapter.plain().pairs.items():
        ranks = [update.adapter.pairs[name].rank for update in updates if name in update.adapter.pairs]
        if ranks and min(ranks) < max(ranks):
            old = _wide(pair)
            leading = compress(old, min(ranks))
            kept += _inner(now[name], old) - _inner(now[name], leading)
            length += _inner(old, old) - _inner(leading, leading)
            whole += _inner(old, old)
    return {"tail_kept": kept / length} if length > ROUNDING * whole else {}


def _wide(pair: Pair) -> Pair:
    return Pair(pair.A.double(), pair.B.double(), pair.scale)


def _inner(one: Pair, other: Pair) -> float:
    """⟨ΔW_1, ΔW_2⟩ from the factors."""
    one, other = _wide(one), _wide(other)
    return one.scale * other.scale * float(((one.B.T @ other.B) * (one.A @ other.A.T)).sum())
