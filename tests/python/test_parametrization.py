"""A parametrization of an author's own in whole runs: trained, aggregated, exported, merged, and refused."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outside_parametrizations import FourierFT, VeRA
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import fedlora as fl
from fedlora.core.strategy import mean_adapter
from fedlora.errors import ConfigError, ModelError
from fedlora.models.parametrizations import CoreMatrix, DoRA, Sparse, composed

pytestmark = [
    pytest.mark.slow,  # whole runs
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
LoRASpec = fl.LoRASpec
ROWS = ["the cat number 1", "a hammer and a saw", "nothing of the kind"]


def run(form: Any, **more: Any) -> fl.Run:
    lora = LoRASpec(parametrization=form, **more.pop("fields", {}))
    client = fl.clients.LocalTraining(lr=0.05, head_lr=0.01, epochs=2)
    settings = {"clients": 3, "ranks": 4, "rounds": 1, "progress": False, "lora": lora, "client": client}
    return fl.simulate("tiny", "tiny", **settings | more)


def own(made: fl.Run) -> dict[str, torch.Tensor]:
    """The factors of the parametrization in the last state."""
    heads = made.state.adapter.heads()
    return {name: t for name, t in made.state.adapter.tensors() if name not in heads}


@pytest.mark.parametrize("form", [VeRA(1, 5), FourierFT(), Sparse(3), composed(VeRA(), DoRA())], ids=repr)
def test_it_trains_and_fedit_averages_its_factors_as_they_are(form: Any, tmp_path: Path) -> None:
    made = run(form, record_updates=True, rounds=2, out=tmp_path / "run")
    assert made.state.adapter.parametrization == form
    assert not made.state.adapter.pairs
    from fedlora.storage.update_log import UpdateLog

    before, updates = UpdateLog(tmp_path / "run").read(2)
    total = sum(update.weight for update in updates)
    start = dict(before.adapter.tensors())
    for name, tensor in own(made).items():
        sent = [dict(update.adapter.tensors())[name] for update in updates]
        assert not torch.equal(sent[0], start[name])
        assert not torch.equal(sent[0], sent[1])
        mean = sum(u.weight / total * t.double() for u, t in zip(updates, sent, strict=True))
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-9)
    assert made.metrics[-1]["loss"] != made.metrics[0]["loss"]


def logits(model: Any, texts: Sequence[str], tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


def ours(made: fl.Run) -> torch.Tensor:
    from fedlora.models import MultiAdapterModel

    base, state = made.base(), made.state
    with MultiAdapterModel(base, [fl.Task(state.adapter, base_delta=state.base_delta)]):
        return logits(base.model, ROWS, base.tokenizer)


@pytest.mark.parametrize("form", [VeRA(1, 5), composed(VeRA(), DoRA())], ids=repr)
def test_what_has_a_low_rank_form_is_an_adapter_that_plain_peft_loads(form: Any, tmp_path: Path) -> None:
    made = run(form, out=tmp_path / "run")
    assert type(made.model()).__name__.startswith("PeftModel")
    base = made.base(plain=True)
    theirs = PeftModel.from_pretrained(base.model, str(tmp_path / "run" / "adapter")).eval()
    torch.testing.assert_close(logits(theirs, ROWS, base.tokenizer), ours(made), rtol=1e-4, atol=1e-5)
    assert "logits" in made.verify()


@pytest.mark.parametrize("form", [VeRA(1, 5), FourierFT(), composed(FourierFT(), DoRA())], ids=repr)
def test_a_merged_model_gives_the_run_s_logits_without_any_of_our_code(form: Any, tmp_path: Path) -> None:
    made = run(form, out=tmp_path / "run")
    made.save(tmp_path / "merged", merge=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    got = logits(model, ROWS, made.base().tokenizer)
    torch.testing.assert_close(got, ours(made), rtol=1e-4, atol=1e-5)


def test_what_has_no_low_rank_form_is_no_adapter_of_peft_and_says_so(tmp_path: Path) -> None:
    made = run(FourierFT(), out=tmp_path / "run")
    assert made.summary["adapter_sha256"] is None
    assert not (tmp_path / "run" / "adapter").exists()
    with pytest.raises(ModelError, match=r"FourierFT has no form that PEFT's LoRA could hold; .* merged"):
        made.save(tmp_path / "adapter")


def test_a_run_goes_on_from_python_where_its_configuration_cannot_name_the_class(tmp_path: Path) -> None:
    form = VeRA(1, 5)
    whole = run(form, rounds=2)
    run(form, out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"lora.*resume\(lora=\.\.\."):
        fl.open(tmp_path / "run").resume(rounds=2)
    lora = LoRASpec(parametrization=form)
    again = fl.open(tmp_path / "run", lora=lora)
    assert again.resume(rounds=2, progress=False).state.adapter.digest() == whole.state.adapter.digest()


@dataclass(frozen=True)
class Plain(fl.Strategy):
    """A strategy whose author knows A, B and extras, and builds its adapter anew."""

    mixed_ranks = False
    linear = True
    exact = False

    def aggregate(self, state: fl.State, updates: Sequence[fl.Update], rng: np.random.Generator) -> fl.State:
        sent, weights = self.admit(state, updates)
        mean = mean_adapter(state, sent, weights)
        return fl.State(fl.Adapter(mean.pairs, mean.extra), state.round + 1, seed=state.seed)


def test_a_strategy_that_knows_nothing_of_it_keeps_it() -> None:
    for form in (VeRA(1, 5), DoRA()):
        made, want = run(form, strategy=Plain()), run(form)
        assert made.state.adapter.digest() == want.state.adapter.digest()


def test_each_row_s_gradient_is_clipped_under_dp_sgd() -> None:
    privacy = fl.privacy.DPSGD(epsilon=6, insecure_test_seed=1)
    made = run(VeRA(1, 5), privacy=privacy)
    assert made.summary["ledger"]["clients"]
    with pytest.raises(ConfigError, match="parametrization=FourierFT: has no gradient for each record"):
        run(FourierFT(), privacy=privacy)


@pytest.mark.parametrize(
    ("form", "more", "message"),
    [
        (
            VeRA(),
            {"ranks": [2, 4], "strategy": "flexlora"},
            "ranks: lora.parametrization=VeRA has factors of",
        ),
        (VeRA(), {"fields": {"init": "pissa"}}, "lora={'init': 'pissa'}: gives factors A and B"),
        (VeRA(), {"strategy": "federa"}, "lora={'init': 'pissa'}: gives factors A and B"),
        (CoreMatrix(), {}, "CoreMatrix: its A and B are no update by themselves"),
        (
            VeRA(),
            {"strategy": "fedms", "client": None},
            "FedMS trains with a client of its own, which knows plain LoRA",
        ),
        (DoRA(), {"fields": {"dora": True}}, "two of one layer name a factor 'magnitude'"),
    ],
)
def test_pairings_that_cannot_work_are_refused_in_one_line(form: Any, more: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(form, **more)


def test_the_command_line_names_packaged_ones_and_trusted_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlora.config.composition import compose
    from fedlora.config.instantiate import Trust
    from fedlora.config.translate import run_spec

    tiny = ["model=tiny", "data=tiny"]
    assert run_spec(compose([*tiny, "lora.parametrization=sparse"])).lora.form == Sparse()
    assert run_spec(compose([*tiny, "lora.parametrization=dora"])).lora.form == DoRA()
    assert run_spec(compose([*tiny, "lora.dora=true"])).lora.form == DoRA()
    with pytest.raises(ConfigError, match=r"expected lora, dora, sparse or a _target_, got 'vera'"):
        run_spec(compose([*tiny, "lora.parametrization=vera"]))
    named = compose([*tiny, "lora.parametrization={_target_: outside_parametrizations.VeRA, rank: 7}"])
    with pytest.raises(ConfigError, match=r"allow=\[outside_parametrizations\]"):
        run_spec(named)
    trusted = run_spec(Trust(("outside_parametrizations",)).into(named))
    assert trusted.lora.form == VeRA(0, 7)
