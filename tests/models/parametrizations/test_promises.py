"""The public check of a parametrization: ours and an author's keep its promises; broken ones are named."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from outside_parametrizations import FourierFT, VeRA
from torch import Tensor

from fedlora.core.parametrization import LORA, Parametrization
from fedlora.errors import ConfigError
from fedlora.models.parametrizations import CoreMatrix, DoRA, Layer, Sparse, composed
from fedlora.testing import check_parametrization
from fedlora.testing.parametrization import broken

KEPT = [LORA, DoRA(), CoreMatrix(), Sparse(3), VeRA(1, 5), FourierFT()]
KEPT += [composed(VeRA(), DoRA()), composed(CoreMatrix(), DoRA()), composed(Sparse(2), DoRA())]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def name(form: Parametrization) -> str:
    return "+".join(type(part).__name__ for part in getattr(form, "parts", (form,)))


@pytest.mark.parametrize("form", KEPT, ids=name)
def test_ours_and_an_author_s_keep_every_promise(form: Parametrization) -> None:
    check_parametrization(form)


@dataclass(frozen=True)
class OtherVeRA(VeRA):
    """VeRA with other words for its factors."""

    factors = ("d2", "b2")


@dataclass(frozen=True)
class Jumps(VeRA):
    """Starts away from the base."""

    def start(self, layer: Layer, fresh: Any, rng: Any) -> dict[str, Tensor]:
        return {"d": torch.ones(self.rank), "b": torch.ones(layer.shape[0])}


@dataclass(frozen=True)
class Idle(VeRA):
    """Has a factor that does nothing."""

    factors = ("d", "b", "spare")

    def start(self, layer: Layer, fresh: Any, rng: Any) -> dict[str, Tensor]:
        return {**super().start(layer, fresh, rng), "spare": torch.ones(2)}


@dataclass(frozen=True)
class Stretches(DoRA):
    """Does not do when merged what it does before."""

    def weight(self, layer: Layer, weight: Tensor, factors: Any) -> Tensor:
        return weight


@dataclass(frozen=True)
class Flat(VeRA):
    """Forgets that a factor may have a dimension for the rows."""

    def low_rank(self, layer: Layer, factors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return factors["d"].reshape(-1, 1) * factors["A"], factors["b"].reshape(-1, 1) * factors["B"]


@dataclass(frozen=True)
class Restless(VeRA):
    """Draws other constants at every call."""

    def constants(self, layer: Layer, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: torch.randn_like(t) for n, t in super().constants(layer, factors).items()}


@dataclass(frozen=True)
class Shrinks(VeRA):
    """Cuts where nothing is to be cut."""

    def resize(self, factors: Any, rank: int) -> dict[str, Tensor]:
        return {word: tensor[:1] for word, tensor in factors.items()}


@dataclass(frozen=True)
class Opaque(VeRA):
    """Has a setting that does not travel."""

    how: Any = object


@dataclass(frozen=True)
class Weak(VeRA):
    """Has factors that do next to nothing."""

    def low_rank(self, layer: Layer, factors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        A, B = super().low_rank(layer, factors)
        return A, 1e-9 * B


@dataclass(frozen=True)
class Crowded(VeRA):
    """Takes the size of the batch into the result."""

    def output(self, layer: Layer, output: Tensor, factors: Any, change: Any) -> Tensor:
        return output * (1 + 1e-2 * (len(output) - 6) ** 2)


@dataclass(frozen=True)
class Gain(Parametrization):
    """Stretches the output of every row by a factor of its own."""

    factors = ("gain",)

    def start(self, layer: Layer, fresh: Any, rng: Any) -> dict[str, Tensor]:
        return {"A": fresh.A, "B": fresh.B, "gain": torch.ones(layer.shape[0]).to(fresh.A)}

    def output(self, layer: Layer, output: Tensor, factors: Any, change: Any) -> Tensor:
        plain = output if layer.bias is None else output - layer.bias
        stretched = factors["gain"] * plain
        return stretched if layer.bias is None else stretched + layer.bias

    def weight(self, layer: Layer, weight: Tensor, factors: Any) -> Tensor:
        return factors["gain"][:, None] * weight


BROKEN = {
    Weak(): "its_start_changes_nothing",
    Crowded(): "clients_at_once_are_each_alone",
    Jumps(): "its_start_changes_nothing",
    Idle(): "every_factor_learns",
    Stretches(): "a_merged_model_does_the_same",
    Flat(): "rows_have_gradients_of_their_own",
    Restless(): "a_merged_model_does_the_same",
    Shrinks(): "the_same_rank_changes_no_factor",
    Opaque(): "an_adapter_survives_its_message",
}


@pytest.mark.parametrize(("form", "promise"), BROKEN.items(), ids=lambda x: getattr(x, "__name__", None))
def test_a_broken_promise_is_named(form: Parametrization, promise: str) -> None:
    found: Iterator[tuple[str, str]] = broken(form)
    named = promise.replace("_", " ")
    assert named in {which for which, _ in found}
    with pytest.raises(AssertionError, match=rf"{type(form).__name__} breaks [\s\S]*- {named}: "):
        check_parametrization(form)


@pytest.mark.parametrize(
    "form",
    [Gain(), composed(DoRA(), Gain()), composed(Gain(), DoRA()), composed(VeRA(), Gain(), DoRA())],
    ids=name,
)
def test_a_part_sees_what_the_one_before_it_has_made_of_the_weight(form: Parametrization) -> None:
    check_parametrization(form)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ((VeRA(), OtherVeRA()), "one low-rank term, which VeRA and OtherVeRA both give"),
        ((CoreMatrix(), Sparse()), "CoreMatrix needs A and B, and Sparse leaves them out"),
        ((FourierFT(), CoreMatrix()), "CoreMatrix needs A and B, and FourierFT leaves them out"),
        ((CoreMatrix(), OtherVeRA()), "both give"),
    ],
    ids=lambda x: None,
)
def test_parts_that_cannot_be_of_one_layer_are_refused(parts: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        composed(*parts)


def test_a_start_without_a_factor_is_named() -> None:
    @dataclass(frozen=True)
    class Empty(VeRA):
        def start(self, layer: Layer, fresh: Any, rng: Any) -> dict[str, Tensor]:
            return {"d": torch.ones(2)}

    with pytest.raises(
        AssertionError, match=r"it starts: ConfigError: Empty\.start: expected the factors of"
    ):
        check_parametrization(Empty())
