"""SLoRA: rounds of sparse fine-tuning first, whose result starts the LoRA rounds.

Babakniya, Elkordy, Ezzeldin, Liu, Song, El-Khamy, Avestimehr. "SLoRA: Federated Parameter Efficient
Fine-Tuning of Language Models". FL@FM-NeurIPS 2023. https://arxiv.org/abs/2308.06522

    rounds 1 .. R1:   W = W_0 + M ⊙ V,    V̄ = Σ_k w_k V_k        one random mask M a layer, the same for all
    after R1:         Δ = M ⊙ V̄ = U S Vᵀ,    B_0 = U_{:r} S_{:r} / s,    A_0 = V_{:r}ᵀ
    then:             FedIT from (A_0, B_0), or FlexLoRA where ranks differ

M is drawn from the run's seed, without a look at any data, so that values alone are ever sent; what M leaves
out of a weight cannot move. The SVD of a matrix of random support is nearly flat: how much of Δ the rank r
keeps is reported at the hand-over, as `energy_kept` = Σ_m ‖s B_0 A_0‖² / Σ_m ‖Δ‖².

Sends: the values of V up and down, then A and B up and down; the head in all rounds.
Differs from the paper: the density is by default that of the LoRA budget, r(d_out + d_in) values a layer, so
that a round costs the same in both stages. Directions that Δ lacks up to r are random, with B = 0. An adapter
with B ≠ 0 that the run starts from is held fixed in the first stage and counts towards Δ.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import (
    accumulate,
    compress,
    mean_extras,
    mean_factors,
    negative,
    norm,
    of_dense,
    pad_orthonormal,
    stack,
    weighted_sum,
)
from fedlora.core.changes import Change, moved_whole
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy, grow_rank, slice_to_rank
from fedlora.errors import ConfigError
from fedlora.models.parametrizations import Sparse, composed
from fedlora.models.parametrizations.sparse import places, spread
from fedlora.ranges import check_number, check_whole
from fedlora.seeds import generator


@dataclass(frozen=True)
class SLoRA(Strategy):
    """A start for LoRA that the clients' own data has found, for label skew that plain LoRA is slow on.

    Args:
        sparse_rounds: R1, the rounds of sparse fine-tuning; 0 is FedIT or FlexLoRA from the first round.
        density: the share of a layer's weights that M has; None takes r(d_out + d_in) of them, r the largest
            rank of the run.
        keep_residual: what the rank r does not keep of Δ stays in the base, Δ − s B_0 A_0, instead of being
            dropped as in the paper; every client downloads it once, dense.
        second: the rounds after: "fedit", or "flexlora" for clients of different ranks.

    Raises:
        ConfigError: a field is out of its range.
    """

    mixed_ranks = False
    linear = True
    exact = False
    server_space = "factors"

    sparse_rounds: int = 2
    density: float | None = None
    keep_residual: bool = False
    second: Literal["fedit", "flexlora"] = "fedit"

    def __post_init__(self) -> None:
        check_whole("strategy.sparse_rounds", self.sparse_rounds, 0)
        check_number("strategy.density", self.density, above=0, most=1, none=True, what="share")
        if self.second not in ("fedit", "flexlora"):
            raise ConfigError(f"strategy.second: expected fedit or flexlora, got '{self.second}'")
        if self.second == "flexlora":
            # The facts follow the second stage: D* of any ranks, by an SVD; exact if the hand-over is.
            facts = {
                "mixed_ranks": True,
                "linear": False,
                "products": True,
                "server_space": "product",
                "exact": self.keep_residual or not self.sparse_rounds,
            }
            for fact, value in facts.items():
                object.__setattr__(self, fact, value)
        if not self.sparse_rounds:  # else a change of the first stage may come in the second
            object.__setattr__(self, "staleness", "exact" if self.second == "flexlora" else "effective")

    def init(self, adapter: Adapter, base_delta: Mapping[str, Pair] | None = None, seed: int = 0) -> State:
        """The state before round 1, with all values of the mask zero.

        Raises:
            ConfigError: there is a base delta, and the first stage trains the base itself.
        """
        state = super().init(adapter, base_delta, seed)
        if not self.sparse_rounds:
            return state
        if state.base_delta:
            raise ConfigError(
                "strategy SLoRA finds its own start by sparse fine-tuning of the base; "
                "use lora.init=lora, or strategy.sparse_rounds=0"
            )
        zeros = {f"{m}.sparse": pair.A.new_zeros(self._places(pair)) for m, pair in adapter.pairs.items()}
        return replace(state, memory=zeros)

    def task(self, state: State, peer: Peer) -> Task:
        """First the values and the head, on the frozen base; then the client's cut of A and B."""
        own = slice_to_rank(grow_rank(state, peer) if self.second == "flexlora" else state.adapter, peer)
        if state.round >= self.sparse_rounds:
            return Task(own, base_delta=state.base_delta)
        values = {name: tensor.clone() for name, tensor in state.memory.items()}
        held = {m: stack([pair], [1.0]) for m, pair in state.adapter.pairs.items() if pair.B.any()}
        form = composed(Sparse(state.seed), state.adapter.parametrization)
        return Task(Adapter({}, {**own.extra, **values}, form), frozenset(), frozenset(), base_delta=held)

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """The mean of the values, until they become factors; then FedIT's or FlexLoRA's step."""
        if state.round < self.sparse_rounds:
            return self._sparse(state, updates)
        sent, w = self.admit(state, updates)
        combine = weighted_sum if self.second == "flexlora" else mean_factors
        pairs = {
            m: combine([u.adapter.pairs[m] for u in sent], w, old.scale)
            for m, old in state.adapter.pairs.items()
        }
        extra = mean_extras([u.adapter.extra for u in sent], w)
        adapter = replace(state.adapter, pairs=pairs, extra=extra)
        return replace(state, adapter=adapter, round=state.round + 1, metrics={})

    def apply_changes(self, state: State, changes: Sequence[Change]) -> State:
        """FedIT's rule for changes, or FlexLoRA's, which keeps D* whole."""
        if self.second == "fedit":
            return super().apply_changes(state, changes)
        return moved_whole(state, self.admit_changes(state, changes))

    def _sparse(self, state: State, updates: Sequence[Update]) -> State:
        """One round of the first stage; the last one ends in the hand-over."""
        sent, w = self.admit(state, updates, Adapter({}, {**state.adapter.extra, **state.memory}))
        mean = mean_extras([u.adapter.extra for u in sent], w)
        values = {name: mean.pop(name) for name in state.memory}
        base_delta = {}
        for m, pair in state.adapter.pairs.items():
            own = values[f"{m}.sparse"]
            where = places(state.seed, m, pair.shape, len(own)).to(own.device)
            base_delta[m] = of_dense(spread(own, where, pair.shape))
        trained = replace(state.adapter, extra=mean)
        new = replace(state, adapter=trained, round=state.round + 1, base_delta=base_delta, memory=values)
        return self._handed_over(new) if new.round == self.sparse_rounds else new

    def _handed_over(self, state: State) -> State:
        """Make the best A_0 and B_0 of the rank for Δ, and drop the rest or keep it in the base."""
        pairs, rest, all_of_it, kept = {}, {}, 0.0, 0.0
        for m, old in state.adapter.pairs.items():
            total = accumulate(old, state.base_delta[m]) if old.B.any() else state.base_delta[m]
            best = compress(total, old.rank, old.scale)
            rng = generator(state.seed, "refill", zlib.crc32(m.encode()), state.round)
            pairs[m] = pad_orthonormal(best, old.rank, rng)
            all_of_it, kept = all_of_it + norm(total) ** 2, kept + norm(best) ** 2
            if self.keep_residual:
                rest[m] = accumulate(total, negative(best))
        metrics = {"energy_kept": kept / all_of_it if all_of_it else 1.0}
        adapter = replace(state.adapter, pairs=pairs)
        return replace(state, adapter=adapter, base_delta=rest, memory={}, metrics=metrics)

    def _places(self, pair: Pair) -> int:
        """How many values M has in a layer."""
        d_out, d_in = pair.shape
        wanted = pair.rank * (d_out + d_in) if self.density is None else round(self.density * d_out * d_in)
        return max(1, min(wanted, d_out * d_in))
