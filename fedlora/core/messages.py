"""What server and clients say to each other, as plain values: Peer, Task, Update, State."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from fedlora.core.adapter import Adapter, Pair, digest
from fedlora.core.algebra import accumulate, dense
from fedlora.errors import CheckpointError, IncompatibleUpdates

BOTH = frozenset({"A", "B"})
FACTORS = frozenset({"A", "B", "M"})


@dataclass(frozen=True)
class Peer:
    """What the server may know of a client. Never its data.

    Args:
        id: the client's number; updates are combined in its order.
        rank: the LoRA rank that the client trains.
        ranks: module name -> rank, where it differs (PEFT's rank_pattern).
        scales: module name -> the scale that the client multiplies B·A with; empty: the global pair's.
        name: what people call it, such as a site's name; empty where it has none.
    """

    id: int
    rank: int
    ranks: Mapping[str, int] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    name: str = ""

    @property
    def called(self) -> str:
        """What messages call it: its name, or its number."""
        return self.name or f"client {self.id}"


@dataclass(frozen=True)
class Tail:
    """HetLoRA's local rule on the last directions of every pair, those from ⌊γr⌋ on.

    Args:
        gamma: γ, above 0 and below 1.
        penalty: λ of λ · Σ_m ‖B[:, ⌊γr⌋:]‖_F · ‖A[⌊γr⌋:, :]‖_F, added to the loss.
        least: no rank is pruned below this.
    """

    gamma: float
    penalty: float
    least: int

    def start(self, rank: int) -> int:
        """⌊γr⌋, where the tail begins; below r, so that the tail is never empty."""
        return min(rank - 1, math.floor(self.gamma * rank + 1e-9))

    def pruned(self, rank: int) -> int:
        """The rank after one pruning."""
        return max(min(self.least, rank), self.start(rank))


@dataclass(frozen=True)
class Task:
    """What the server asks of one client this round.

    A client trains `adapter` on the base with `fold` added, and sends back what `share` names. What it is
    sent and does not both train and share, it keeps: the server need not send the same bits again.

    Args:
        adapter: where the client starts, in the client's own ranks and scales.
        train: the factors that are optimised, of {"A", "B", "M"}; the extras always are.
        share: the factors that are sent back. One that is trained and not shared is the client's own: it goes
            on from what it had, and `adapter` holds where it began.
        own_extra: whether the extras (the head) are the client's own too, instead of shared.
        active: the modules that are trained and shared, of the client's own expert where there is an
            `expert`; None for all. Others work as they are.
        fold: module name -> a low-rank change of the frozen base, of this task alone; scale 1.
        gain: what `fold` has more than in the round before; who has that one needs only this.
        mask: a seed; an extra `MODULE.sparse` holds the values of a sparse update of the module's weight, at
            the places that the seed gives (fedlora.core.sparse).
        tail: a penalty and a pruning rule for the last directions.
        expert: a whole second adapter that the client uses and leaves as it is.
    """

    adapter: Adapter
    train: frozenset[str] = BOTH
    share: frozenset[str] = BOTH
    own_extra: bool = False
    active: frozenset[str] | None = None
    fold: Mapping[str, Pair] = field(default_factory=dict)
    gain: Mapping[str, Pair] = field(default_factory=dict)
    mask: int | None = None
    tail: Tail | None = None
    expert: Adapter | None = None

    def trains(self, module: str) -> bool:
        """Whether a module's pair is trained at all."""
        return self.active is None or module in self.active

    def shared(self) -> list[str]:
        """The names of the tensors that are sent back, in the order of `Adapter.tensors`."""
        names = [
            f"{module}.{factor}"
            for module, pair in self.adapter.pairs.items()
            for factor, _ in pair.factors()
            if factor in self.share and self.trains(module)
        ]
        return names if self.own_extra else [*names, *self.adapter.extra]

    def own(self) -> list[str]:
        """The names of the tensors that are trained and not shared, so that they are the client's own."""
        factors = self.train - self.share
        names = [
            f"{module}.{factor}"
            for module, pair in self.adapter.pairs.items()
            for factor, _ in pair.factors()
            if factor in factors and self.trains(module)
        ]
        return [*names, *self.adapter.extra] if self.own_extra else names

    def pack(self) -> tuple[dict[str, Tensor], str]:
        """The task as named tensors and one line of JSON."""
        tensors, forms = _pack(
            {
                "adapter": self.adapter,
                "fold": Adapter(self.fold),
                "gain": Adapter(self.gain),
                "expert": self.expert or Adapter({}),
            }
        )
        rest = {
            "train": "".join(sorted(self.train)),
            "share": "".join(sorted(self.share)),
            "own_extra": self.own_extra,
            "active": None if self.active is None else sorted(self.active),
            "mask": self.mask,
            "tail": None if self.tail is None else [self.tail.gamma, self.tail.penalty, self.tail.least],
        }
        return tensors, json.dumps({"forms": forms, **rest})

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], header: str) -> "Task":
        """The task that `pack` packed; the gain may be missing."""
        read = json.loads(header)
        gained = any(name.startswith("gain/") for name in tensors)
        parts = _unpack(tensors, {p: form for p, form in read["forms"].items() if gained or p != "gain"})
        return cls(
            parts["adapter"],
            frozenset(read["train"]),
            frozenset(read["share"]),
            read["own_extra"],
            None if read["active"] is None else frozenset(read["active"]),
            parts["fold"].pairs,
            parts["gain"].pairs if "gain" in parts else {},
            read["mask"],
            None if read["tail"] is None else Tail(*read["tail"]),
            parts["expert"] if parts["expert"].pairs or parts["expert"].extra else None,
        )


