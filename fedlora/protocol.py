"""What server and clients say to each other, as plain values: Peer, Task, Update, State."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedlora.adapter import Adapter, Pair
from fedlora.algebra import dense
from fedlora.errors import CheckpointError, IncompatibleUpdates

BOTH = frozenset({"A", "B"})


@dataclass(frozen=True)
class Peer:
    """What the server may know of a client. Never its data.

    Args:
        id: the client's number; updates are combined in its order.
        rank: the LoRA rank that the client trains.
        ranks: module name -> rank, where it differs (PEFT's rank_pattern).
        scales: module name -> the scale that the client multiplies B·A with; empty: the global pair's.
    """

    id: int
    rank: int
    ranks: Mapping[str, int] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What the server asks of one client this round.

    Args:
        adapter: where the client starts, in the client's own ranks and scales.
        train: the factors that are optimised, a subset of {"A", "B"}; the extras always are.
        share: the factors that are sent back; the extras always are.
    """

    adapter: Adapter
    train: frozenset[str] = BOTH
    share: frozenset[str] = BOTH


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
    """

    adapter: Adapter
    round: int = 0

    def delta(self, module: str) -> Tensor:
        """The effective update of one module's weight, dense, (d_out, d_in)."""
        return dense(self.adapter.pairs[module])

    def pack(self) -> tuple[dict[str, Tensor], str]:
        """The state as named tensors and one line of JSON, ready for a safetensors file."""
        scales = {name: pair.scale for name, pair in self.adapter.pairs.items()}
        tensors = {name: tensor.contiguous() for name, tensor in self.adapter.tensors()}
        extra = list(self.adapter.extra)
        return tensors, json.dumps({"round": self.round, "scales": scales, "extra": extra})

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], header: str) -> "State":
        """The state that `pack` packed.

        Raises:
            CheckpointError: a tensor or a field of the header is missing.
        """
        rest = dict(tensors)
        try:
            read = json.loads(header)
            pairs = {
                name: Pair(rest.pop(f"{name}.A"), rest.pop(f"{name}.B"), scale)
                for name, scale in read["scales"].items()
            }
            return cls(Adapter(pairs, {name: rest.pop(name) for name in read["extra"]}), read["round"])
        except (AttributeError, KeyError, TypeError, ValueError, IncompatibleUpdates) as error:
            raise CheckpointError(f"this is not a packed fedlora state: {error!r}") from error
