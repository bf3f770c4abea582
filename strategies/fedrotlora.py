"""FedRot-LoRA: clients' factors are rotated into the same frame before FedIT averages them.

Zhang, Kim, Cha, Vikalo. "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA". ICML 2026.
https://arxiv.org/abs/2602.23638

    odd rounds:     M = A_k A_refᵀ,    even rounds:    M = B_kᵀ B_ref
    M = U Σ Vᵀ,    R_k = U Vᵀ with det R_k = +1,    Ã_k = R_kᵀ A_k,    B̃_k = B_k R_k
    Ā = Σ_k w_k Ã_k,    B̄ = Σ_k w_k B̃_k

(A_ref, B_ref) are the factors that the round began with, R_k is the rotation that brings A_k (or B_k) nearest
to them (orthogonal Procrustes). B̃_k Ã_k = B_k A_k: only the mean of the factors changes, and FedIT's error
with it. Softly, with blend λ, R_k gives way to the rotation nearest to (1 − λ) I + λ R_k. Where B_ref = 0, as
in the first round, there is no reference, and nothing is rotated.

Sends: A and B up, A and B down, as FedIT.
Differs from the paper: the server rotates, which is the same arithmetic. With another scale s_k, B_k
counts as (s_k / s) B_k, as in FedIT.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedlora.core.adapter import Pair
from fedlora.core.algebra import mean_extras, mean_factors
from fedlora.core.messages import State, Update
from fedlora.core.strategy import Strategy
from fedlora.core.threads import one_thread
from fedlora.ranges import check_number


@dataclass(frozen=True)
class FedRotLoRA(Strategy):
    """FedIT's messages and less of its error, where clients have turned their factors apart; one rank only.

    Args:
        blend: λ from 0, which is FedIT, to 1, the whole rotation; the paper finds .4 to .6 best.
    """

    mixed_ranks = False
    linear = False
    exact = False
    staleness = "effective"
    server_space = "factors"

    blend: float = 1.0

    def __post_init__(self) -> None:
        check_number("strategy.blend", self.blend, least=0, most=1, what="share")

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """Rotate each client's pair towards the reference, then average A and B, each by itself."""
        sent, w = self.admit(state, updates)
        side: Literal["A", "B"] = "A" if (state.round + 1) % 2 else "B"
        pairs = {}
        for m, reference in state.adapter.pairs.items():
            own = [u.adapter.pairs[m] for u in sent]
            if self.blend and reference.B.any():
                own = [aligned(pair, reference, side, self.blend) for pair in own]
            pairs[m] = mean_factors(own, w, reference.scale)
        extra = mean_extras([u.adapter.extra for u in sent], w)
        adapter = replace(state.adapter, pairs=pairs, extra=extra)
        return replace(state, adapter=adapter, round=state.round + 1)


def aligned(pair: Pair, reference: Pair, side: Literal["A", "B"], blend: float = 1.0) -> Pair:
    """The same ΔW in the reference's scale, its factors rotated so that those of one side come near to it."""
    A, B = pair.A.double(), pair.B.double() * (pair.scale / reference.scale)
    R = rotation(A @ reference.A.double().T if side == "A" else B.T @ reference.B.double())
    if blend < 1:
        R = rotation((1 - blend) * torch.eye(pair.rank, dtype=R.dtype, device=R.device) + blend * R)
    return Pair((R.T @ A).to(pair.A.dtype), (B @ R).to(pair.B.dtype), reference.scale)


@one_thread()
def rotation(M: Tensor) -> Tensor:
    """The R with RᵀR = I and det R = +1 that is nearest to M, which maximises tr RᵀM; float64.

    Of several, as where the rank is above the layer's sides, the one that turns least.
    """
    U, sigma, Vh = torch.linalg.svd(M)
    k = int((sigma > 1e-12 * sigma[0]).sum())
    inner = torch.linalg.svd(U[:, k:].T @ Vh[k:].T)  # M says nothing of these: nearest to the identity
    U = torch.cat([U[:, :k], U[:, k:] @ inner.U], dim=1)
    Vh = torch.cat([Vh[:k], inner.Vh @ Vh[k:]])
    R: Tensor = U @ Vh
    if torch.linalg.det(R) < 0:
        R = U @ torch.cat([Vh[:-1], -Vh[-1:]])  # the direction that matters least
    return R
