"""PrivateLoRA: a small core between two random frozen factors; the core alone is trained and sent.

Wang, Lin, Zeng, Zhang. "PrivateLoRA For Efficient Privacy Preserving LLM". 2023.
https://arxiv.org/abs/2311.14030

    y = W_0 x + B M A x,    A and B random and frozen, M (r × r) = 0 at the start
    server: M̄ = Σ_k w_k M_k,    Σ_k w_k B M_k A = B M̄ A exactly

The paper keeps W_0, A and B in the cloud and M on one device, and sends activations between them. Here every
client has the base, and the mean over clients is fedlora's: r² numbers a module on the wire, whatever the
layer's size, so that r can be large (the paper's is 128).

Sends: M up, M down, and A and B once to each client, which keeps them.
Differs from the paper: the mean over clients; mixed ranks, where a client of rank r trains the first r × r
block of M, and M padded with zeros keeps the mean exact. The paper has no alpha: B is drawn with 1/s in it,
so that the scale changes nothing. An adapter that a run starts from goes into the base delta, and M learns on
top.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import accumulate, mean_extras, rescale, truncate
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy, slice_to_rank
from fedlora.errors import IncompatibleUpdates
from fedlora.models.parametrizations import CoreMatrix, composed
from fedlora.seeds import generator


@dataclass(frozen=True)
class PrivateLoRA(Strategy):
    """The least to send for its rank, and an exact mean; wants a large rank, and a rate of its own."""

    lr_factor = 2.5
    mixed_ranks = True
    linear = True
    exact = True
    fixed_basis = True

    def init(self, adapter: Adapter, base_delta: Mapping[str, Pair] | None = None, seed: int = 0) -> State:
        """Fresh frozen factors, uniform in ±1/√fan-in, and M = 0; an adapter's ΔW becomes base delta."""
        added, pairs, cores = dict(base_delta or {}), dict[str, Pair](), dict[str, Tensor]()
        for m, given in adapter.pairs.items():
            if given.B.any():
                added[m] = accumulate(added.get(m), given)
            rng = generator(seed, "privatelora", zlib.crc32(m.encode()))
            (d_out, d_in), rank = given.shape, given.rank
            A = _uniform(rng, (rank, d_in), like=given.A)
            B = _uniform(rng, (d_out, rank), like=given.A)
            pairs[m] = rescale(Pair(A, B), given.scale)
            cores[f"{m}.core"] = given.A.new_zeros(rank, rank)
        form = composed(CoreMatrix(), adapter.parametrization)
        return State(Adapter(pairs, {**adapter.extra, **cores}, form), base_delta=added, seed=seed)

    def task(self, state: State, peer: Peer) -> Task:
        """The client's rows of A, columns of B and block of the core; A and B neither train nor come back."""
        nothing = frozenset[str]()
        return Task(
            slice_to_rank(state.adapter, peer), train=nothing, share=nothing, base_delta=state.base_delta
        )

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """Average the cores, padded to the rank of A and B, which stay as they are, bit for bit."""
        sent, w = self.admit(state, updates)
        extras = [dict(update.adapter.extra) for update in sent]
        for m, old in state.adapter.pairs.items():
            for position, (update, extra) in enumerate(zip(sent, extras, strict=True)):
                pair = update.adapter.pairs[m]
                if not _same(pair, rescale(truncate(old, pair.rank), pair.scale)):
                    who = update.peer.id if update.peer else f"#{position}"
                    raise IncompatibleUpdates(
                        f"strategy PrivateLoRA: client {who} sent other factors for '{m}' than the first "
                        f"{pair.rank} directions of the frozen A and B; every client must keep the A and B "
                        "it was sent"
                    )
                more = old.rank - pair.rank
                extra[f"{m}.core"] = pad(extra[f"{m}.core"], (0, more, 0, more))
        mean = mean_extras(extras, w)
        kinds = {m: mean[f"{m}.core"].dtype for m in state.adapter.pairs}
        pairs = {m: Pair(p.A.to(kinds[m]), p.B.to(kinds[m]), p.scale) for m, p in state.adapter.pairs.items()}
        adapter = replace(state.adapter, pairs=pairs, extra=mean)
        return replace(state, adapter=adapter, round=state.round + 1)


def _uniform(rng: np.random.Generator, shape: tuple[int, int], like: Tensor) -> Tensor:
    return torch.from_numpy(rng.uniform(-1, 1, shape) / shape[1] ** 0.5).to(like)


def _same(sent: Pair, own: Pair) -> bool:
    """A to the bit; B, in which the client's scale has been rounded, as near as any dtype is."""
    dtype = sent.A.dtype
    return torch.equal(sent.A, own.A.to(dtype)) and torch.allclose(sent.B, own.B.to(dtype), rtol=1e-2)
