"""The public check of a local rule: ours and an author's keep its promises; broken ones are named."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlora.core.adapter import Adapter
from fedlora.core.algebra import truncate
from fedlora.testing import check_rule
from fedlora.training.rules import FedProx, LocalRule, RankPruning

Tensors = Mapping[str, Tensor]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@dataclass(frozen=True)
class Decay(LocalRule):
    """Pulls the factors B to zero."""

    rate: float = 0.1
    independent_of_rows = True

    def gradient(self, tensors: Tensors, start: Tensors) -> Tensors:
        return {name: self.rate * tensor for name, tensor in tensors.items() if name.endswith(".B")}


@dataclass(frozen=True)
class Pulled(LocalRule):
    """Holds a client near an adapter that comes in the message, as only a strategy's rule can."""

    towards: Mapping[str, Tensor]

    def gradient(self, tensors: Tensors, start: Tensors) -> Tensors:
        return {name: tensors[name] - self.towards[name] for name in tensors.keys() & self.towards.keys()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pulled) and all(
            torch.equal(t, other.towards[n]) for n, t in self.towards.items()
        )


@pytest.mark.parametrize(
    "rule",
    [
        FedProx(0.3),
        FedProx(0.3, "effective"),
        RankPruning(0.5, 0.1, 1),
        RankPruning(0.5, 0.0, 2),
        Decay(),
        Pulled({"b": torch.ones(2)}),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_ours_and_an_author_s_keep_every_promise(rule: LocalRule) -> None:
    check_rule(rule)


class Bare(LocalRule):
    """Is no dataclass."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bare)

    __hash__ = None  # type: ignore[assignment]


@dataclass
class Open(LocalRule):
    """Is not frozen."""

    rate: float = 0.1


@dataclass(frozen=True)
class Holding(Decay):
    """Has a field that does not travel."""

    independent_of_rows = False
    how: Any = object


@dataclass(frozen=True)
class Doubling(LocalRule):
    """Is made of its fields as another."""

    rate: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", 2 * self.rate)


@dataclass(frozen=True)
class Unasked(LocalRule):
    """Has a field that nobody can give."""

    rate: float = field(default=0.1, init=False)


@dataclass(frozen=True)
class Counting(LocalRule):
    """Keeps a number from call to call."""

    def finish(self, trained: Adapter, start: Adapter) -> Adapter:
        calls = self.__dict__.get("calls", 0) + 1
        object.__setattr__(self, "calls", calls)
        return trained.with_tensors({name: tensor / calls for name, tensor in trained.tensors()})


@dataclass(frozen=True)
class WithTerm(LocalRule):
    """Has a term that is wrong in some way."""

    wrong: str

    def gradient(self, tensors: Tensors, start: Tensors) -> Tensors:
        return {
            "written into the weight": lambda: {name: t.mul_(0.9) for name, t in tensors.items()},
            "drawn": lambda: {name: torch.randn_like(t) for name, t in tensors.items()},
            "of no tensor": lambda: {"somewhere.A": torch.zeros(2, 2)},
            "of both factors": lambda: {
                n: t * tensors[f"{n[:-1]}A"].norm() for n, t in tensors.items() if n[-2:] == ".B"
            },
            "of another shape": lambda: {name: t.reshape(-1) for name, t in tensors.items()},
            "of another dtype": lambda: {name: t.float() for name, t in tensors.items()},
            "on another device": lambda: {name: t.to("meta") for name, t in tensors.items()},
            "infinite": lambda: {name: t / 0 for name, t in tensors.items()},
        }[self.wrong]()


@dataclass(frozen=True)
class WithEnd(LocalRule):
    """Ends in an adapter that is wrong in some way."""

    wrong: str

    def finish(self, trained: Adapter, start: Adapter) -> Adapter:
        pairs = trained.pairs.items()
        return {
            "written into the trained one": lambda: Adapter(
                trained.pairs, {n: t.zero_() for n, t in trained.extra.items()}
            ),
            "cut": lambda: replace(trained, pairs={m: truncate(p, 1) for m, p in pairs}),
            "rescaled": lambda: replace(trained, pairs={m: replace(p, scale=1.0) for m, p in pairs}),
            "without its head": lambda: Adapter(trained.pairs),
            "infinite": lambda: trained.with_tensors({name: t / 0 for name, t in trained.tensors()}),
        }[self.wrong]()


@dataclass(frozen=True)
class First(LocalRule):
    """Holds all clients near the start of the first one of their rank."""

    def gradient(self, tensors: Tensors, start: Tensors) -> Tensors:
        kept = self.__dict__.setdefault("kept", {})
        anchor = {
            name: kept.setdefault((name, tensor.shape), tensor.clone()) for name, tensor in start.items()
        }
        return {name: tensor - anchor[name] for name, tensor in tensors.items()}


class Inheriting(FedProx):
    """Says of its own term what FedProx says of another; and forgets the decorator."""

    def gradient(self, tensors: Tensors, start: Tensors) -> dict[str, Tensor]:
        return {}


SEEN: list[Tensor] = []  # what the layers of a model were given


@dataclass(frozen=True)
class Spying(LocalRule):
    """Weighs its term by what the model has read."""

    independent_of_rows = True

    def gradient(self, tensors: Tensors, start: Tensors) -> Tensors:
        weight = SEEN[-1].sum() if SEEN else 1.0
        return {name: weight * tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class SpyingAtTheEnd(LocalRule):
    """Weighs its last word by what the model has read."""

    independent_of_rows = True

    def finish(self, trained: Adapter, start: Adapter) -> Adapter:
        weight = SEEN[-1].double().mean() if SEEN else 1.0
        return trained.with_tensors({name: weight * tensor for name, tensor in trained.tensors()})


@dataclass(frozen=True)
class Maybe(LocalRule):
    """Says neither yes nor no."""

    independent_of_rows = "mostly"  # type: ignore[assignment]


BROKEN = [
    (Bare(), "its_fields_are_a_frozen_dataclass", r"expected @dataclass\(frozen=True\)"),
    (Inheriting(), "its_fields_are_a_frozen_dataclass", r"expected @dataclass\(frozen=True\)"),
    (Open(), "its_fields_are_a_frozen_dataclass", r"expected @dataclass\(frozen=True\)"),
    (Holding(), "it_survives_its_message", "does not travel"),
    (Doubling(), "it_survives_its_message", "is another one"),
    (Doubling(), "it_can_be_made_again", "makes another rule"),
    (Unasked(), "it_can_be_made_again", "rate"),
    (WithTerm("written into the weight"), "nothing_that_is_given_changes", "gradient writes to '"),
    (WithEnd("written into the trained one"), "nothing_that_is_given_changes", "finish writes to '"),
    (WithTerm("drawn"), "the_same_call_gives_the_same_answer", "calls of gradient differ at '"),
    (Counting(), "the_same_call_gives_the_same_answer", "calls of finish differ"),
    (WithTerm("of no tensor"), "its_terms_fit_what_is_trained", "got one for 'somewhere.A'"),
    (WithTerm("of both factors"), "its_terms_fit_what_is_trained", "KeyError"),
    (WithTerm("of another shape"), "its_terms_fit_what_is_trained", r"expected a term for '.*' of \(2, "),
    (WithTerm("of another dtype"), "its_terms_fit_what_is_trained", "got .* torch.float32"),
    (WithTerm("on another device"), "its_terms_fit_what_is_trained", "got .* on meta"),
    (WithTerm("infinite"), "its_terms_fit_what_is_trained", "is not finite"),
    (WithEnd("cut"), "it_ends_in_an_adapter_that_the_server_expects", r"\.A' as \(1, .*expected \(2, "),
    (WithEnd("rescaled"), "it_ends_in_an_adapter_that_the_server_expects", "as scale 1.0, expected scale"),
    (WithEnd("without its head"), "it_ends_in_an_adapter_that_the_server_expects", "as nothing"),
    (WithEnd("infinite"), "it_ends_in_an_adapter_that_the_server_expects", "numbers that are not finite"),
    (First(), "clients_at_once_are_each_alone", "of client 1 differs by .* beside other clients"),
    (Inheriting(), "its_answer_is_independent_of_rows", "what a parent says"),
    (Spying(), "its_answer_is_independent_of_rows", "another term"),
    (SpyingAtTheEnd(), "its_answer_is_independent_of_rows", "another adapter"),
    (Maybe(), "its_answer_is_independent_of_rows", "True or False"),
]


@pytest.fixture
def spied() -> Iterator[None]:
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: SEEN.append(given[0]) if isinstance(module, nn.Embedding) else None
    )
    yield
    hook.remove()
    SEEN.clear()


@pytest.mark.usefixtures("spied")
@pytest.mark.parametrize(
    ("rule", "promise", "said"),
    BROKEN,
    ids=lambda value: value[:60] if isinstance(value, str) else type(value).__name__,
)
def test_a_broken_promise_is_named(rule: LocalRule, promise: str, said: str) -> None:
    named = promise.replace("_", " ")
    with pytest.raises(AssertionError, match=rf"{type(rule).__name__} breaks [\s\S]*- {named}: .*{said}"):
        check_rule(rule)
