"""The interface of a local rule: what bends a client's training away from the mean loss of its rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Peer, Task, Update
from fedlora.core.method import MethodPart
from fedlora.errors import ConfigError

Term = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
AT_CLIENT = ("gradient", "term", "finish", "end")  # the methods that may see what rows have made


@dataclass(frozen=True)
class RoundStart:
    """Where a client's round begins, for a rule.

    Args:
        adapter: the client's whole adapter, frozen tensors too, on the CPU.
        start: name, as `Adapter.tensors` has it, -> what is trained, as it begins, on the model's device.
        memory: what this rule kept when the client last trained in this run; empty the first time.
    """

    adapter: Adapter
    start: Mapping[str, Tensor]
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundEnd:
    """Where the steps of a client's round have led, for a rule.

    Args:
        adapter: the client's whole adapter at the beginning of the round.
        trained: the same after the last step, before any rule had its last word on it.
        steps: the number of steps that were taken.
        rates: name -> learning rate, of everything that was trained; the one that a schedule starts from.
        memory: as for `RoundStart`.
    """

    adapter: Adapter
    trained: Adapter
    steps: int
    rates: Mapping[str, float]
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Learned:
    """What is left of a rule's round at a client.

    Args:
        memory: name -> tensor, kept on the client's own disk until it trains again; never sent.
        sent: name -> tensor, sent beside the adapter: what `sends` announces, and nothing else.
    """

    memory: Mapping[str, Tensor] = field(default_factory=dict)
    sent: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerMemory:
    """What the server remembers for a rule, and which clients there are.

    Args:
        version: the `State.round` of the state that it belongs to.
        tensors: what `learn` returned last; empty before that.
        kinds: for each kind of client, the shapes of what it shares, and how many such clients there are; a
            client of the largest ranks is among them, even if there are 0 of it.
    """

    version: int
    tensors: Mapping[str, Tensor]
    kinds: Sequence[tuple[Mapping[str, tuple[int, ...]], int]]

    def holders(self, name: str, shape: Sequence[int]) -> Tensor:
        """How many clients hold each number of a tensor, as far as this shape reaches; float64, at least 1.

        A client of a smaller rank holds the first rows or columns of what others hold.
        """
        count = torch.zeros(tuple(shape), dtype=torch.float64)
        for shapes, clients in self.kinds:
            corner(count, shapes[name]).add_(clients)
        return count.clamp_min(1)

    def widest(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that has all that any client holds of it."""
        every = [shapes[name] for shapes, _ in self.kinds]
        return tuple(max(lengths) for lengths in zip(*every, strict=True))


