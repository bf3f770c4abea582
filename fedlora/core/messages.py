"""What server and clients say to each other, as plain values: Peer, Task, Update, State."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TypeVar

from torch import Tensor

from fedlora.core.adapter import Adapter, Pair, digest
from fedlora.core.algebra import accumulate, dense
from fedlora.core.base_delta import BaseDelta
from fedlora.core.method import MethodPart
from fedlora.core.packing import pack, unpack
from fedlora.errors import CheckpointError, ConfigError, IncompatibleUpdates

BOTH = frozenset({"A", "B"})
PACKED_AS = {"base_delta": "fold"}  # field -> its name in files and on the wire, which older runs have too
Part = TypeVar("Part", bound=MethodPart)


@dataclass(frozen=True)
class Peer:
    """What the server may know of a client, which never includes its data.

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
        """The client's name in messages: its own, or one made of its number."""
        return self.name or f"client {self.id}"


@dataclass(frozen=True)
class Task:
    """What the server asks of one client this round.

    A client trains `adapter` on the base with `base_delta` added, and sends back what is shared. It keeps
    what it is sent and does not both train and share: the server need not send the same bits again.

    Args:
        adapter: where the client starts, in the client's own ranks and scales.
        train: the factors that are optimised, of {"A", "B"}; the extras always are.
        share: the factors that are sent back; the extras always are. A tensor that is trained and not shared
            is the client's own: it goes on from what it had, and `adapter` holds where it began.
        personal: names of tensors that are trained and never sent, whatever `share` says. A name stands for
            the tensor of that name and for all below it, so that a module or head stands for its tensors.
        frozen: names, as for `personal`, of tensors that are neither trained nor sent.
        base_delta: module name -> a low-rank change of the frozen base, of this task alone; scale 1.
        method: what the method needs of the client beyond this.

    Raises:
        ConfigError: `personal` or `frozen` names what the adapter does not have.
    """

    adapter: Adapter
    train: frozenset[str] = BOTH
    share: frozenset[str] = BOTH
    personal: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    base_delta: Mapping[str, Pair] = field(default_factory=BaseDelta)
    method: tuple[MethodPart, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_delta", BaseDelta.of(self.base_delta))
        for what in ("personal", "frozen"):
            named = getattr(self, what)
            known = {above for name, _ in self.adapter.tensors() if named for above in _above(name)}
            if unknown := sorted(named - known):
                raise ConfigError(
                    f"Task.{what}: expected names of tensors, modules or heads of the adapter, got "
                    f"{', '.join(map(repr, unknown[:3]))}"
                )

    def trained(self) -> list[str]:
        """The names of the tensors that are optimised, in the order of `Adapter.tensors`."""
        return [name for name in self._of(self.train) if not _within(name, self.frozen)]

    def shared(self) -> list[str]:
        """The names of the tensors that are sent back, in the order of `Adapter.tensors`."""
        kept = self.frozen | self.personal
        return [name for name in self._of(self.share) if not _within(name, kept)]

    def own(self) -> list[str]:
        """The names of the tensors that are trained and not shared, so that they are the client's own."""
        shared = set(self.shared())
        return [name for name in self.trained() if name not in shared]

    def sent(self) -> dict[str, Tensor]:
        """Tensors like those that the parts have a client send beside what is shared.

        Each name stands behind the place of its part in `method`: "0/NAME".
        """
        return {
            f"{at}/{name}": tensor
            for at, part in enumerate(self.method)
            for name, tensor in part.sends(self).items()
        }

    def part(self, kind: type[Part]) -> Part | None:
        """The first part of a class, or of a subclass of it; None where the task has none."""
        return next((part for part in self.method if isinstance(part, kind)), None)

    def pack(self) -> tuple[dict[str, Tensor], str]:
        """The task as named tensors and one line of JSON; without the base delta's increment."""
        tensors, header = self._packed
        return dict(tensors), header

    @cached_property
    def _packed(self) -> tuple[dict[str, Tensor], str]:
        return _pack(self)

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], header: str) -> "Task":
        """The task that `pack` packed.

        Raises:
            KeyError: a tensor is missing.
            ConfigError: the task has a part of a class that this process has not imported.
        """
        names = {packed: name for name, packed in PACKED_AS.items()}
        return cls(**{names.get(key, key): value for key, value in unpack(tensors, header).items()})

    def _of(self, factors: frozenset[str]) -> Iterator[str]:
        """The names of these factors of every pair, and of the extras."""
        for module, pair in self.adapter.pairs.items():
            yield from (f"{module}.{factor}" for factor, _ in pair.factors() if factor in factors)
        yield from self.adapter.extra


