"""FedFold: clients of any rank train a few directions of one update, the rest folded into their base.

Our own method. It starts from FlexLoRA (Bai et al., NeurIPS 2024, arXiv:2402.11505), and hands each client
the rest of the update too, frozen, as Fed-PLoRA does with whole rank-1 modules (Zhang et al., ICLR 2026,
arXiv:2602.16936).

The server holds the whole update D* = Σ_i σ_i u_i v_iᵀ, in the order of σ. A client of rank r splits it,

    D* = [D*]_l + (D* − [D*]_l),    l ≤ r,

trains the first l directions as its pair, s B_in A_in = [D*]_l, and has the others, its base delta, added to
the frozen base. The r − l rows of A that are left are fresh ones, with B = 0. Whatever its rank, it starts
from the model W_0 + D* itself, and ends at W_0 + D* − [D*]_l + s B A. The mean of where the clients end is

    D*_new = Σ_k w_k (D* − [D*]_{l_k} + s_k B_k A_k)
           = Σ_k w_k s_k B_k A_k + Σ_i (1 − p_i) σ_i u_i v_iᵀ,    p_i = Σ_{k: l_k ≥ i} w_k,

FlexLoRA's mean and exactly what it loses. What client k started from needs D* and r_k only, so the server
works it out and no client sends it. Hence, for any mix of ranks and whoever is sampled:

    exact          D*_new is the mean of the clients' models, and an SVD in factor space loses none of it;
    still          if nobody learns, s_k B_k A_k = [D*]_{l_k} and D*_new = D*; FlexLoRA's σ_i becomes p_i σ_i,
                   zero-padding's p_i² σ_i;
    no collapse    a direction is moved by those who train it, in proportion to p_i, and let be by the others.

`fresh` is the share of a rank that goes to new directions, l = ⌊(1 − fresh) r⌋. With none, the leading ones
are refined for ever: an error that is orthogonal to them in rows and columns has no gradient there, and D*
stops near the best update of the largest rank. With some, every direction gets its turn, and D* goes on to
any rank. With all of it the method is FLoRA's, on one A that everybody shares.

The cost is the way down, rank(D*) (d_out + d_in) numbers instead of r (d_out + d_in). rank(D*) grows by
Σ_k r_k a round at most, to min(d_out, d_in) at most; directions below the rounding of the dtype are dropped,
so that it does not grow where nothing is learned. `energy` caps what is sent: only the first q directions
leave the server, q the fewest with Σ_{i≤q} σ_i² ≥ energy · ‖D*‖²_F (or l, if that is more). The sum above is
the same, so the still round stays the identity and nothing is lost; but a client then starts from [D*]_q, and
what it cannot see it cannot correct. At energy 0 the traffic is FlexLoRA's.

Sends: A and B up at the client's rank; A and B down at the client's rank, and the base delta.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import accumulate, beyond, compress, held, mean_extras, truncate, weighted_sum
from fedlora.core.changes import Change, moved_whole
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy, grow_rank, slice_to_rank
from fedlora.ranges import check_number


@dataclass(frozen=True)
class FedFold(Strategy):
    """Exact for any mix of ranks, and forgets nothing; the download grows with the rank of what is learned.

    Args:
        fresh: share of a client's rank that goes to new directions instead of the leading ones, from 0 to 1.
        energy: share of ‖D*‖²_F that a client of a small rank is sent, from 0 to 1; 1 sends all and is exact.
    """

    fresh: float = 0.5
    energy: float = 1.0

    mixed_ranks = True
    linear = False
    exact = True
    staleness = "exact"
    server_space = "product"

    def __post_init__(self) -> None:
        for name in ("fresh", "energy"):
            check_number(f"FedFold.{name}", getattr(self, name), least=0, most=1)
        if self.energy < 1:  # a client then starts from less than D*, and the mean is not of where it ends
            object.__setattr__(self, "exact", False)

    def init(self, adapter: Adapter, base_delta: Mapping[str, Pair] | None = None, seed: int = 0) -> State:
        """D* is the adapter, in the order of its singular values; LoRA's own start, with B = 0, as it is."""
        pairs = {m: compress(pair) if pair.B.any() else pair for m, pair in adapter.pairs.items()}
        return State(replace(adapter, pairs=pairs), base_delta=base_delta or {}, seed=seed)

    def task(self, state: State, peer: Peer) -> Task:
        """The leading directions and fresh ones with B = 0 to train; the rest is the base delta."""
        pairs, base_delta = {}, dict(state.base_delta)
        for m, D in state.adapter.pairs.items():
            led = self._led(peer.ranks.get(m, peer.rank))
            pairs[m] = truncate(D, led)
            rest = beyond(truncate(D, self._reach(D)), led)
            if rest.rank:
                base_delta[m] = accumulate(base_delta.get(m), rest)
        first = replace(state, adapter=replace(state.adapter, pairs=pairs))
        return Task(slice_to_rank(grow_rank(first, peer), peer), base_delta=base_delta)

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """D*_new, by the SVD of its core."""
        sent, w = self.admit(state, updates)
        pairs = {}
        for m, D in state.adapter.pairs.items():
            p = held([self._led(_given(u, m)) for u in sent], w, D.rank)
            pairs[m] = weighted_sum([*(u.adapter.pairs[m] for u in sent), D], [*w, 1 - p], D.scale)
        extra = mean_extras([u.adapter.extra for u in sent], w)
        adapter = replace(state.adapter, pairs=pairs, extra=extra)
        return replace(state, adapter=adapter, round=state.round + 1, metrics=_rank(adapter))

    def apply_changes(self, state: State, changes: Sequence[Change]) -> State:
        """D* + Σ_k c_k Δ_k, which is `aggregate`'s own rule where all have started from D*."""
        moved = moved_whole(state, self.admit_changes(state, changes))
        return replace(moved, metrics=_rank(moved.adapter))

    def bundle(self, state: State, sent: Sequence[Update], weights: Sequence[float]) -> dict[str, Pair]:
        """The mean of what clients change, s_k B_k A_k − [D*]_{l_k}: D* itself then counts whole."""
        found = {}
        for m, D in state.adapter.pairs.items():
            p = held([self._led(_given(u, m)) for u in sent], weights, D.rank)
            found[m] = weighted_sum([*(u.adapter.pairs[m] for u in sent), D], [*weights, -p], D.scale)
        return found

    def _led(self, rank: int) -> int:
        """l, how many leading directions a client of this rank trains."""
        return max(0, math.floor((1 - self.fresh) * rank + 1e-9))

    def _reach(self, D: Pair) -> int:
        """q, the fewest directions that have the energy; the sum begins at the small end, for accuracy."""
        squares = (D.B.double().norm(dim=0) * D.A.double().norm(dim=1)).square()
        tail = squares.flip(0).cumsum(0).flip(0)
        return int((tail > (1 - self.energy) * tail[0]).sum())


def _given(update: Update, module: str) -> int:
    """r, the rank that a client was given; where the update names no client, the rank that it sent.

    0 for what stands for several clients, which is a change and leads no direction.
    """
    if update.several:
        return 0
    if update.peer is None:
        return update.adapter.pairs[module].rank
    return update.peer.ranks.get(module, update.peer.rank)


def _rank(adapter: Adapter) -> dict[str, float]:
    """The mean rank of D*, for the round's line."""
    return {"rank": fmean(pair.rank for pair in adapter.pairs.values())} if adapter.pairs else {}
