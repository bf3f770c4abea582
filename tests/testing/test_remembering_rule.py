"""The public check of a rule that remembers or has a half at the server; broken ones are named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fedlora.core.messages import Peer, Task, Update
from fedlora.testing import check_rule
from fedlora.training.rules import Learned, LocalRule, RoundEnd, RoundStart, Scaffold, ServerMemory
from fedlora.training.rules.base import Term

Tensors = Mapping[str, Tensor]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@dataclass(frozen=True)
class Velocity(LocalRule):
    """Goes on in the direction in which the client's last round went, and never tells it."""

    rate: float = 0.1
    independent_of_rows = True

    def term(self, given: RoundStart) -> Term:
        return lambda tensors: {
            n: -self.rate * given.memory[n].to(t) for n, t in tensors.items() if n in given.memory
        }

    def end(self, given: RoundEnd) -> Learned:
        before, after = dict(given.adapter.tensors()), dict(given.trained.tensors())
        return Learned({name: after[name] - before[name] for name in given.rates})


@pytest.mark.parametrize("rule", [Scaffold(), Velocity()], ids=lambda rule: type(rule).__name__)
def test_ours_and_an_author_s_keep_every_promise(rule: LocalRule) -> None:
    check_rule(rule)


@dataclass(frozen=True)
class Remembering(Velocity):
    """Remembers in some way that is wrong."""

    wrong: str = ""
    independent_of_rows = False

    def term(self, given: RoundStart) -> Term:
        if self.wrong == "written into":
            for tensor in given.memory.values():
                tensor.mul_(0.9)
        return super().term(given)

    def end(self, given: RoundEnd) -> Learned:
        left, calls = super().end(given), self.__dict__.get("calls", 0) + 1
        object.__setattr__(self, "calls", calls)
        first, tensor = next(iter(left.memory.items()))
        return {
            "written into": lambda: left,
            "counted": lambda: Learned({**left.memory, "calls": torch.tensor(float(calls))}),
            "no number": lambda: Learned({**left.memory, first: tensor / 0}),
            "no tensor": lambda: Learned({**left.memory, "times": 3}),  # type: ignore[dict-item]
            "sent to nobody": lambda: Learned(left.memory, {first: tensor}),
        }[self.wrong]()


@dataclass(frozen=True)
class Telling(LocalRule):
    """Announces a mean of two numbers, and does otherwise."""

    wrong: str = ""

    def ask(self, known: ServerMemory, task: Task, peer: Peer) -> LocalRule:
        return self

    def sends(self, task: Task) -> Tensors:
        return {"mean": torch.zeros(2)}

    def end(self, given: RoundEnd) -> Learned:
        sent = {"mean": torch.ones(2)}
        other = {
            "less": {},
            "more": {**sent, "other": torch.ones(1)},
            "longer": {"mean": torch.ones(3)},
            "infinite": {"mean": sent["mean"] / 0},
        }
        return Learned({}, other.get(self.wrong, sent))

    def learn(self, known: ServerMemory, updates: Sequence[Update]) -> Tensors:
        if self.wrong == "written at the server":
            for tensor in known.tensors.values():
                tensor.add_(1)
        return {"mean": torch.full((2,), float("nan") if self.wrong == "lost at the server" else 1.0)}


BROKEN = [
    (Remembering(wrong="written into"), "nothing_that_is_given_changes", "gradient writes to '"),
    (Telling("written at the server"), "nothing_that_is_given_changes", "learn writes to 'mean'"),
    (Remembering(wrong="counted"), "the_same_call_gives_the_same_answer", "calls of end differ at 'memory c"),
    (Remembering(wrong="no number"), "what_it_remembers_can_be_written_down", "end keeps '.*', which is no"),
    (Remembering(wrong="no tensor"), "what_it_remembers_can_be_written_down", "end keeps 'times', which is"),
    (Telling("lost at the server"), "what_it_remembers_can_be_written_down", "learn keeps 'mean', which"),
    (Remembering(wrong="sent to nobody"), "it_sends_what_it_announces", "as .* sends announces nothing"),
    (Telling("less"), "it_sends_what_it_announces", r"sends 'mean' as nothing, and sends announces \(2,\)"),
    (Telling("more"), "it_sends_what_it_announces", "sends 'other' as .* and sends announces nothing"),
    (Telling("longer"), "it_sends_what_it_announces", r"'mean' as \(3,\) .* and sends announces \(2,\)"),
    (Telling("infinite"), "it_sends_what_it_announces", "sends 'mean' with numbers that are not finite"),
]


@pytest.mark.parametrize(
    ("rule", "promise", "said"),
    BROKEN,
    ids=lambda value: value[:60] if isinstance(value, str) else type(value).__name__,
)
def test_a_broken_promise_is_named(rule: LocalRule, promise: str, said: str) -> None:
    named = promise.replace("_", " ")
    with pytest.raises(AssertionError, match=rf"{type(rule).__name__} breaks [\s\S]*- {named}: .*{said}"):
        check_rule(rule)
