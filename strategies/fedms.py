"""FedMS: a global expert by sparsely activated LoRA, then a gate between it and each client's own expert.

Wu, Li, Wang, Wang. "FedMS: Federated Learning with Mixture of Sparsely Activated Foundations Models". 2023.
https://arxiv.org/abs/2312.15926

Stage 1, the global expert. Modules are in order, the top layer first; n_t of them are active, of which client
k trains and sends the first min(n_t, c_k). The others work at their global value. With S_m the clients that
had module m active,

    Ā_m = Σ_{k∈S_m} w_k A_{k,m} / Σ_{k∈S_m} w_k,    B̄_m alike,    no change where S_m is empty

and one more module becomes active when the mean training loss falls by less than the threshold.

Stage 2, the mixture. The global expert is frozen. A client keeps a local expert, which starts as the global
one, trains the same min(n_t, c_k) modules and is never sent, and a gate weighs the logits of both; the gate's
low-rank adapter alone is averaged:

    y = p_0 · global(x) + p_1 · local(x),    p = softmax(B_g A_g [h(x); 1])

h(x) is what goes into the topmost adapted layer of the global expert. B_g starts at zero: half and half.

Sends: stage 1, A and B of the active modules and the head, up and down; stage 2, the gate's adapter up and
down, and the global expert once to each client.
Differs from the paper: only its abstract was at hand. When to activate a module, the capacity as a number of
modules, and a gate whose frozen part is zero are ours; the paper's models are vision and language, ours text.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import mean_extras, mean_factors, normalised
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy, slice_to_rank
from fedlora.errors import ConfigError
from fedlora.ranges import check_whole
from fedlora.seeds import generator
from fedlora.training.expert import GlobalExpert


@dataclass(frozen=True)
class FedMS(Strategy):
    """Personal models out of a shared one, with clients that cannot all train every layer.

    Args:
        global_rounds: rounds of stage 1; all later ones are of stage 2.
        active: how many modules are active in round 1.
        capacity: the largest number of modules that a client can train, dealt in turn by client id; empty:
            all of them.
        threshold: one more module is activated after a round whose mean training loss is not at least so
            much below that of the round before.
        gate_rank: rows of A_g.
    """

    global_rounds: int = 3
    active: int = 4
    capacity: Sequence[int] = ()
    threshold: float = 0.1
    gate_rank: int = 4

    mixed_ranks = False
    linear = False
    exact = False
    personal = True
    client = "GatedExperts"
    server_space = "factors"

    def __post_init__(self) -> None:
        object.__setattr__(self, "capacity", tuple(self.capacity))
        for name, least in (("global_rounds", 0), ("active", 1), ("gate_rank", 1)):
            check_whole(f"strategy.{name}", getattr(self, name), least)
        if not all(isinstance(c, int) and c >= 1 for c in self.capacity):
            raise ConfigError(
                f"strategy.capacity: expected whole numbers of at least 1, one a client in turn, got "
                f"{list(self.capacity)}"
            )
        if not math.isfinite(self.threshold):
            raise ConfigError(f"strategy.threshold: expected a finite number, got {self.threshold}")

    def init(self, adapter: Adapter, base_delta: Mapping[str, Pair] | None = None, seed: int = 0) -> State:
        """The memory holds the gate's adapter, the number of active modules and the last loss."""
        width = adapter.pairs[adapter.top_down()[0]].shape[1] + 1 if adapter.pairs else 1
        rng, bound = generator(seed, "gate"), width**-0.5
        memory = {
            "gate.A": torch.from_numpy(rng.uniform(-bound, bound, (self.gate_rank, width))).float(),
            "gate.B": torch.zeros(2, self.gate_rank),
            "active": torch.tensor(min(self.active, len(adapter.pairs))),
            "loss": torch.tensor(math.inf, dtype=torch.float64),
        }
        return State(adapter, base_delta=base_delta or {}, memory=memory, seed=seed)

    def task(self, state: State, peer: Peer) -> Task:
        """Stage 1: the expert, partly to train. Stage 2: the gate, the expert, and the modules to train."""
        expert = slice_to_rank(state.adapter, peer)
        frozen = frozenset(expert.pairs) - self._trained(state, peer)
        if state.round < self.global_rounds:
            return Task(expert, frozen=frozen, base_delta=state.base_delta)
        mixture = (GlobalExpert(expert, frozen),)
        return Task(_gate(state), frozenset(), frozenset(), base_delta=state.base_delta, method=mixture)

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """Stage 1: each module's mean over those that had it active. Stage 2: the gate's mean."""
        if state.round >= self.global_rounds:
            sent, w = self.admit(state, updates, _gate(state))
            gate = mean_extras([update.adapter.extra for update in sent], w)
            return replace(state, memory={**state.memory, **gate}, metrics={}, round=state.round + 1)
        sent, w = self.admit(state, updates)
        pairs = {}
        for m, old in state.adapter.pairs.items():
            held = [(u, x) for u, x in zip(sent, w, strict=True) if x and m in self._trained(state, u.peer)]
            pairs[m] = old
            if held:
                own = [update.adapter.pairs[m] for update, _ in held]
                pairs[m] = mean_factors(own, normalised([x for _, x in held]), old.scale)
        extra = mean_extras([u.adapter.extra for u in sent], w)
        adapter = replace(state.adapter, pairs=pairs, extra=extra)
        active, loss = int(state.memory["active"]), _loss(sent, w)
        if float(state.memory["loss"]) - loss < self.threshold:
            active = min(active + 1, len(pairs))
        memory = {
            **state.memory,
            "active": torch.tensor(active),
            "loss": torch.tensor(loss, dtype=torch.float64),
        }
        metrics = {"active_modules": float(state.memory["active"])}
        return replace(state, adapter=adapter, memory=memory, metrics=metrics, round=state.round + 1)

    def _trained(self, state: State, peer: Peer | None) -> frozenset[str]:
        """The modules that a client trains; all active ones where nobody knows who it is."""
        most = self.capacity[peer.id % len(self.capacity)] if peer and self.capacity else None
        return frozenset(state.adapter.top_down()[: int(state.memory["active"])][:most])


def _gate(state: State) -> Adapter:
    return Adapter({}, {name: state.memory[name].clone() for name in ("gate.A", "gate.B")})


def _loss(updates: Sequence[Update], weights: Sequence[float]) -> float:
    """The mean training loss; NaN, which never counts as stalled, where a client did not say."""
    return math.fsum(w * u.metrics.get("loss", math.nan) for u, w in zip(updates, weights, strict=True) if w)
