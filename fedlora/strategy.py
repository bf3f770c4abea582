"""The interface of a federated LoRA algorithm: how client updates become the next global state."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch

from fedlora.adapter import Adapter, Pair
from fedlora.algebra import normalised, rescale, truncate
from fedlora.errors import IncompatibleUpdates
from fedlora.protocol import Peer, State, Task, Update


class Strategy(ABC):
    """How client updates become the next global state, and nothing else.

    Subclasses are frozen dataclasses; their fields are the paper's hyper-parameters. Methods are pure: no
    mutation, no input or output, no randomness but the generator they are handed. Sampling, weights,
    evaluation, checkpoints and byte counts are the engine's.

    Three facts that the engine and the documentation read off the class:
        mixed_ranks: may clients hold different ranks?
        linear: is the new state a fixed weighted mean of what the clients sent?
        exact: is the new ΔW the weighted mean Σ w_k s_k B_k A_k of the clients' updates?
    """

    mixed_ranks: ClassVar[bool]
    linear: ClassVar[bool]
    exact: ClassVar[bool]

    def init(self, adapter: Adapter) -> State:
        """The state before round 1, from an adapter of the largest rank any client has."""
        return State(adapter)

    def task(self, state: State, peer: Peer) -> Task:
        """What `peer` downloads, trains and shares: by default its cut of both factors, all of it trained."""
        return Task(cut(state.adapter, peer))

    @abstractmethod
    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """The next state, from this round's updates in any order.

        Raises:
            IncompatibleUpdates: modules, shapes, ranks or weights that this algorithm cannot combine.
        """

    def admit(self, state: State, updates: Sequence[Update]) -> tuple[list[Update], list[float]]:
        """The updates in the order of their clients' ids, and their weights with sum 1.

        Sums of floats depend on their order; sorting here makes the result independent of who answered
        first. Updates lose their autograd graphs and are lifted to the state's precision. Every `aggregate`
        begins with this call.

        Raises:
            IncompatibleUpdates: no update; wrong or missing modules or extras; wrong shapes; different ranks
                where the strategy has no rule for them; numbers that are not finite. Names the client and
                the module.
        """
        name = type(self).__name__
        if not updates:
            raise IncompatibleUpdates(f"strategy {name}: expected at least one update, got none")
        ordered = sorted(updates, key=lambda update: -1 if update.peer is None else update.peer.id)
        for position, update in enumerate(ordered):
            who = f"strategy {name}: client {update.peer.id if update.peer else f'#{position}'}"
            _fits(state.adapter, update.adapter, who)
            for module, pair in update.adapter.pairs.items():
                rank = state.adapter.pairs[module].rank
                if not self.mixed_ranks and pair.rank != rank:
                    raise IncompatibleUpdates(
                        f"{who} sent rank {pair.rank} for '{module}', expected {rank}, the global adapter's; "
                        "use a strategy for mixed ranks, such as FlexLoRA"
                    )
            if not (math.isfinite(update.weight) and update.weight >= 0):
                raise IncompatibleUpdates(f"{who} has weight {update.weight}, expected a finite number >= 0")
        return [_plain(update, state) for update in ordered], normalised(
            [update.weight for update in ordered]
        )


def cut(adapter: Adapter, peer: Peer) -> Adapter:
    """The part of a global adapter that a peer's ranks hold, in the peer's scales.

    The first r rows of A and columns of B; a difference of scale goes on B.

    Raises:
        IncompatibleUpdates: the peer's rank is larger than what there is.
    """
    pairs = {}
    for name, pair in adapter.pairs.items():
        rank = peer.ranks.get(name, peer.rank)
        if rank < 1:
            raise IncompatibleUpdates(f"client {peer.id} asks rank {rank} of '{name}', expected 1 or more")
        if rank > pair.rank:
            raise IncompatibleUpdates(
                f"client {peer.id} asks rank {rank} of '{name}', the global adapter has {pair.rank}; "
                "start the run with the largest rank of all clients"
            )
        pairs[name] = rescale(truncate(pair, rank), peer.scales.get(name, pair.scale))
    return Adapter(pairs, {name: tensor.clone() for name, tensor in adapter.extra.items()})


def _plain(update: Update, state: State) -> Update:
    """The update without autograd graphs, and in no lower precision than the state."""
    pairs = {}
    for m, pair in update.adapter.pairs.items():
        dtype = torch.promote_types(pair.A.dtype, state.adapter.pairs[m].A.dtype)
        pairs[m] = Pair(pair.A.detach().to(dtype), pair.B.detach().to(dtype), pair.scale)
    extra = {
        name: tensor.detach().to(torch.promote_types(tensor.dtype, state.adapter.extra[name].dtype))
        for name, tensor in update.adapter.extra.items()
    }
    return replace(update, adapter=Adapter(pairs, extra))


def _fits(expected: Adapter, got: Adapter, who: str) -> None:
    """Raise IncompatibleUpdates unless modules, extras and all shapes but the rank are the expected ones."""
    for kind, want, have in (
        ("modules", expected.pairs.keys(), got.pairs.keys()),
        ("extra tensors", expected.extra.keys(), got.extra.keys()),
    ):
        if want != have:
            raise IncompatibleUpdates(
                f"{who} sent other {kind} than the global adapter has: "
                f"missing {sorted(want - have)[:3]}, unknown {sorted(have - want)[:3]}"
            )
    parts = [(module, tensor) for module, pair in got.pairs.items() for tensor in (pair.A, pair.B)]
    for name, tensor in [*parts, *got.extra.items()]:
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise IncompatibleUpdates(f"{who} sent NaN or infinity for '{name}': its training diverged")
    for module, pair in got.pairs.items():
        if pair.shape != expected.pairs[module].shape:
            raise IncompatibleUpdates(
                f"{who} sent an update of shape {pair.shape} for '{module}', "
                f"expected {expected.pairs[module].shape}"
            )
    for name, tensor in got.extra.items():
        if tensor.shape != expected.extra[name].shape:
            raise IncompatibleUpdates(
                f"{who} sent shape {tuple(tensor.shape)} for '{name}', "
                f"expected {tuple(expected.extra[name].shape)}"
            )
