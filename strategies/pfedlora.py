"""pFedLoRA: clients with models of their own, different ones even, and one small adapter that all share.

Yi, Yu, Wang, Liu, Li. "pFedLoRA: Model-Heterogeneous Personalized Federated Learning with LoRA Tuning". 2023.
https://arxiv.org/abs/2310.13283

    θ = Σ_k w_k θ_k

Client k has its own frozen base, its own local model ω_k on it, which it never sends, and the shared adapter
θ beside it. A round there has two phases (the client class `TwoPhase`): θ frozen, train ω_k with
μ ℓ(ŷ_θ, y) + (1 − μ) ℓ(ŷ_ω, y); then ω_k frozen, train θ.

Sends: θ up, θ down.
Differs from the paper: only its abstract was at hand. θ is one low-rank pair from a common width to the
labels, behind a projection that is fixed for each width of model; the paper's models are vision models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlora.core.messages import State, Update
from fedlora.core.strategy import Strategy, mean_adapter


@dataclass(frozen=True)
class PFedLoRA(Strategy):
    """For clients that cannot or will not run the same model; only a few thousand numbers travel."""

    mixed_ranks = False
    linear = True
    exact = False
    staleness = "effective"
    personal = True
    client = "TwoPhase"
    fixed_basis = True
    server_space = "factors"

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """Average θ: each factor by itself."""
        sent, w = self.admit(state, updates)
        return replace(state, adapter=mean_adapter(state, sent, w), round=state.round + 1)
