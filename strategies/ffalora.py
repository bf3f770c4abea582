"""FFA-LoRA: one random A, frozen and shared by everybody; only B is trained and averaged.

Sun, Li, Li, Ding. "Improving LoRA in Privacy-preserving Federated Learning". ICLR 2024.
https://arxiv.org/abs/2403.12313

    B̄ = Σ_k w_k B_k,    Σ_k w_k s B_k A_0 = s B̄ A_0 exactly

Sends: B up, B down, and A_0 once to each client, which keeps it.
Differs from the paper: mixed ranks. A client of rank r trains with the first r rows of one A_0, so that B
padded with zero columns keeps the mean exact; without learning, column i is then multiplied each round by the
weight of the clients whose rank reaches i. The head is trained and averaged unless `lora.head=freeze`, which
is the paper's setting.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlora.core.algebra import mean_extras
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy, slice_to_rank


@dataclass(frozen=True)
class FFALoRA(Strategy):
    """Half the upload of FedIT and an exact mean; wants a larger learning rate, since only B learns."""

    lr_factor = 5.0
    mixed_ranks = True
    linear = True
    exact = True
    fixed_basis = True

    def task(self, state: State, peer: Peer) -> Task:
        """Both factors go down, B alone is trained and comes back."""
        return Task(
            slice_to_rank(state.adapter, peer),
            train=frozenset("B"),
            share=frozenset("B"),
            base_delta=state.base_delta,
        )

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """Average B, padded to the rank of A_0; A_0 stays as it is, bit for bit."""
        sent, w = self.admit(state, updates)
        pairs = self.mean_of("B", state, sent, w)
        extra = mean_extras([u.adapter.extra for u in sent], w)
        adapter = replace(state.adapter, pairs=pairs, extra=extra)
        return replace(state, adapter=adapter, round=state.round + 1)
