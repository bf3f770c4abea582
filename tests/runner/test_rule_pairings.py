"""What a rule that remembers gradients is refused with: one line each, before anything is loaded."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fedlora as fl
from fedlora.config.composition import compose
from fedlora.config.translate import run_spec
from fedlora.errors import ConfigError
from fedlora.rounds.scheduling import Scheduler
from fedlora.runner import compatibility
from fedlora.runner.compatibility_rules import scales_of_rule
from fedlora.runner.spec import RunSpec

PLAIN = ("weights=uniform", "client.optimizer._target_=torch.optim.SGD", "client.clip=null")
FIXED = "use federa, fedexlora, fedit, ffalora or privatelora"
MEANING = "gives the trained tensors another meaning"
SGD = partial(torch.optim.SGD, momentum=0.9)


@pytest.fixture(scope="module")
def spec() -> RunSpec:
    """A run that it can work with, as the command line says it."""
    return run_spec(compose(["model=tiny", "data=tiny", "clients=4", "ranks=4", "rule=scaffold", *PLAIN]))


class Eager(Scheduler):
    """Does not wait."""

    def rounds(self, server: Any, grid: Any) -> Any:
        yield from ()


def test_strategies_of_a_fixed_basis_take_it(spec: RunSpec) -> None:
    for strategy in (fl.strategies.FedIT, fl.strategies.FeDeRA, fl.strategies.PrivateLoRA):
        compatibility.check(compatibility.BEFORE_LOADING, replace(spec, strategy=strategy()))


def client(**other: Any) -> Any:
    return lambda spec: {"client": replace(spec.client, **other)}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"strategy": fl.strategies.FlexLoRA()}, f"strategy FlexLoRA {MEANING} .* {FIXED}"),
        ({"strategy": fl.strategies.RoLoRA()}, f"strategy RoLoRA {MEANING} .* {FIXED}"),
        (
            {"strategy": fl.strategies.FedSALoRA()},
            f"FedSALoRA leaves each client a part of its own.* {FIXED}",
        ),
        (client(optimizer=torch.optim.AdamW), r"client\.optimizer is AdamW; say client\.optimizer"),
        (client(optimizer=SGD), r"client\.optimizer\.momentum is 0\.9; say"),
        (client(clip=1.0), r"client\.clip is 1; say .*client\.clip=null"),
        (client(schedule="cosine"), "the rate changes with client.schedule=cosine client.warmup=0; say"),
        (client(warmup=0.1), r"client\.schedule=constant client\.warmup=0\.1; say"),
        (
            lambda spec: {"client": fl.clients.TwoPhase(spec.client)},
            "client TwoPhase trains in steps of its own",
        ),
        ({"weights": "examples"}, "counts clients alike, and with weights=examples .* say weights=uniform"),
        ({"privacy": fl.privacy.DPSGD(epsilon=8)}, "another release, which epsilon does not count"),
        ({"privacy": fl.privacy.ClientLevel(epsilon=8, clip=1)}, "another release, which epsilon does not"),
        ({"secure_sum": True}, "would arrive without masks; use rule=fedprox, or secure_sum=false"),
        ({"robust": fl.robust.Median()}, "robust=Median judges updates, and not what Scaffold has"),
        ({"scheduler": Eager()}, "Scaffold takes all that .* got Eager; use scheduler=synchronous"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_it_cannot_work_with_is_refused_with_the_reason(spec: RunSpec, other: Any, message: str) -> None:
    known = replace(spec, **(other(spec) if callable(other) else other))
    with pytest.raises(ConfigError, match=f"(rule|scheduler): .*{message}") as caught:
        compatibility.check(compatibility.BEFORE_LOADING, known)
    assert "\n" not in str(caught.value)


def test_ranks_of_different_scales_are_refused(spec: RunSpec) -> None:
    def said(ranks: list[int], **lora: Any) -> Any:
        known = SimpleNamespace(spec=replace(spec, lora=replace(spec.lora, **lora)), ranks=ranks)
        return scales_of_rule(known)  # type: ignore[arg-type]

    assert "needs clients of one scale" in said([2, 4], alpha=16)
    assert said([4, 4], alpha=16) is None
    assert said([2, 4]) is None
