"""What clients have changed of what they were sent, added to a state that may have gone on since.

An update of an old version cannot be averaged with the state: its client started from another cut of another
state. What it has changed can be added. With B_kⁱⁿ, A_kⁱⁿ the cut that was sent and s_k the client's scale,

    Δ_k = s_k (B_k A_k − B_kⁱⁿ A_kⁱⁿ),    D ← D + Σ_k c_k Δ_k,    c_k = η · s(τ_k) · n_k / Σ_j n_j,

where Δ_k is a stack of rank 2 r_k at most, and nothing is ever dense. A client that has learned nothing has
Δ_k = 0 and moves nothing, whatever its rank and however old its version is. A convex mix of D and of s_k B_k
A_k would take from D, in every step, a part of all directions that the cut of rank r_k lacks.

The rule is FedBuff's (Nguyen et al., AISTATS 2022, arXiv:2106.06639, algorithm 1), in the space of ΔW.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.core.adapter import Pair
from fedlora.core.algebra import beyond, held, norm, pad_orthonormal, stack, truncate, weighted_sum
from fedlora.core.messages import State, Task, Update
from fedlora.seeds import generator


@dataclass(frozen=True)
class Change:
    """An update, and the task that it answers.

    Args:
        update: what the client sent.
        task: what it was sent, in its own ranks and scales.
        share: n_k / Σ_j n_j, the client's share of all updates that are added with this one.
        factor: η · s(τ_k), the step and what is left of it for an update of this age.
    """

    update: Update
    task: Task
    share: float = 1.0
    factor: float = 1.0

    @property
    def weight(self) -> float:
        """c_k."""
        return self.share * self.factor

    def of(self, module: str) -> list[tuple[Pair, float]]:
        """Δ_k of a module as pairs with their signs; empty where no bit has changed.

        The directions keep their places: those of each pair are the first that the client was sent. Of a
        client that has pruned its rank, those that it pruned are no longer compared.
        """
        after = self.update.adapter.pairs[module]
        before = truncate(self.task.adapter.pairs[module], after.rank)
        same_A, same_B = torch.equal(before.A, after.A), torch.equal(before.B, after.B)
        if same_A and same_B:
            return []
        if same_A:
            return [(Pair(after.A.double(), after.B.double() - before.B.double(), after.scale), 1.0)]
        if same_B:
            return [(Pair(after.A.double() - before.A.double(), after.B.double(), after.scale), 1.0)]
        return [(after, 1.0), (before, -1.0)] if before.B.any() else [(after, 1.0)]


Weigh = Callable[[Change, str], float | Tensor]


def plainly(change: Change, module: str) -> float:
    """c_k, for all modules and directions."""
    return change.weight


def among_holders(changes: Sequence[Change], shares: Callable[[Change, str], float]) -> Weigh:
    """c_k / p_i for direction i, with p_i = Σ_{k: r_k ≥ i} n_k / Σ n, so that only its holders count in it.

    Args:
        changes: all that are added together.
        shares: gives each client's share of a module.
    """

    def weigh(change: Change, module: str) -> Tensor:
        ranks = [one.update.adapter.pairs[module].rank for one in changes]
        p = held(ranks, [shares(one, module) for one in changes], max(ranks))
        own = p[: change.update.adapter.pairs[module].rank]
        return torch.where(own > 0, change.factor * shares(change, module) / own, 0.0)

    return weigh


def moved_products(state: State, changes: Sequence[Change], weigh: Weigh = plainly) -> dict[str, Pair]:
    """Module -> D + Σ_k c_k Δ_k in its fewest directions, in the order of their singular values.

    Only of modules that somebody has moved; the others have not changed by a bit.

    Args:
        state: whose pairs are D.
        changes: in the order of their clients' ids.
        weigh: c_k of a module, or one number a direction.
    """
    found = {}
    for m, old in state.adapter.pairs.items():
        terms = [(pair, weigh(one, m) * sign) for one in changes for pair, sign in one.of(m)]
        if terms:
            pairs, weights = [old, *(pair for pair, _ in terms)], [1.0, *(weight for _, weight in terms)]
            found[m] = weighted_sum(pairs, weights, old.scale)
    return found


def gained(changes: Sequence[Change], module: str) -> Pair | None:
    """Σ_k c_k Δ_k of a module as one stack of scale 1; None where nobody has moved it."""
    terms = [(pair, sign * one.weight) for one in changes for pair, sign in one.of(module)]
    if not terms:
        return None
    dtype = changes[0].update.adapter.pairs[module].A.dtype
    found = stack([pair for pair, _ in terms], [weight for _, weight in terms])
    return Pair(found.A.to(dtype), found.B.to(dtype))


def cut_to(state: State, module: str, whole: Pair, rank: int) -> Pair:
    """The first directions of a moved pair, and new ones with B = 0 where it has fewer."""
    rng = generator(state.seed, "refill", zlib.crc32(module.encode()), state.round + 1)
    return pad_orthonormal(truncate(whole, rank), rank, rng)


def moved_factors(state: State, changes: Sequence[Change], weigh: Weigh = plainly) -> dict[str, Pair]:
    """Module -> its pair after the changes of the factors that clients share, in one basis that none moves.

    With A frozen, Σ_k c_k Δ_k is s · (Σ_k c_k (s_k/s) (B_k − B_kⁱⁿ)) A, exactly, and so with B frozen.

    Args:
        state: whose pairs are moved.
        changes: in the order of their clients' ids.
        weigh: c_k of a module, or one number a direction.
    """
    found = {}
    for m, old in state.adapter.pairs.items():
        factors = {"A": old.A.double(), "B": old.B.double()}
        moved = False
        for one in changes:
            shared = one.task.shared()
            after = one.update.adapter.pairs[m]
            before = truncate(one.task.adapter.pairs[m], after.rank)
            weight = torch.as_tensor(weigh(one, m), dtype=torch.float64)
            for (name, new), (_, start) in zip(after.factors(), before.factors(), strict=True):
                if f"{m}.{name}" not in shared or torch.equal(new, start):
                    continue
                by, moved = new.double() - start.double(), True
                if name == "A":
                    wide = weight[:, None] * by if weight.ndim else weight * by
                    factors["A"] = factors["A"] + _padded(wide, old.A.shape)
                else:
                    factors["B"] = factors["B"] + _padded(
                        weight * (after.scale / old.scale) * by, old.B.shape
                    )
        found[m] = (
            Pair(factors["A"].to(old.A.dtype), factors["B"].to(old.B.dtype), old.scale) if moved else old
        )
    return found


def moved_extras(state: State, changes: Sequence[Change]) -> dict[str, Tensor]:
    """Every extra after the changes of those who share it; one of a smaller rank is padded with zeros."""
    found = dict(state.adapter.extra)
    for one in changes:
        shared = {*one.task.shared()}
        for name, before in one.task.adapter.extra.items():
            after = one.update.adapter.extra[name]
            if name in shared and name in found and not torch.equal(after, before):
                by = one.weight * (after.double() - before.double())
                found[name] = found[name].double() + _padded(by, found[name].shape)
    return {name: tensor.to(state.adapter.extra[name].dtype) for name, tensor in found.items()}


def moved_whole(state: State, changes: Sequence[Change], weigh: Weigh = plainly) -> State:
    """The next state with all of D + Σ_k c_k Δ_k, for a strategy whose state has no rank of its own."""
    pairs = {**state.adapter.pairs, **moved_products(state, changes, weigh)}
    adapter = replace(state.adapter, pairs=pairs, extra=moved_extras(state, changes))
    return replace(state, adapter=adapter, round=state.round + 1, metrics={})


def moved_and_cut(state: State, changes: Sequence[Change]) -> State:
    """The next state with the best of D + Σ_k c_k Δ_k in the state's ranks; its metrics say what is lost."""
    whole, old = moved_products(state, changes), state.adapter.pairs
    pairs = {m: cut_to(state, m, pair, old[m].rank) for m, pair in whole.items()}
    adapter = replace(state.adapter, pairs={**old, **pairs}, extra=moved_extras(state, changes))
    lost = sum(norm(beyond(pair, old[m].rank)) ** 2 for m, pair in whole.items())
    moved = sum(norm(pair) ** 2 for m in whole if (pair := gained(changes, m)) is not None)
    metrics = {"cut_off": math.sqrt(lost / moved) if moved else 0.0}
    return replace(state, adapter=adapter, round=state.round + 1, metrics=metrics)


def moved_in_place(state: State, changes: Sequence[Change]) -> State:
    """The next state with the changes added to the factors that clients share, in a basis that none moves."""
    adapter = replace(state.adapter, pairs=moved_factors(state, changes), extra=moved_extras(state, changes))
    return replace(state, adapter=adapter, round=state.round + 1, metrics={})


def _padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    wide = torch.zeros(tuple(shape), dtype=torch.float64, device=tensor.device)
    wide[tuple(slice(0, length) for length in tensor.shape)] = tensor
    return wide
