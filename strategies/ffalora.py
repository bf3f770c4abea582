"""FFA-LoRA: one random A, frozen and shared by everybody; only B is trained and averaged.

Sun, Li, Li, Ding. "Improving LoRA in Privacy-preserving Federated Learning". ICLR 2024.
https://arxiv.org/abs/2403.12313

    B̄ = Σ_k w_k B_k,    Σ_k w_k s B_k A_0 = s B̄ A_0 exactly

Sends: B up, B down, and A_0 (the same bytes in every round; a client needs it once).
Differs from the paper: mixed ranks. A client of rank r trains with the first r rows of one A_0, so that B
padded with zero columns keeps the mean exact. The head is trained and averaged unless `lora.head=freeze`,
which is the paper's setting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedlora.adapter import Adapter, Pair
from fedlora.algebra import mean_extras, mean_tensors, pad, rescale
from fedlora.errors import IncompatibleUpdates
from fedlora.protocol import Peer, State, Task, Update
from fedlora.strategy import Strategy, cut


@dataclass(frozen=True)
class FFALoRA(Strategy):
    """Half the upload of FedIT and an exact mean; wants a larger learning rate, since only B learns."""

    mixed_ranks = True
    linear = True
    exact = True

    def task(self, state: State, peer: Peer) -> Task:
        """Both factors go down, B alone is trained and comes back."""
        return Task(cut(state.adapter, peer), train=frozenset("B"), share=frozenset("B"))

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """Average B, padded to the rank of A_0; A_0 stays as it is, bit for bit."""
        sent, w = self.admit(state, updates)
        pairs = {}
        for m, frozen in state.adapter.pairs.items():
            B = []
            for position, update in enumerate(sent):
                pair = update.adapter.pairs[m]
                if not torch.equal(pair.A, frozen.A[: pair.rank].to(pair.A.dtype)):
                    who = update.peer.id if update.peer else f"#{position}"
                    raise IncompatibleUpdates(
                        f"strategy FFALoRA: client {who} sent another A for '{m}' than the first "
                        f"{pair.rank} rows of the shared frozen A_0; every client must keep the A it was sent"
                    )
                B.append(pad(rescale(pair, frozen.scale), frozen.rank).B)
            mean = mean_tensors(B, w)
            pairs[m] = Pair(frozen.A.to(mean.dtype), mean, frozen.scale)
        return State(Adapter(pairs, mean_extras([u.adapter.extra for u in sent], w)), state.round + 1)
