"""The interface of a federated LoRA algorithm: how client updates become the next global state."""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.admission import check_fits, lifted
from fedlora.core.algebra import (
    compress,
    mean_extras,
    mean_factors,
    mean_tensors,
    normalised,
    pad,
    pad_orthonormal,
    rescale,
    truncate,
)
from fedlora.core.changes import Change, moved_and_cut, moved_in_place
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.parametrization import LORA
from fedlora.errors import IncompatibleUpdates
from fedlora.seeds import generator


class Strategy(ABC):
    """How client updates become the next global state, and nothing else.

    Subclasses are frozen dataclasses; their fields are the paper's hyper-parameters. Methods are pure: no
    mutation, no input or output, no randomness but the generator they are handed. Sampling, weights,
    evaluation, checkpoints and byte counts are the engine's.

    Facts that the engine and the documentation read off the class:
        mixed_ranks: may clients hold different ranks?
        linear: does the new state depend on the updates through their weighted mean alone, so that a server
            which sees nothing but a sum could run it?
        products: is the weighted mean of the products s·B·A, and of the extras, enough for it?
        exact: is the new ΔW the weighted mean of the clients', base delta and s_k B_k A_k together?
        personal: do clients keep a trained part, so that the global state alone is nobody's model?
        staleness: what becomes of an update of an old version, where a scheduler does not wait for all:
            "exact", its change is added and nothing of it is lost; "effective", its change of ΔW is added,
            and the sum is cut back to the strategy's rank; "refused", clients must be at the same version.
        fixed_basis: do the trained tensors mean the same to every client in every round to come?
        start: the initial adapter that the paper asks for, a value of `lora.init`.
        client: the name of the client class that it needs; empty where ordinary local training does.
        lr_factor: the learning rate that suits it, over the one that suits LoRA whose factors are both
            trained and averaged.
        server_space: where a server optimizer works, between this strategy's state and the next: "factors",
            on the factors, which mean the same from round to round; or on ΔW, where they do not, and the step
            goes into the adapter at any rank ("product"), into the adapter at its own rank and with what is
            left into the base delta ("rank"), or into the base delta ("base_delta"). A strategy that adds to
            the base delta itself then does so by `BaseDelta.plus`. Empty: nowhere.
    """

    mixed_ranks: ClassVar[bool]
    linear: ClassVar[bool]
    exact: ClassVar[bool]
    products: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    staleness: ClassVar[Literal["exact", "effective", "refused"]] = "refused"
    fixed_basis: ClassVar[bool] = False
    start: ClassVar[str] = "lora"
    client: ClassVar[str] = ""
    lr_factor: ClassVar[float] = 1.0
    server_space: ClassVar[Literal["", "factors", "product", "rank", "base_delta"]] = ""

    def init(self, adapter: Adapter, base_delta: Mapping[str, Pair] | None = None, seed: int = 0) -> State:
        """The state before round 1.

        Where ranks may differ, an adapter that has learned something is put in the order of its singular
        values, so that the first r directions, which a client of rank r gets, are its best approximation.
        A pair that was taken out of the base stays as it is: a client needs all of it, since what a cut
        leaves out would be missing in its base.

        Args:
            adapter: of the largest rank any client has.
            base_delta: what is added to the frozen base, such as minus an adapter that was taken out of it.
            seed: of the strategy's own random choices.
        """
        base_delta = base_delta or {}
        given = {m: pair for m, pair in adapter.pairs.items() if m not in base_delta}
        if self.mixed_ranks:
            adapter = replace(adapter, pairs={**adapter.pairs, **ordered(given, seed)})
        return State(adapter, base_delta=base_delta, seed=seed)

    def task(self, state: State, peer: Peer) -> Task:
        """What `peer` downloads, trains and shares: by default its cut of both factors, all of it trained."""
        return Task(slice_to_rank(state.adapter, peer), base_delta=state.base_delta)

    @abstractmethod
    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> State:
        """The next state, from this round's updates in any order.

        Raises:
            IncompatibleUpdates: modules, shapes, ranks or weights that this algorithm cannot combine.
        """

    def apply_changes(self, state: State, changes: Sequence[Change]) -> State:
        """The next state from what clients have changed of what they were sent, of whatever version that was.

        A client that has changed nothing moves nothing. By default the changes are added to the shared
        factors where `staleness` is exact, which wants a basis that nobody moves, and else to ΔW, of which
        the best of the state's ranks is kept (Eckart–Young); `cut_off` in the round's line says how much of
        the changes that loses. Extras are added either way.

        Args:
            state: the newest one.
            changes: at least one, in any order.

        Raises:
            IncompatibleUpdates: as `admit`; or the strategy refuses updates of an old version.
        """
        changes = self.admit_changes(state, changes)
        return moved_in_place(state, changes) if self.staleness == "exact" else moved_and_cut(state, changes)

    def admit_changes(self, state: State, changes: Sequence[Change]) -> list[Change]:
        """The changes in the order of their clients' ids; every `apply_changes` begins with this call.

        Raises:
            IncompatibleUpdates: as `admit`; or the strategy refuses updates of an old version.
        """
        if self.staleness == "refused":
            raise IncompatibleUpdates(
                f"strategy {type(self).__name__} refuses updates of an old version; say its `staleness`"
            )
        found = sorted(changes, key=lambda one: -1 if one.update.peer is None else one.update.peer.id)
        sent, _ = self.admit(state, [one.update for one in found])
        return [replace(one, update=update) for one, update in zip(found, sent, strict=True)]

    def admit(
        self, state: State, updates: Sequence[Update], expected: Adapter | None = None
    ) -> tuple[list[Update], list[float]]:
        """The updates in the order of their clients' ids, and their weights with sum 1.

        Sums of floats depend on their order; sorting here makes the result independent of who answered
        first. Updates lose their autograd graphs and are lifted to the state's precision. Every `aggregate`
        begins with this call.

        Args:
            state: the state that the updates answer to.
            updates: at least one.
            expected: what clients send where it is not of the form of the state's adapter.

        Raises:
            IncompatibleUpdates: no update, or two of one client; wrong or missing modules or extras; wrong
                shapes; different ranks where the strategy has no rule for them; numbers that are not finite.
                Names the client and the module.
        """
        name, expected = type(self).__name__, expected or state.adapter
        if not updates:
            raise IncompatibleUpdates(f"strategy {name}: expected at least one update, got none")
        ordered = sorted(updates, key=lambda update: -1 if update.peer is None else update.peer.id)
        ids = [update.peer.id for update in ordered if update.peer]
        if twice := sorted({i for i in ids if ids.count(i) > 1}):
            raise IncompatibleUpdates(f"strategy {name}: client {twice[0]} sent more than one update")
        for position, update in enumerate(ordered):
            who = f"strategy {name}: {update.peer.called if update.peer else f'client #{position}'}"
            check_fits(expected, update.adapter, who)
            for module, pair in update.adapter.pairs.items():
                rank = expected.pairs[module].rank
                if not self.mixed_ranks and pair.rank != rank and not update.several:
                    raise IncompatibleUpdates(
                        f"{who} sent rank {pair.rank} for '{module}', expected {rank}, the global adapter's; "
                        "use a strategy for mixed ranks, such as FlexLoRA"
                    )
            if not (math.isfinite(update.weight) and update.weight >= 0):
                raise IncompatibleUpdates(f"{who} has weight {update.weight}, expected a finite number >= 0")
        return [lifted(update, expected) for update in ordered], normalised(
            [update.weight for update in ordered]
        )

    def mean_of(
        self, factor: Literal["A", "B"], state: State, sent: Sequence[Update], weights: Sequence[float]
    ) -> dict[str, Pair]:
        """One factor averaged beside the other, which all clients have in common and nobody trained.

        Σ_k w_k s_k B_k A_k = s B̄ A, exactly, where A_k is the first r_k rows of one A; and so with B in
        common. A smaller rank counts as padded with zeros. A direction whose frozen half is zero carries
        nothing, so its other half stays as it was: with both at zero it could never learn again.

        Raises:
            IncompatibleUpdates: a client sent another frozen factor than it was given, by a single bit.
        """
        frozen = "A" if factor == "B" else "B"
        found = {}
        for m, old in state.adapter.pairs.items():
            padded = []
            for position, update in enumerate(sent):
                pair = update.adapter.pairs[m]
                own, given = getattr(pair, frozen), truncate(old, pair.rank)
                if frozen == "B":
                    given = rescale(given, pair.scale)
                if not torch.equal(own, getattr(given, frozen).to(own.dtype)):
                    who = update.peer.called if update.peer else f"client #{position}"
                    raise IncompatibleUpdates(
                        f"strategy {type(self).__name__}: {who} sent another {frozen} for '{m}' than "
                        f"the first {pair.rank} directions of the one that all share, frozen this round; "
                        f"every client must keep the {frozen} it was sent"
                    )
                padded.append(getattr(pad(rescale(pair, old.scale), old.rank), factor))
            mean = mean_tensors(padded, weights)
            A, B = old.A.to(mean.dtype), old.B.to(mean.dtype)
            if frozen == "A":
                B = torch.where((A == 0).all(dim=1), B, mean)
            else:
                A = torch.where((B == 0).all(dim=0)[:, None], A, mean)
            found[m] = Pair(A, B, old.scale)
        return found


