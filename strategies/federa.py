"""FeDeRA: FedIT from the principal components of the pretrained weights.

Yan, Yang, Tang, Shi. "FeDeRA: Efficient Fine-tuning of Language Models in Federated Learning Leveraging
Weight Decomposition". 2024. https://arxiv.org/abs/2404.18848

    W_0 = U S Vᵀ,    B_0 = U_{:r} (S_{:r} / s)^½,    A_0 = (S_{:r} / s)^½ V_{:r}ᵀ,    W_f = W_0 − s B_0 A_0
    Ā = Σ_k w_k A_k,    B̄ = Σ_k w_k B_k

Clients train A and B on the frozen W_f, so that the model before round 1 is the pretrained one. The start is
made once, by whoever starts the run (fedlora.models.initialization), and −s B_0 A_0 goes down with the first
task as the base delta: SVDs of two machines may differ in sign, and factors of other signs cannot be
averaged.

What comes out is a plain LoRA adapter of rank 2r for W_0: s B̄ Ā − s B_0 A_0 = [s B̄, −s B_0] [Ā; A_0].

Sends: A and B up, A and B down, and A_0 and B_0 once more to each client, which keeps them.
Differs from the paper: nothing in the rule. From an adapter without a base delta it is FedIT.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlora.core.messages import State, Update
from fedlora.core.strategy import Strategy, mean_adapter


@dataclass(frozen=True)
class FeDeRA(Strategy):
    """FedIT that starts where the weights already point; one rank only, since no cut of A_0, B_0 fits W_f."""

    mixed_ranks = False
    linear = True
    exact = False
    staleness = "effective"
    fixed_basis = True
    start = "pissa"
    server_space = "factors"

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """Average A and B, each by itself; W_f stays."""
        sent, w = self.admit(state, updates)
        return replace(state, adapter=mean_adapter(state, sent, w), round=state.round + 1)
