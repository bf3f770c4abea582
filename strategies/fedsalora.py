"""FedSA-LoRA: A is shared, B and the head stay with the client that trained them.

Guo, Zeng, Wang, Fan, Wang, Qu. "Selective Aggregation for Low-Rank Adaptation in Federated Learning".
ICLR 2025. https://arxiv.org/abs/2410.01463

    client k trains A and B on W_0 + s B_k A,    server: Ā = Σ_k w_k A_k,    client j has s B_j Ā

A learns what clients have in common, B what is a client's own. Nobody's model is the global state: what the
run reports is the mean of the clients' own, each evaluated on rows that it keeps back. A client that is
sampled for the first time starts from the initial B, with A as it then is.

Sends: A up, A down; the initial B and head once to each client. The server receives no B and no head.
Differs from the paper: mixed ranks. A client of rank r has the first r rows of Ā, and row i is averaged over
the clients that hold it. There is no product at the server that zero-padding could keep exact; it would only
shrink the rows that few hold. Every client's scale is on its own B, so that A is averaged as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlora.core.adapter import Pair
from fedlora.core.algebra import mean_rows, pad
from fedlora.core.changes import Change, among_holders, moved_factors
from fedlora.core.messages import BOTH, Peer, State, Task, Update
from fedlora.core.strategy import Strategy, slice_to_rank


@dataclass(frozen=True)
class FedSALoRA(Strategy):
    """Half the traffic of FedIT, and a model for each client; for clients whose data differ."""

    mixed_ranks = True
    linear = False  # with one rank it would be: the weight that holds a row depends on who is sampled
    exact = False
    staleness = "exact"
    personal = True
    fixed_basis = True
    server_space = "factors"

    def task(self, state: State, peer: Peer) -> Task:
        """A to train and share; B and the head, where the client has none yet, to train and keep."""
        adapter = slice_to_rank(state.adapter, peer)
        personal = frozenset(adapter.extra)
        return Task(adapter, train=BOTH, share=frozenset("A"), personal=personal, base_delta=state.base_delta)

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """Average A; the initial B and head stay as they were, for clients yet to come."""
        sent, w = self.admit(state, updates)
        pairs = {}
        for m, old in state.adapter.pairs.items():
            A = mean_rows([u.adapter.pairs[m].A for u in sent], w, old.A)
            pairs[m] = Pair(A, pad(old, len(A)).B.to(A.dtype), old.scale)
        return replace(state, adapter=replace(state.adapter, pairs=pairs), round=state.round + 1)

    def apply_changes(self, state: State, changes: Sequence[Change]) -> State:
        """Each row of A moved by those who hold it; nobody turns A, so that all versions have one basis."""
        changes = self.admit_changes(state, changes)
        weigh = among_holders(changes, lambda change, module: change.share)
        adapter = replace(state.adapter, pairs=moved_factors(state, changes, weigh))
        return replace(state, adapter=adapter, round=state.round + 1)
