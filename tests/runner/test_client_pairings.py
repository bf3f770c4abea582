"""Which client goes with which strategy, models that differ from client to client, and what both refuse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel

from fedlora.clients import GatedExperts, SlicedTraining, TwoPhase
from fedlora.config.composition import compose
from fedlora.config.translate import run_spec
from fedlora.runner.assemble import assemble

pytestmark = pytest.mark.slow  # whole runs

SMALL = ("model=tiny", "data=tiny", "clients=3", "ranks=4", "+data.source.rows=48")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another width, with a tokenizer that knows other tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "narrow"
    letters = {token: i for i, token in enumerate(["[PAD]", "[UNK]", *"etaoinshrdlu"])}
    made = Tokenizer(models.WordLevel(letters, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    ).save_pretrained(str(folder))
    config = BertConfig(
        vocab_size=14,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(str(folder))
    return folder


def job(*overrides: str) -> Any:
    return assemble(run_spec(compose([*SMALL, *overrides])))


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["strategy=fedms"], GatedExperts),
        (["strategy=pfedlora"], TwoPhase),
        (["client=sliced"], SlicedTraining),
        (["strategy=ffalora", "client=sliced"], SlicedTraining),
    ],
)
def test_a_strategy_brings_its_client_and_the_settings_keep_their_names(words: list[str], kind: type) -> None:
    client = job(*words, "client.epochs=3", "client.head_lr=0.5").runtime.client
    assert type(client) is kind
    assert client.local.epochs == 3
    assert client.local.head_lr == 0.5
    assert client.local.lr == pytest.approx(5e-2 if "strategy=ffalora" in words else 1e-2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["strategy=fedms", "client=local"], ["FedMS", "GatedExperts", "LocalTraining", "leave client="]),
        (["strategy=pfedlora", "client=gated"], ["PFedLoRA", "TwoPhase", "GatedExperts"]),
        (["strategy=fedit", "client=twophase"], ["TwoPhase", "FedIT", "strategy=pfedlora"]),
        (["models=[tiny]"], ["models", "FedIT", "strategy=pfedlora"]),
        (["strategy=pfedlora", "models=[tiny,/no/where]"], ["model.path", "/no/where"]),
        (["strategy=pfedlora", "models=[hub]"], ["models", "'hub'"]),
        (["strategy=pfedlora", "lora.adapter=/x"], ["lora.adapter", "TwoPhase"]),
        (["strategy=fedms", "evaluate.updates=true"], ["evaluate.updates", "FedMS"]),
        (["strategy=fedms", "strategy.capacity=[0]"], ["strategy.capacity"]),
        (["client=sliced", "client.cut=0"], ["client.cut"]),
        (["strategy=pfedlora", "client.mu=2"], ["client.mu"]),
        (
            ["strategy=ffalora", "privacy=dp_sgd", "client.max_tokens=64"],
            ["client.max_tokens", "leave it out"],
        ),
    ],
)
def test_a_pairing_that_cannot_work_is_refused(
    no_run: Callable[..., str], words: list[str], says: list[str]
) -> None:
    said = no_run(*words)
    assert all(word in said for word in says), said


def test_models_are_dealt_in_turn_each_with_its_own_tokens(narrow: Path) -> None:
    made = job("strategy=pfedlora", f"models=[tiny,'{narrow}']", "clients=4")
    assert [base.model.config.hidden_size for base in made.runtime.bases] == [32, 12]
    assert made.base is made.runtime.bases[0]
    assert [set(made.start.adapter.pairs)] == [{"shared"}]
    assert not made.start.adapter.extra
    top = [max(i for row in made.runtime.rows(k) for i in row.input_ids) for k in range(4)]
    assert max(top[1], top[3]) < 14 < min(top[0], top[2])


def test_without_models_there_is_one(narrow: Path) -> None:
    made = job("strategy=pfedlora")
    assert not made.runtime.bases
    assert made.base.model.config.hidden_size == 32
    assert len(job("strategy=pfedlora", "models=tiny").runtime.bases) == 1


def test_a_run_over_two_models(narrow: Path, tmp_path: Path) -> None:
    import json

    from fedlora.cli.main import main

    models = f"models=[tiny,'{narrow}']"
    main(["run", *SMALL, "strategy=pfedlora", models, "rounds=2", f"out={tmp_path / 'run'}"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "clients.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["ok"] * 6
    assert len({line["bytes_up"] for line in lines[:3]}) <= 2  # the same tensors; metrics may differ in size
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["model"] == f"tiny, {narrow}"
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_cut_that_the_model_does_not_have_is_refused_before_anything_is_trained(
    no_run: Callable[..., str],
) -> None:
    said = no_run("client=sliced", "client.cut=9")
    assert "client.cut" in said
    assert "2 layers" in said
