"""What a round's new state is held against: the mean of the updates that made it, and the state before."""

import math
import statistics
from collections.abc import Sequence

from fedlora.adapter import Pair, digest
from fedlora.algebra import effective_rank, error_and_norm, norm, normalised
from fedlora.protocol import State, Task, Update


def seal(state: State) -> str:
    """A digest of all that training can change."""
    return digest("", sorted(state.pack()[0].items()))


def certificate(state: State, updates: Sequence[Update], tasks: Sequence[Task]) -> dict[str, float]:
    """How far the new global ΔW is from the clients' weighted mean, relative, over all modules.

    A client's ΔW is its pair with what its base had folded in. Zero where a strategy is exact; FedIT's is the
    cross-covariance of its factors.
    """
    weights = normalised([update.weight for update in updates])
    result = state.whole().pairs
    errors, lengths = [], []
    for name in updates[0].adapter.pairs:
        terms = [(u.adapter.pairs[name], w) for u, w in zip(updates, weights, strict=True)]
        folds: dict[int, tuple[Pair, float]] = {}  # one that several clients share counts once
        for task, weight in zip(tasks, weights, strict=True):
            if (fold := task.fold.get(name)) is not None:
                folds[id(fold)] = (fold, folds.get(id(fold), (fold, 0.0))[1] + weight)
        terms += folds.values()
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
