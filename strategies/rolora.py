"""RoLoRA: B and A take turns, a round each; the other factor stays frozen, and the same for all.

Chen, Guo, Ju, Dalal, Zhu, Khisti. "Robust Federated Finetuning of LLMs via Alternating Optimization of
LoRA". NeurIPS 2025. https://arxiv.org/abs/2502.01755

    odd rounds:     B ← Σ_k w_k B_k,    Σ_k w_k s B_k A = s B̄ A exactly
    even rounds:    A ← Σ_k w_k A_k,    Σ_k w_k s B A_k = s B Ā exactly

B comes first, since with B = 0 there is no gradient for A. The number of rounds that the state has behind it
says whose turn it is, for every client alike, however often it was sampled. After one round the state is
FFA-LoRA's.

Sends: up, the factor of the round; down, the factor that the last round changed, and both to a client that
was not in it.
Differs from the paper: mixed ranks. A client of rank r trains with the first r directions of both factors, so
that the trained one padded with zeros keeps the mean exact; without learning, direction i is then multiplied
each round by the weight of the clients whose rank reaches i.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedlora.core.algebra import mean_extras
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy, slice_to_rank


@dataclass(frozen=True)
class RoLoRA(Strategy):
    """An exact mean each round at half the bytes of FedIT, and unlike FFA-LoRA it learns A too."""

    lr_factor = 2.0
    mixed_ranks = True
    linear = True
    exact = True
    staleness = "effective"
    server_space = "factors"

    def task(self, state: State, peer: Peer) -> Task:
        """Both factors, one of them to train and to send back."""
        turn = frozenset(_turn(state))
        return Task(slice_to_rank(state.adapter, peer), train=turn, share=turn, base_delta=state.base_delta)

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """Average the factor of the round; the other stays as it is, bit for bit."""
        sent, w = self.admit(state, updates)
        pairs = self.mean_of(_turn(state), state, sent, w)
        extra = mean_extras([u.adapter.extra for u in sent], w)
        adapter = replace(state.adapter, pairs=pairs, extra=extra)
        return replace(state, adapter=adapter, round=state.round + 1)


def _turn(state: State) -> Literal["A", "B"]:
    """The factor that is trained in the state's next round, counted from 1: B in odd ones."""
    return "B" if (state.round + 1) % 2 else "A"