def mean_adapter(state: State, sent: Sequence[Update], weights: Sequence[float]) -> Adapter:
    """A, B and the extras averaged each by itself, Σ_k w_k A_k and Σ_k w_k B_k, in the state's scales."""
    pairs = {
        m: mean_factors([u.adapter.pairs[m] for u in sent], weights, old.scale)
        for m, old in state.adapter.pairs.items()
    }
    return replace(state.adapter, pairs=pairs, extra=mean_extras([u.adapter.extra for u in sent], weights))


def next_state(
    strategy: Strategy, state: State, updates: Sequence[Update], rng: np.random.Generator
) -> State:
    """What a strategy makes of a round's updates, in the parametrization of the state before.

    A strategy of plain LoRA that builds its adapter anew, by `Adapter(pairs, extra)`, need not know that the
    factors of another parametrization are among the extras.
    """
    after, form = strategy.aggregate(state, updates, rng), state.adapter.parametrization
    if after.adapter.parametrization == LORA and any(map(form.owns, after.adapter.extra)):
        return replace(after, adapter=replace(after.adapter, parametrization=form))
    return after


def ordered(pairs: Mapping[str, Pair], seed: int) -> dict[str, Pair]:
    """The same ΔW and ranks, every pair split as U·S | Vᵀ by falling singular values (Eckart–Young).

    Directions that ΔW lacks up to the rank are random and orthonormal, with B = 0. A pair with B = 0 stays as
    it is, since any of its cuts is exact.
    """
    found = dict(pairs)
    for name, pair in pairs.items():
        if pair.B.any():
            rng = generator(seed, "refill", zlib.crc32(name.encode()), 0)
            found[name] = pad_orthonormal(compress(pair), pair.rank, rng)
    return found


