"""Every architecture that fedlora claims against every claim; a few by default, all of them as slow tests."""

import re
from pathlib import Path

import pytest
from zoo_claims import CLAIMS, OF_DECODERS, Case
from zoo_table import ZOO

from fedlora.errors import FedLoraError, ModelError
from fedlora.models import targets

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore:lora.targets=all-linear leaves out"),  # the table says what
]
EVERY = [
    pytest.param(name, claim, marks=() if entry.fast else pytest.mark.slow)
    for name, entry in ZOO.items()
    for claim in (CLAIMS if entry.trained else ["step"])
    if entry.kind == "instruction" or claim not in OF_DECODERS
]


@pytest.fixture(scope="session")
def cases(root: Path) -> dict[str, Case]:
    return {name: Case(entry, root, name) for name, entry in ZOO.items()}


@pytest.mark.parametrize(("name", "claim"), EVERY)
def test_an_architecture_keeps_a_claim_or_refuses_it_in_the_words_of_the_table(
    cases: dict[str, Case], name: str, claim: str
) -> None:
    case = cases[name]
    said = case.entry.refused.get(claim if case.entry.trained else next(iter(case.entry.refused)))
    if said is None:
        CLAIMS[claim](case)
    else:
        with pytest.raises(FedLoraError, match=re.escape(said)) as caught:
            CLAIMS[claim](case)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "named", "said"),
    [
        ("bigbird", "pooler", "bert.pooler (no part in the loss)"),
        ("mamba2", "out_proj", "backbone.layers.*.mixer.out_proj (PEFT refuses it: Module 'out_proj'"),
        ("deepseek-v3", ["shared_experts.*"], "(PEFT drops their factors when it loads the adapter)"),
        ("jamba", "dt_proj", "(never called)"),
    ],
)
def test_a_named_target_that_cannot_be_adapted_is_refused_with_its_name(
    cases: dict[str, Case], name: str, named: str | list[str], said: str
) -> None:
    with pytest.raises(ModelError, match=re.escape(said)) as caught:
        targets(cases[name].base, named)
    assert len(str(caught.value).splitlines()) == 1
