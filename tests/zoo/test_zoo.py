"""Every architecture that fedlora claims against every claim; a few by default, all of them as slow tests."""

import json
import re
import warnings
from pathlib import Path

import pytest
from transformers.utils import logging
from zoo_claims import CLAIMS, Case
from zoo_models import checkpoint, lines
from zoo_table import ZOO

from fedlora.errors import FedLoraError, ModelError
from fedlora.experiments.run import main
from fedlora.models import targets

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore:lora.targets=all-linear leaves out"),  # the table says what
]
EVERY = [pytest.param(n, marks=() if entry.fast else pytest.mark.slow) for n, entry in ZOO.items()]
RESUMED = [pytest.param(n, marks=() if n == "bert" else pytest.mark.slow) for n in ZOO]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="session")
def cases(root: Path) -> dict[str, Case]:
    return {name: Case(entry, root, name) for name, entry in ZOO.items()}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("name", EVERY)
def test_an_architecture_keeps_a_claim_or_refuses_it_in_the_words_of_the_table(
    cases: dict[str, Case], name: str, claim: str
) -> None:
    case = cases[name]
    said = case.entry.refused.get("load") or case.entry.refused.get(claim)
    if said is None:
        CLAIMS[claim](case)
    else:
        with pytest.raises(FedLoraError, match=re.escape(said)) as caught:
            CLAIMS[claim](case)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_in_the_bytes_of_the_run_that_went_through(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    entry = ZOO[name]
    if "load" in entry.refused:
        pytest.skip("refused, as the other claims show")
    monkeypatch.setattr("fedlora.report.write_report", lambda runs, to, *more: to)
    for file, number in (("train", 12), ("test", 3)):
        told = [json.dumps(line) for line in lines(entry, number, number)]
        (tmp_path / f"{file}.jsonl").write_text("\n".join(told) + "\n")
    columns = {"classification": "text label", "instruction": "prompt response"}[entry.kind].split()
    words = [
        f"model.path={checkpoint(entry, root / name)}",
        f"lora.targets={entry.targets if isinstance(entry.targets, str) else json.dumps(entry.targets)}",
        "data=files",
        f"data.train={tmp_path}/train.jsonl",
        f"data.test={tmp_path}/test.jsonl",
        *(f"data.{column}={column}" for column in columns),
        "clients=3",
        "ranks=[1,2]",
        "strategy=flexlora",
    ]
    for verb in (
        ["run", "model=hub", *words, "rounds=2", f"out={tmp_path}/whole"],
        ["run", "model=hub", *words, "rounds=1", f"out={tmp_path}/cut"],
        ["run", f"resume={tmp_path}/cut", "rounds=2"],
    ):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            main(verb)
        # A model that cannot tell clients of one pass apart trains them one by one, and says so once.
        said = [str(one.message) for one in told]
        assert sum(line.startswith("clients train one by one: ") for line in said) == (
            "fused" in entry.refused
        )
        others = [
            line for line in said if not line.startswith(("clients train one by one: ", "lora.targets="))
        ]
        assert all(str(root / name) in line for line in others), others
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


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
