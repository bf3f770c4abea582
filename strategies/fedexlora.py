"""FedEx-LoRA: FedIT whose error is added to the base, so that nothing of the mean is lost.

Singhal, Ponkshe, Vepakomma. "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models". ACL 2025. https://arxiv.org/abs/2410.09432

    Ā = Σ_k w_k A_k,    B̄ = Σ_k w_k B_k,    W ← W + Σ_k w_k s B_k A_k − s B̄ Ā

so that W + s B̄ Ā is the clients' weighted mean. What is added is s Σ_k w_k (B_k − B̄)(A_k − Ā), which looks
like K r directions but has (K − 1) r: by the recurrence of means and covariances over growing samples (Chan,
Golub, LeVeque, 1979) it equals

    s Σ_{k>1} (W_{k−1} w_k / W_k) (B_k − B̄_{k−1})(A_k − Ā_{k−1}),    W_k = w_1 + … + w_k,

with Ā_{k−1}, B̄_{k−1} the weighted means of the first k − 1 clients. Only differences of clients appear, so
that clients who agree add nothing, to the last bit, and no SVD is needed.

Sends: A and B up; down Ā and B̄, and what was added, of rank (K − 1) r. A client that missed a round gets
all that was added so far, with min(d_out, d_in) directions at most.
Differs from the paper: clients are weighted, by the same weights in all three means. With another
scale s_k, B_k counts as (s_k / s) B_k, as in FedIT. What is added is kept beside the base, in the precision
of the adapter, so that a quantised base loses none of it; it is never truncated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedlora.core.adapter import Pair
from fedlora.core.algebra import beyond, compress, mean_extras, mean_factors, stack, truncate
from fedlora.core.base_delta import BaseDelta
from fedlora.core.changes import Change, cut_to, moved_extras, moved_products
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy, slice_to_rank


@dataclass(frozen=True)
class FedExLoRA(Strategy):
    """FedIT's factors and an exact mean; for few clients of one rank, since the download grows with them."""

    mixed_ranks = False
    linear = False
    exact = True
    staleness = "exact"
    fixed_basis = True
    server_space = "base_delta"

    def task(self, state: State, peer: Peer) -> Task:
        """Both mean factors, on the base with all that was added."""
        return Task(slice_to_rank(state.adapter, peer), base_delta=state.base_delta)

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """Average A and B, each by itself, and add to the base what that loses."""
        sent, w = self.admit(state, updates)
        pairs, gain = {}, {}
        for m, old in state.adapter.pairs.items():
            pairs[m], lost = _mean_and_lost([u.adapter.pairs[m] for u in sent], w, old)
            if lost is not None:
                gain[m] = lost
        extra = mean_extras([u.adapter.extra for u in sent], w)
        adapter = replace(state.adapter, pairs=pairs, extra=extra)
        base_delta = BaseDelta.of(state.base_delta).plus(gain)
        return replace(state, adapter=adapter, round=state.round + 1, base_delta=base_delta)

    def apply_changes(self, state: State, changes: Sequence[Change]) -> State:
        """The best of s B̄ Ā + Σ_k c_k Δ_k in the adapter's rank, and the rest of it in the base."""
        changes = self.admit_changes(state, changes)
        old, whole = state.adapter.pairs, moved_products(state, changes)
        pairs = {m: cut_to(state, m, pair, old[m].rank) for m, pair in whole.items()}
        rest = {m: beyond(pair, old[m].rank) for m, pair in whole.items()}
        base_delta = BaseDelta.of(state.base_delta).plus({m: pair for m, pair in rest.items() if pair.rank})
        adapter = replace(state.adapter, pairs={**old, **pairs}, extra=moved_extras(state, changes))
        return replace(state, adapter=adapter, round=state.round + 1, base_delta=base_delta)

    def bundle(self, state: State, sent: Sequence[Update], weights: Sequence[float]) -> dict[str, Pair]:
        """Ā and B̄ in the first r directions, what they lose of the mean in the others."""
        found = {}
        for m, old in state.adapter.pairs.items():
            mean, lost = _mean_and_lost([u.adapter.pairs[m] for u in sent], weights, old)
            rest = compress(lost, scale=old.scale) if lost is not None else beyond(mean, mean.rank)
            found[m] = Pair(torch.cat([mean.A, rest.A]), torch.cat([mean.B, rest.B], dim=1), old.scale)
        return found


def _mean_and_lost(pairs: Sequence[Pair], weights: Sequence[float], old: Pair) -> tuple[Pair, Pair | None]:
    """The means of both factors, and all that they lose; a pair may bring what was lost before."""
    own, before = [truncate(pair, old.rank) for pair in pairs], [beyond(pair, old.rank) for pair in pairs]
    lost = covariance(own, weights, old.scale)
    terms = [(pair, w) for pair, w in zip(before, weights, strict=True) if pair.rank]
    if terms:
        terms += [(lost, 1.0)] if lost is not None else []
        lost = stack([pair for pair, _ in terms], [w for _, w in terms])
    return mean_factors(own, weights, old.scale), lost


def covariance(pairs: Sequence[Pair], weights: Sequence[float], scale: float) -> Pair | None:
    """Σ_k w_k s_k B_k A_k − scale · B̄ Ā as one pair of scale 1 and rank (K − 1) r, K the clients that count.

    Args:
        pairs: updates of one module and one rank.
        weights: one a pair, with sum 1.
        scale: of the product of the means, as in `mean_factors`.

    Returns None for a single client, which loses nothing.
    """
    terms, shares, total = list[Pair](), list[float](), 0.0
    mean: Pair | None = None
    for pair, w in zip(pairs, weights, strict=True):
        if w == 0:
            continue
        wide = Pair(pair.A.double(), pair.B.double(), pair.scale)
        own = mean_factors([wide], [1.0], scale)
        total += w
        if mean is None:
            mean = own
            continue
        terms.append(Pair(own.A - mean.A, own.B - mean.B, scale))
        shares.append((total - w) * w / total)
        mean = mean_factors([mean, own], [(total - w) / total, w / total])
    if not terms:
        return None
    found = stack(terms, shares)
    return Pair(found.A.to(pairs[0].A.dtype), found.B.to(pairs[0].B.dtype))
