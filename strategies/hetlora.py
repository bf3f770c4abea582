"""HetLoRA: zero-padded factors averaged by the size of each client's update; clients prune their own rank.

Cho, Liu, Xu, Fahrezi, Joshi. "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models".
EMNLP 2024. https://arxiv.org/abs/2401.06432

    client k gets    Ā[:r_k, :], B̄[:, :r_k]
    client k trains  F_k(A, B) + λ Σ_m ‖B[:, ⌊γr_k⌋:]‖_F · ‖A[⌊γr_k⌋:, :]‖_F
    and prunes       r_k ← ⌊γr_k⌋ if that tail, over all modules, came back lighter than it was sent
    server           Ā = Σ_k ω_k pad(A_k),  B̄ = Σ_k ω_k pad(B_k),  ω_k = ‖ΔW_k‖_F / Σ_j ‖ΔW_j‖_F

ω_k takes the place of the number of examples; all ω are equal where every ΔW_k is zero. A client of weight 0
counts for nothing. The head, which the paper does not treat, is averaged by examples.

Zero-padding dilutes twice: with nothing learned, σ_i is multiplied each round by p_i², p_i the ω of the
clients whose rank reaches i. `mean_over="holders"` divides each row by p_i instead, as in RBLA (Chen et al.,
2024, arXiv:2408.08699), and keeps a row that no sampled client holds.

Sends: A and B up and down, at the client's rank, which the server remembers by the client's id.
Differs from the paper: an update is s_k B_k A_k, and ΔW_k has its scale; s_k goes on B_k before the mean and
comes off B on the way down. Directions that no sampled client held come back as zero; they are
made new, with B = 0, so that they can learn again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedlora.core.adapter import Pair
from fedlora.core.algebra import (
    mean_extras,
    mean_factors,
    mean_rows,
    norm,
    normalised,
    pad,
    rescale,
    truncate,
)
from fedlora.core.changes import Change, Weigh, among_holders, cut_to, moved_extras, moved_products
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy, grow_rank, slice_to_rank
from fedlora.errors import ConfigError
from fedlora.ranges import check_number, check_whole
from fedlora.training.rules import RankPruning


@dataclass(frozen=True)
class HetLoRA(Strategy):
    """For clients of different ranks that may find that they need less; inexact, and it forgets the tail.

    Args:
        gamma: γ, above 0 and below 1: a pruning leaves ⌊γr⌋ directions, at γ = 0.99 one fewer of up to 100.
        penalty: λ, at least 0.
        least_rank: no client is pruned below this.
        weight_scope: ω from the norm over all modules ("model"), or each module's from its own ("module").
        mean_over: who counts in the mean of a direction: "all", with zero for those whose rank does not reach
            it, as published; or its "holders" alone.
    """

    gamma: float = 0.99
    penalty: float = 1e-3
    least_rank: int = 1
    weight_scope: Literal["model", "module"] = "model"
    mean_over: Literal["all", "holders"] = "all"

    mixed_ranks = True
    linear = False
    exact = False
    staleness = "effective"

    def __post_init__(self) -> None:
        check_number("HetLoRA.gamma", self.gamma, above=0, below=1)
        check_number("HetLoRA.penalty", self.penalty, least=0)
        check_whole("HetLoRA.least_rank", self.least_rank)
        if self.weight_scope not in ("model", "module"):
            raise ConfigError(f"HetLoRA.weight_scope: expected model or module, got '{self.weight_scope}'")
        if self.mean_over not in ("all", "holders"):
            raise ConfigError(f"HetLoRA.mean_over: expected all or holders, got '{self.mean_over}'")

    def task(self, state: State, peer: Peer) -> Task:
        """The first directions, as many as the client has left, and the rule of the tail."""
        peer = replace(peer, ranks=self._ranks(state, peer))
        return Task(
            slice_to_rank(grow_rank(state, peer), peer), base_delta=state.base_delta, method=(self._rule,)
        )

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """Average A and B, each by itself and weighted by norm; note who has pruned."""
        sent, w = self.admit(state, updates)
        heads = mean_extras([u.adapter.extra for u in sent], w)
        heard = [u for u, weight in zip(sent, w, strict=True) if weight > 0]
        omega = self._weights({m: [norm(u.adapter.pairs[m]) for u in heard] for m in state.adapter.pairs})
        pairs = {
            m: self._mean([u.adapter.pairs[m] for u in heard], omega[m], old)
            for m, old in state.adapter.pairs.items()
        }
        memory = {**state.memory, **self._prunings(state, heard)}
        metrics = {"prunings": float(sum(int(n) for n in memory.values()))}
        adapter = replace(state.adapter, pairs=pairs, extra=heads)
        return replace(state, adapter=adapter, round=state.round + 1, memory=memory, metrics=metrics)

    def apply_changes(self, state: State, changes: Sequence[Change]) -> State:
        """Σ_k ω_k s(τ_k) Δ_k is added, cut back to the largest rank; note who has pruned.

        ω_k are the norms of what the buffer's clients sent, of whatever version. What a client has pruned
        stays as it is: its tail was light against the tail that it was sent, which says nothing of D's.
        """
        changes = [one for one in self.admit_changes(state, changes) if one.share > 0]
        old, sent = state.adapter.pairs, [one.update for one in changes]
        omega = self._weights({m: [norm(u.adapter.pairs[m]) for u in sent] for m in old})
        place = {id(one): at for at, one in enumerate(changes)}
        weigh: Weigh = lambda one, m: one.factor * omega[m][place[id(one)]]  # noqa: E731
        if self.mean_over == "holders":
            weigh = among_holders(changes, lambda one, m: omega[m][place[id(one)]])
        whole = moved_products(state, changes, weigh)
        largest = {m: max(old[m].rank, *(u.adapter.pairs[m].rank for u in sent)) for m in old}
        pairs = {m: cut_to(state, m, pair, largest[m]) for m, pair in whole.items()}
        adapter = replace(state.adapter, pairs={**old, **pairs}, extra=moved_extras(state, changes))
        memory = {**state.memory, **self._prunings(state, sent)}
        metrics = {"prunings": float(sum(int(n) for n in memory.values()))}
        return replace(state, adapter=adapter, round=state.round + 1, memory=memory, metrics=metrics)

    def _weights(self, sizes: dict[str, list[float]]) -> dict[str, list[float]]:
        """Module -> ω, from module -> ‖ΔW_k‖_F."""
        if self.weight_scope == "model":
            whole = [math.hypot(*each) for each in zip(*sizes.values(), strict=True)]
            sizes = dict.fromkeys(sizes, whole)
        return {m: normalised(each if any(each) else [1.0] * len(each)) for m, each in sizes.items()}

    def _mean(self, pairs: Sequence[Pair], omega: Sequence[float], old: Pair) -> Pair:
        if self.mean_over == "all":
            # Who has no weight holds no direction: it would come out with both factors zero, and never learn.
            rank = max(pair.rank for pair, o in zip(pairs, omega, strict=True) if o > 0)
            return mean_factors([_of_rank(pair, rank) for pair in pairs], omega, old.scale)
        pairs = [rescale(pair, old.scale) for pair in pairs]
        A = mean_rows([pair.A for pair in pairs], omega, old.A)
        B = mean_rows([pair.B.T for pair in pairs], omega, old.B.T).T.contiguous()
        return Pair(A, B, old.scale)

    @property
    def _rule(self) -> RankPruning:
        return RankPruning(self.gamma, self.penalty, self.least_rank)

    def _ranks(self, state: State, peer: Peer) -> dict[str, int]:
        """A client's ranks after as many prunings as the server has seen of it."""
        ranks = {m: peer.ranks.get(m, peer.rank) for m in state.adapter.pairs}
        for _ in range(int(state.memory.get(_key(peer), 0))):
            ranks = {m: self._rule.pruned(rank) for m, rank in ranks.items()}
        return ranks

    def _prunings(self, state: State, updates: Sequence[Update]) -> dict[str, Tensor]:
        """The counts of the clients that have just pruned: they sent one pruning less than they were sent."""
        counts = {}
        for update in updates:
            if update.peer is None:
                continue
            before = self._ranks(state, update.peer)
            after = {m: self._rule.pruned(rank) for m, rank in before.items()}
            if before != after == {m: pair.rank for m, pair in update.adapter.pairs.items()}:
                counts[_key(update.peer)] = torch.tensor(int(state.memory.get(_key(update.peer), 0)) + 1)
        return counts


def _of_rank(pair: Pair, rank: int) -> Pair:
    """The first directions, and zeros where there are too few."""
    return pad(truncate(pair, rank), rank)


def _key(peer: Peer) -> str:
    return f"pruned.{peer.id}"