def slice_to_rank(adapter: Adapter, peer: Peer) -> Adapter:
    """The part of a global adapter that a peer's ranks hold, in the peer's scales.

    The first r rows of A and columns of B, and what the parametrization makes of its own factors. Where the
    scales differ, the ratio goes on B.

    Raises:
        IncompatibleUpdates: the peer's rank is larger than what there is.
    """
    pairs = {}
    for name, pair in adapter.pairs.items():
        rank = peer.ranks.get(name, peer.rank)
        if rank < 1:
            raise IncompatibleUpdates(f"{peer.called} asks rank {rank} of '{name}', expected 1 or more")
        if rank > pair.rank:
            raise IncompatibleUpdates(
                f"{peer.called} asks rank {rank} of '{name}', the global adapter has {pair.rank}; "
                "start the run with the largest rank of all clients"
            )
        pairs[name] = rescale(truncate(pair, rank), peer.scales.get(name, pair.scale))
    resized = {
        f"{name}.{word}": tensor
        for name, own in adapter.own_factors().items()
        for word, tensor in adapter.parametrization.resize(own, peer.ranks.get(name, peer.rank)).items()
    }
    extra = {name: tensor.clone() for name, tensor in {**adapter.extra, **resized}.items()}
    return replace(adapter, pairs=pairs, extra=extra)


def grow_rank(state: State, peer: Peer) -> Adapter:
    """The global adapter padded to a peer's ranks: the new directions have B = 0, so ΔW stays."""
    room = {}
    for name, pair in state.adapter.pairs.items():
        rng = generator(state.seed, "refill", zlib.crc32(name.encode()), state.round)
        room[name] = pad_orthonormal(pair, peer.ranks.get(name, peer.rank), rng)
    return replace(state.adapter, pairs=room)


def named(suits: Callable[[type[Strategy]], bool]) -> str:
    """The packaged strategies that suit, by the names that the command line takes: "fedit, ffalora or slora".

    Messages take their lists from here, so that no list is kept by hand beside the facts of the classes.
    """
    ours = [cls for cls in Strategy.__subclasses__() if cls.__module__.startswith("fedlora.strategies.")]
    *most, last = sorted(cls.__name__.lower() for cls in ours if suits(cls)) or ["none"]
    return f"{', '.join(most)} or {last}" if most else last
