"""FlexLoRA: the mean of the full updates, handed down to each client by SVD at the client's rank.

Bai, Chen, Qian, Yao, Li. "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources". NeurIPS 2024. https://arxiv.org/abs/2402.11505

    D* = Σ_k w_k s_k B_k A_k = U S Vᵀ,    client j gets A_j = V_{:r_j}ᵀ, B_j = U_{:r_j} S_{:r_j} / s_j

The server keeps D* whole, as factors: thin QRs of the stacked factors and the SVD of their small core give
the same U, S, Vᵀ as the dense matrix. Client j gets the best approximation of its rank (Eckart–Young).
Directions that only clients of a large rank hold shrink: with nothing learned, σ_i is multiplied each round
by the weight of the clients whose rank reaches i.

Sends: A and B up at the client's rank, A and B down at the client's rank.
Differs from the paper: every s_k is the client's own (the authors' code divides by one alpha for all).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlora.core.algebra import mean_extras, weighted_sum
from fedlora.core.changes import Change, moved_whole
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy, grow_rank, slice_to_rank


@dataclass(frozen=True)
class FlexLoRA(Strategy):
    """The choice for clients of different ranks; exact at the server, truncated at the client's rank."""

    mixed_ranks = True
    linear = False
    exact = True
    staleness = "exact"
    products = True
    server_space = "product"

    def task(self, state: State, peer: Peer) -> Task:
        """The leading directions of D*; where D* has fewer than the client's rank, fresh ones with B = 0."""
        return Task(slice_to_rank(grow_rank(state, peer), peer), base_delta=state.base_delta)

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """D* in factors, by the SVD of its core."""
        sent, w = self.admit(state, updates)
        pairs = {
            m: weighted_sum([u.adapter.pairs[m] for u in sent], w, old.scale)
            for m, old in state.adapter.pairs.items()
        }
        extra = mean_extras([u.adapter.extra for u in sent], w)
        adapter = replace(state.adapter, pairs=pairs, extra=extra)
        return replace(state, adapter=adapter, round=state.round + 1)

    def apply_changes(self, state: State, changes: Sequence[Change]) -> State:
        """D* + Σ_k c_k Δ_k, whole."""
        return moved_whole(state, self.admit_changes(state, changes))
