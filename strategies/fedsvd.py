"""FedSVD: FFA-LoRA whose A is no longer frozen for ever; the server turns it into what has been learned.

Lee, Park, Lee, Wagner, Seong, Bocklet, Lee, Hwang. "FedSVD: Adaptive Orthogonalization for Private Federated
Learning with LoRA". NeurIPS 2025. https://arxiv.org/abs/2505.12805

    B̄ = Σ_k w_k B_k,    s B̄ Â = U S Vᵀ,    Â ← V_{:r}ᵀ,    B̂ ← U_{:r} S_{:r} / s,    every `period` rounds

Clients train B alone beside one Â, so that B̄ Â is the exact mean; it has no more than r directions, so the
new factors hold all of it. The rows of Â are orthonormal: ‖Âx‖ ≤ ‖x‖, noise on B is not amplified, and every
direction learns. Two thin QRs and the SVD of an r × r core do it, never the dense matrix. Where B̄ = 0 any
orthonormal rows would do, and Â stays what it was; directions that B̄ Â lacks are padded with random ones.

Sends: B up; B down, and Â whenever it has changed.
Differs from the paper: mixed ranks. A client of rank r trains with the first r rows of one Â, its leading
directions, so that B padded with zero columns keeps the mean exact; without learning, direction i is then
multiplied each round by the weight of the clients whose rank reaches i. The head is trained and averaged
unless `lora.head=freeze`, which is the paper's setting. A rank above d_in cannot have orthonormal rows only:
those over it are random, of length 1.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlora.core.algebra import compress, mean_extras, pad_orthonormal
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy, slice_to_rank
from fedlora.ranges import check_whole
from fedlora.seeds import generator


@dataclass(frozen=True)
class FedSVD(Strategy):
    """The choice under differential privacy: an exact mean, one noisy factor, and an A that follows the data.

    Args:
        period: rounds between new factors, from 1; 0 never makes any, which is FFA-LoRA.
    """

    lr_factor = 2.0
    mixed_ranks = True
    linear = True
    exact = True
    staleness = "effective"
    server_space = "rank"

    period: int = 1

    def __post_init__(self) -> None:
        check_whole("strategy.period", self.period, 0)
        if not self.period:  # A stays for all versions, and with it what B's columns mean
            object.__setattr__(self, "staleness", "exact")
            object.__setattr__(self, "server_space", "factors")

    def task(self, state: State, peer: Peer) -> Task:
        """Both factors go down, B alone is trained and comes back."""
        return Task(
            slice_to_rank(state.adapter, peer),
            train=frozenset("B"),
            share=frozenset("B"),
            base_delta=state.base_delta,
        )

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """Average B, then give the product new factors where it is time."""
        sent, w = self.admit(state, updates)
        pairs, done = self.mean_of("B", state, sent, w), state.round + 1
        if self.period and done % self.period == 0:
            for m, pair in pairs.items():
                if pair.B.any():
                    fresh = generator(state.seed, "fedsvd", zlib.crc32(m.encode()), done)
                    pairs[m] = pad_orthonormal(compress(pair), pair.rank, fresh)
        extra = mean_extras([u.adapter.extra for u in sent], w)
        adapter = replace(state.adapter, pairs=pairs, extra=extra)
        return replace(state, adapter=adapter, round=done)
