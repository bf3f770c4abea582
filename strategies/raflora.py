"""raFLoRA: FlexLoRA whose mean counts, for each direction, only the clients whose rank reaches it.

Wu, Hu, Min, Wang. "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity".
2026. https://arxiv.org/abs/2602.13486

With the candidate ranks 0 = h_0 < h_1 < … and l the one before h,

    D = Σ_h Σ_{k: r_k ≥ h} (w_k / N_h) s_k B_k[:, l:h] A_k[l:h, :],   N_h = Σ_{k: r_k ≥ h} w_k
    D = U S Vᵀ,   client j gets A_j = V_{:r_j}ᵀ, B_j = U_{:r_j} S_{:r_j} / s_j

Every candidate rank lies on a boundary of the partition, so that between two of them the same clients hold
every direction i, and N_h is p_i = Σ_{k: r_k ≥ i} w_k. Here each direction is divided by its own p_i: the
same D, with no list of candidates to configure or to read off the clients that happen to be sampled.

A round in which nobody learns is the identity, where FlexLoRA multiplies σ_i by p_i. The mean is taken by
position in the rank, so it depends on clients starting from the same ordered directions.

Sends: A and B up at the client's rank, A and B down at the client's rank.
Differs from the paper: every s_k is the client's own; directions that no sampled client holds stay as they
were instead of being lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedlora.core.adapter import Pair
from fedlora.core.algebra import beyond, held, mean_extras, weighted_sum
from fedlora.core.changes import Change, among_holders, moved_whole
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy, grow_rank, slice_to_rank


@dataclass(frozen=True)
class RaFLoRA(Strategy):
    """FlexLoRA without its rank collapse, at the same cost; no longer the mean of the clients' updates."""

    mixed_ranks = True
    linear = False
    exact = False
    staleness = "effective"
    server_space = "product"

    def task(self, state: State, peer: Peer) -> Task:
        """The leading directions of D; where D has fewer than the client's rank, fresh ones with B = 0."""
        return Task(slice_to_rank(grow_rank(state, peer), peer), base_delta=state.base_delta)

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """Each direction's mean over those who hold it, then the SVD."""
        sent, w = self.admit(state, updates)
        pairs = {
            m: _partitioned([u.adapter.pairs[m] for u in sent], w, old)
            for m, old in state.adapter.pairs.items()
        }
        extra = mean_extras([u.adapter.extra for u in sent], w)
        adapter = replace(state.adapter, pairs=pairs, extra=extra)
        return replace(state, adapter=adapter, round=state.round + 1)

    def apply_changes(self, state: State, changes: Sequence[Change]) -> State:
        """D + Σ_k c_k Δ_k, in each direction over the updates that hold it; the same rule as `aggregate`."""
        changes = self.admit_changes(state, changes)
        weigh = among_holders(changes, lambda change, module: change.share)
        return moved_whole(state, changes, weigh)


def _partitioned(pairs: Sequence[Pair], weights: Sequence[float], old: Pair) -> Pair:
    """D, with the old directions that are beyond every client's rank."""
    p = held([pair.rank for pair in pairs], weights, max(pair.rank for pair in pairs))
    shares = [torch.where(p > 0, w / p, 0.0)[: pair.rank] for pair, w in zip(pairs, weights, strict=True)]
    unheld = beyond(old, int((p > 0).sum()))
    return weighted_sum([*pairs, unheld], [*shares, 1.0], old.scale)
