"""FLoRA: stacked updates of any ranks are merged into the base, and a fresh LoRA starts every round.

Wang, Shen, He, Sun, Wang, Lyu, Li. "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
Low-Rank Adaptations". NeurIPS 2024. https://arxiv.org/abs/2409.05976

    [w_1 s_1 B_1 | … | w_K s_K B_K] · [A_1; …; A_K] = Σ_k w_k s_k B_k A_k,    W ← W + that

Exact for all ranks and scales, the weight and the scale on one factor only. Fresh factors have B = 0, so
merging does not change the model; A has no gradient in a round's first step, and a round has no more
directions to learn than the client's rank.

Sends: A and B up; down the stack, of rank R = Σ_k r_k, and the fresh A and B. A client that missed a round
gets all that was merged so far, with min(d_out, d_in) directions at most.
Differs from the paper: each s_k is the client's own. All clients of a round start from one fresh A, of which
a client of rank r has the first r rows. What was merged is kept beside the base, in the precision of the
adapter, so that a base of bfloat16 or fewer bits loses none of it.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import accumulate, mean_extras, stack
from fedlora.core.base_delta import BaseDelta
from fedlora.core.changes import Change, gained, moved_extras
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy, slice_to_rank
from fedlora.seeds import generator


@dataclass(frozen=True)
class FLoRA(Strategy):
    """Exact for clients of different ranks; the download grows with the number of clients."""

    mixed_ranks = True
    linear = False
    exact = True
    staleness = "exact"
    products = True
    server_space = "base_delta"

    def init(self, adapter: Adapter, base_delta: Mapping[str, Pair] | None = None, seed: int = 0) -> State:
        """An adapter that has learned something (B ≠ 0) is merged too, and a fresh one takes its place."""
        merged, pairs = dict(base_delta or {}), dict(adapter.pairs)
        for m, pair in adapter.pairs.items():
            if pair.B.any():
                merged[m] = accumulate(merged.get(m), pair)
                pairs[m] = _fresh(m, pair, seed, 0)
        return State(replace(adapter, pairs=pairs), base_delta=merged, seed=seed)

    def task(self, state: State, peer: Peer) -> Task:
        """The fresh factors at the peer's rank, on the base with all that was merged."""
        return Task(slice_to_rank(state.adapter, peer), base_delta=state.base_delta)

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """Stack, merge, start anew."""
        sent, w = self.admit(state, updates)
        done, old = state.round + 1, state.adapter.pairs
        gain = {m: stack([u.adapter.pairs[m] for u in sent], w) for m in old}
        base_delta = BaseDelta.of(state.base_delta).plus(gain)
        fresh = {m: _fresh(m, pair, state.seed, done) for m, pair in old.items()}
        extra = mean_extras([u.adapter.extra for u in sent], w)
        adapter = replace(state.adapter, pairs=fresh, extra=extra)
        return replace(state, adapter=adapter, round=done, base_delta=base_delta)

    def apply_changes(self, state: State, changes: Sequence[Change]) -> State:
        """Merge Σ_k c_k Δ_k, where Δ_k is all of s_k B_k A_k, since every client starts with B = 0."""
        changes, done = self.admit_changes(state, changes), state.round + 1
        gain = {m: pair for m in state.adapter.pairs if (pair := gained(changes, m)) is not None}
        fresh = {m: _fresh(m, pair, state.seed, done) for m, pair in state.adapter.pairs.items()}
        adapter = replace(state.adapter, pairs=fresh, extra=moved_extras(state, changes))
        base_delta = BaseDelta.of(state.base_delta).plus(gain)
        return replace(state, adapter=adapter, round=done, base_delta=base_delta)


def _fresh(module: str, like: Pair, seed: int, round: int) -> Pair:
    """A new pair of the same form: A uniform in ±1/√d_in, which is PEFT's Kaiming with a = √5, and B zero."""
    rng, bound = generator(seed, "flora", zlib.crc32(module.encode()), round), like.shape[1] ** -0.5
    A = torch.from_numpy(rng.uniform(-bound, bound, tuple(like.A.shape))).to(like.A)
    return Pair(A, torch.zeros_like(like.B), like.scale)