@dataclass(frozen=True)
class Update:
    """What one client returns.

    Args:
        adapter: the task's adapter with the shared factors replaced by the client's.
        weight: how much the client counts, by default its number of examples.
        peer: who sent it; None only where a caller combines adapters by hand.
        metrics: numbers that the client reports, such as its training loss.
    """

    adapter: Adapter
    weight: float = 1.0
    peer: Peer | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """All that the server carries from one round to the next.

    Args:
        adapter: the global adapter, in full rank; what a client gets of it is the strategy's `task`.
        round: how many rounds have been aggregated.
        fold: module name -> what has been added to the frozen base besides the adapter; scale 1.
        gain: what `fold` gained in the last round.
        memory: whatever else the strategy has to remember, as tensors.
        seed: of the strategy's own random choices.
        metrics: numbers that the strategy wants in the round's line of the log.
    """

    adapter: Adapter
    round: int = 0
    fold: Mapping[str, Pair] = field(default_factory=dict)
    gain: Mapping[str, Pair] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def delta(self, module: str) -> Tensor:
        """The effective update of one module's weight, dense, (d_out, d_in): the fold and the pair."""
        own = dense(self.adapter.pairs[module])
        return own + dense(self.fold[module]) if module in self.fold else own

    def whole(self) -> Adapter:
        """The adapter that has the function of the fold and the adapter together, for use and export."""
        return whole(self.adapter, self.fold)

    def digest(self) -> str:
        """SHA-256 over all of it: equal if and only if the states are."""
        return digest(f"{self._packed[1]}{self.tensor_digest}", [])

    @cached_property
    def tensor_digest(self) -> str:
        """SHA-256 over its tensors and their names, which are all that training can change."""
        return digest("", sorted(self._packed[0].items()))

    def pack(self) -> tuple[dict[str, Tensor], str]:
        """The state as named tensors and one line of JSON, ready for a safetensors file."""
        tensors, header = self._packed
        return dict(tensors), header

    @cached_property
    def _packed(self) -> tuple[dict[str, Tensor], str]:
        parts = {"adapter": self.adapter, "fold": Adapter(self.fold), "gain": Adapter(self.gain)}
        tensors, forms = _pack(parts | {"memory": Adapter({}, self.memory)})
        rest = {"round": self.round, "seed": self.seed, "metrics": dict(self.metrics)}
        return tensors, json.dumps({"forms": forms, **rest})

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], header: str) -> "State":
        """The state that `pack` packed.

        Raises:
            CheckpointError: a tensor or a field of the header is missing.
        """
        try:
            read = json.loads(header)
            parts = _unpack(tensors, read["forms"])
            adapter, fold, gain = parts["adapter"], parts["fold"].pairs, parts["gain"].pairs
            memory, metrics = parts["memory"].extra, read["metrics"]
            return cls(adapter, read["round"], fold, gain, memory, read["seed"], metrics)
        except (AttributeError, KeyError, TypeError, ValueError, IncompatibleUpdates) as error:
            raise CheckpointError(f"this is not a packed fedlora state: {error!r}") from error


def whole(adapter: Adapter, fold: Mapping[str, Pair]) -> Adapter:
    """One adapter of plain pairs with the function of `fold` and `adapter` together."""
    pairs = {
        name: accumulate(fold[name], pair) if name in fold else pair.plain()
        for name, pair in adapter.pairs.items()
    }
    return Adapter({**fold, **pairs}, adapter.extra)


def _pack(parts: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Several adapters as tensors named `part/name`, and their forms: scales, factors and extras."""
    tensors = {
        f"{part}/{name}": tensor.contiguous()
        for part, adapter in parts.items()
        for name, tensor in adapter.tensors()
    }
    forms = {
        part: {
            "scales": {name: pair.scale for name, pair in adapter.pairs.items()},
            "extra": list(adapter.extra),
        }
        for part, adapter in parts.items()
    }
    return tensors, forms


def _unpack(tensors: Mapping[str, Tensor], forms: Mapping[str, Any]) -> dict[str, Adapter]:
    return {
        part: Adapter(
            {
                name: Pair(
                    tensors[f"{part}/{name}.A"],
                    tensors[f"{part}/{name}.B"],
                    scale,
                    tensors.get(f"{part}/{name}.M"),
                )
                for name, scale in form["scales"].items()
            },
            {name: tensors[f"{part}/{name}"] for name in form["extra"]},
        )
        for part, form in forms.items()
    }
