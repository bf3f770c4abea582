"""The interface of a local rule: what bends a client's training away from the mean loss of its rows."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

from torch import Tensor

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.core.method import MethodPart
from fedlora.errors import ConfigError


class LocalRule(MethodPart):
    """What one method adds to local training: a term in every gradient, and a last word on the result.

    Subclasses are frozen dataclasses; their fields are the paper's hyper-parameters. A rule comes with the
    task of a strategy, or from the user by `LocalTraining(rules=...)`. Both methods are pure and see one
    client at a time, whoever is trained in the same pass. The terms of several rules add up; their last words
    are said in turn, those of the strategy's rules first.

    Attributes:
        independent_of_rows: whether the rule knows the client's rows by nothing but the tensors that training
            has made of them. Only then may it be used under differential privacy of records: a step there is
            a noised sum over rows, and what is added to it must tell nothing more of them.
    """

    independent_of_rows: ClassVar[bool] = False

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

    def finish(self, trained: Adapter, start: Adapter) -> Adapter:
        """What the client keeps and sends in the place of what it has trained; the same by default.

        A strategy's rule may give other ranks, those that `replies` announces; a user's may not, since no
        server expects them.

        Args:
            trained: the client's whole adapter after the last step.
            start: its adapter at the beginning of the round.
        """
        return trained


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
    return rule.independent_of_rows and all(declared <= depth(name) for name in ("gradient", "finish"))