@dataclass(frozen=True)
class Update:
    """What one client returns.

    Args:
        adapter: the task's adapter with the shared factors replaced by the client's.
        weight: how much the client counts, by default its number of examples.
        peer: who sent it; None only where a caller combines adapters by hand.
        metrics: numbers that the client reports, such as its training loss.
        version: the `State.round` of the state that the client started from; None where it is not known.
        sent: what the parts of the task had the client send beside the adapter, under the names of
            `Task.sent`.
        several: whether it stands for several clients, as `fedlora.core.bundle` makes it.
    """

    adapter: Adapter
    weight: float = 1.0
    peer: Peer | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    version: int | None = None
    sent: Mapping[str, Tensor] = field(default_factory=dict)
    several: bool = False


@dataclass(frozen=True)
class State:
    """All that the server carries from one round to the next.

    Args:
        adapter: the global adapter, in full rank; what a client gets of it is the strategy's `task`.
        round: how many rounds have been aggregated; it is the state's version.
        base_delta: module name -> what has been added to the frozen base besides the adapter; scale 1.
        memory: whatever else the strategy has to remember, as tensors.
        seed: of the strategy's own random choices.
        metrics: numbers that the strategy wants in the round's line of the log.
    """

    adapter: Adapter
    round: int = 0
    base_delta: Mapping[str, Pair] = field(default_factory=BaseDelta)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_delta", BaseDelta.of(self.base_delta))

    def delta(self, module: str) -> Tensor:
        """The effective update of one module's weight, dense, (d_out, d_in): the base delta and the pair."""
        own = dense(self.adapter.plain().pairs[module])
        return own + dense(self.base_delta[module]) if module in self.base_delta else own

    def whole(self) -> Adapter:
        """One adapter with the function of the base delta and the adapter together, for use and export."""
        return whole(self.adapter, self.base_delta)

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
        return _pack(self)

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], header: str) -> "State":
        """The state that `pack` packed.

        Raises:
            CheckpointError: a tensor or a field of the header is missing.
        """
        try:
            read = unpack(tensors, header)
            return cls(**{f.name: read[PACKED_AS.get(f.name, f.name)] for f in fields(cls)})
        except (AttributeError, KeyError, TypeError, ValueError, IncompatibleUpdates, ConfigError) as error:
            raise CheckpointError(f"this is not a packed fedlora state: {error!r}") from error


def whole(adapter: Adapter, base_delta: Mapping[str, Pair]) -> Adapter:
    """One adapter of plain pairs, with the function of `base_delta` and `adapter` together."""
    adapter = adapter.plain()
    pairs = {
        m: accumulate(base_delta[m], pair) if m in base_delta else pair for m, pair in adapter.pairs.items()
    }
    return replace(adapter, pairs={**base_delta, **pairs})


def _pack(message: Task | State) -> tuple[dict[str, Tensor], str]:
    """The fields as named tensors and one line of JSON, by the names of `PACKED_AS`."""
    return pack({PACKED_AS.get(f.name, f.name): getattr(message, f.name) for f in fields(message)})


def _within(name: str, names: frozenset[str]) -> bool:
    """Whether one of the names is this one, or stands for it by what comes before one of its dots."""
    return bool(names) and any(above in names for above in _above(name))


def _above(name: str) -> Iterator[str]:
    """A name, and what stands above it: layer.0.q.A, layer.0.q, layer.0, layer."""
    while name:
        yield name
        name = name.rpartition(".")[0]