class LocalRule(MethodPart):
    """What one method adds to local training: a term in every gradient, and a last word on the result.

    Subclasses are frozen dataclasses; their fields are the paper's hyper-parameters. A rule comes with the
    task of a strategy, or from the user by `LocalTraining(rules=...)`. All methods are pure and see one
    client at a time, whoever is trained in the same pass. The terms of several rules add up; their last words
    are said in turn, those of the strategy's rules first.

    A rule may remember: what `end` returns as memory is what `term` and `end` are given in the client's next
    round. A rule may have a half at the server: the rule that `ask` returns is then sent to each client with
    its task, what this one's `end` sends comes back in the same reply, and `learn` makes of it what the
    server remembers. Such a rule belongs to a run (`rule=`), since the server has to know of it.

    Attributes:
        independent_of_rows: whether the rule knows the client's rows by nothing but the tensors that training
            has made of them. Only then may it be used under differential privacy of records: a step there is
            a noised sum over rows, and what is added to it must tell nothing more of them.
        plain_sgd: whether its formulas hold for plain steps alone, x ← x − lr · g at one constant rate.
        fixed_basis: whether what it remembers is in the coordinates of the factors, so that these must mean
            the same in every round and to every client.
        uniform: whether it counts clients alike, so that the strategy has to do so, too.
    """

    independent_of_rows: ClassVar[bool] = False
    plain_sgd: ClassVar[bool] = False
    fixed_basis: ClassVar[bool] = False
    uniform: ClassVar[bool] = False

    def gradient(self, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is added to the gradients of a step, before they are clipped; nothing by default.

        Args:
            tensors: name, as `Adapter.tensors` has it, -> what is trained, as it now is, without a graph and
                on the model's device. Not to be written to.
            start: the same names -> the tensors with which the round began.

        Returns:
            Some of the names -> a term of the tensor's shape.
        """
        return {}

    def term(self, given: RoundStart) -> Term:
        """The function from `tensors` to the terms of a round's steps; by default that of `gradient`.

        It is asked for once, before the first step. A rule that remembers, or looks at frozen tensors,
        overrides this method in the place of `gradient`.

        Args:
            given: where the client begins.
        """
        return lambda tensors: self.gradient(tensors, given.start)

    def finish(self, trained: Adapter, start: Adapter) -> Adapter:
        """What the client keeps and sends in the place of what it has trained; the same by default.

        A strategy's rule may give other ranks, those that `replies` announces; a user's may not, since no
        server expects them.

        Args:
            trained: the client's whole adapter after the last step.
            start: its adapter at the beginning of the round.
        """
        return trained

    def end(self, given: RoundEnd) -> Learned:
        """What the rule remembers at the client, and what it sends; nothing by default.

        Args:
            given: where the steps have led.
        """
        return Learned()

    def ask(self, known: ServerMemory, task: Task, peer: Peer) -> "LocalRule":
        """The rule that is sent to a client; what `known` has for the client belongs into its fields.

        Args:
            known: what the server remembers.
            task: the strategy's task for the client, without the rule.
            peer: the client.
        """
        return self

    def learn(self, known: ServerMemory, updates: Sequence[Update]) -> Mapping[str, Tensor]:
        """What the server remembers once a round's updates have been combined; by default what it knew.

        Args:
            known: what it remembered when it sent the tasks.
            updates: those that the strategy has combined, in the order of their clients' ids. Their `sent`
                holds what the rule's own `end` sent, under the names that it gave.
        """
        return known.tensors

    @property
    def of_products(self) -> bool:
        """Whether it needs the low-rank term of every layer from the adapter alone; no by default."""
        return False

    @property
    def at_server(self) -> bool:
        """Whether it has a half at the server."""
        return type(self).ask is not LocalRule.ask


def corner(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The part of a tensor that one of this shape reaches: its first rows and columns, as a view."""
    return tensor[tuple(slice(0, length) for length in shape)]


def part_of(tensors: Mapping[str, Tensor], at: int) -> dict[str, Tensor]:
    """Those tensors of several parts of a task that are of the part in this place: "0/NAME" under "NAME"."""
    return {n.removeprefix(f"{at}/"): t for n, t in tensors.items() if n.startswith(f"{at}/")}


def rules_of(task: Task) -> tuple[LocalRule, ...]:
    """The local rules of a task, in their order."""
    return tuple(part for part in task.method if isinstance(part, LocalRule))


def check_private(rules: Iterable[LocalRule]) -> None:
    """Refuse the rules that differential privacy of records does not cover.

    Raises:
        ConfigError: a rule that does not say that its term is independent of the rows.
    """
    bad = sorted({type(rule).__name__ for rule in rules if not _independent(type(rule))})
    if bad:
        ours = [r for r in LocalRule.__subclasses__() if r.__module__.startswith("fedlora.")]
        good = sorted(rule.__name__ for rule in ours if _independent(rule))
        raise ConfigError(
            f"privacy: the term that {', '.join(bad)} adds to a step may tell of the client's rows, which no "
            f"noise hides; use {' or '.join(good)}, set independent_of_rows where it is true, or privacy=none"
        )


def _independent(rule: type[LocalRule]) -> bool:
    """Whether a class says so of the methods that it has: what a parent says of its own does not count."""

    def depth(name: str) -> int:
        return next(at for at, cls in enumerate(rule.__mro__) if name in cls.__dict__)

    declared = depth("independent_of_rows")
    return rule.independent_of_rows and all(declared <= depth(name) for name in AT_CLIENT)
