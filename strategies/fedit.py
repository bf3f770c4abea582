"""FedIT: federated averaging of both LoRA factors.

Zhang, Vahidian, Kuo, Li, Zhang, Yu, Wang, Chen. "Towards Building the Federated GPT: Federated Instruction
Tuning". ICASSP 2024. https://arxiv.org/abs/2305.05644

    Ā = Σ_k w_k A_k,    B̄ = Σ_k w_k B_k,    w_k = n_k / Σ n

Not the mean of the clients' updates: Σ_k w_k B_k A_k − B̄ Ā = Σ_k w_k (B_k − B̄)(A_k − Ā), the weighted
cross-covariance of the factors. The run reports this error each round as `aggregation_error`.

Sends: A and B up, A and B down.
Differs from the paper: nothing. Clients have one rank; with another scale s_k, B_k counts as (s_k / s) B_k.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlora.core.messages import State, Update
from fedlora.core.strategy import Strategy, mean_adapter


@dataclass(frozen=True)
class FedIT(Strategy):
    """The baseline, FedAvg on A and on B; good with few clients of similar data, and with one rank only."""

    mixed_ranks = False
    linear = True
    exact = False
    fixed_basis = True

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """Average A and B, each by itself."""
        sent, w = self.admit(state, updates)
        return replace(state, adapter=mean_adapter(state, sent, w), round=state.round + 1)
