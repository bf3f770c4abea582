"""Experts are trained as any layer is: clients together, and row by row for privacy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from private_jobs import compare, trained
from torch import Tensor, nn
from transformers import MixtralForSequenceClassification

import fedlora
from fedlora.core.messages import Peer, Task, Update
from fedlora.data import Example, collate
from fedlora.errors import ApartError, ConfigError
from fedlora.models import Base, MultiAdapterModel, per_row, save_adapter, targets
from fedlora.models.loading import tried
from fedlora.models.products import OneByOne
from fedlora.privacy import Mechanism, Source, self_test
from fedlora.strategies import FlexLoRA, FLoRA
from fedlora.training.steps import FitJob
from fedlora.training.trainer import fit

pytestmark = [
    pytest.mark.slow,  # whole runs or every architecture
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
RANKS, COUNTS, SCALES = (1, 3, 5), (3, 1, 4), (2.0, 0.7, 1.3)


def tasks(zoo: Any, base: Base) -> list[Task]:
    each = enumerate(zip(RANKS, SCALES, strict=True))
    return [Task(zoo.adapter(base, r, s, k, "q_proj", False, BOTH)) for k, (r, s) in each]


def rows_of(zoo: Any, base: Base) -> list[list[Example]]:
    return [zoo.rows(base, n, seed=k) for k, n in enumerate(COUNTS)]


def adam(groups: dict[str, list[nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for found in groups.values() for p in found], lr=0.01)


@pytest.mark.parametrize(("name", "stacked"), [("mixtral", False), ("mixtral", True), ("gpt-oss", False)])
def test_clients_of_mixed_ranks_learn_together_what_each_learns_alone(
    zoo: Any, name: str, stacked: bool
) -> None:
    base = zoo.base(name, double=True)
    together = replace(base, products=OneByOne()) if stacked else base
    jobs = [FitJob(t, [r, r[:1]]) for t, r in zip(tasks(zoo, base), rows_of(zoo, base), strict=True)]
    for job, found in zip(jobs, fit(together, jobs, adam), strict=True):
        alone = fit(base, [job], adam)[0].adapter
        assert zoo.gap(found.adapter, alone) < 1e-12
        assert zoo.gap(found.adapter, job.task.adapter) > 1e-3


def test_rows_get_gradients_of_their_own(zoo: Any) -> None:
    base = zoo.base("olmoe", double=True)
    work, rows = tasks(zoo, base), rows_of(zoo, base)
    with MultiAdapterModel(base, work, train=True, per_row=True) as bank:
        bank.route(COUNTS)
        losses, _ = base.losses(collate([row for own in rows for row in own], base.pad_id))
        found: dict[nn.Parameter, Tensor | None] = dict(bank.gradients(losses.sum(), range(len(work))))
        factors = [bank.parameters(slot) for slot in range(len(work))]
    for task, own, names in zip(work, rows, factors, strict=True):
        for i, row in enumerate(own):
            with MultiAdapterModel(base, [task], train=True) as bank:
                grads = dict(bank.gradients(base.losses(collate([row], base.pad_id))[0].sum(), [0]))
                for name_, parameter in bank.parameters(0).items():
                    got = found[names[name_]]
                    assert got is not None
                    torch.testing.assert_close(got[i], grads[parameter], rtol=1e-8, atol=1e-10)
    self_test(base, work[1])


def private(zoo: Any, base: Base) -> list[FitJob]:
    return [
        FitJob(task, [rows, [], rows[:1]], Mechanism(0.1, (3.0, 6.0, 12.0)[k], 3, Source(f"client {k}")))
        for k, (task, rows) in enumerate(zip(tasks(zoo, base), rows_of(zoo, base), strict=True))
    ]


@pytest.mark.parametrize(("name", "stacked"), [("mixtral", False), ("mixtral", True), ("gpt-oss", True)])
def test_rows_are_clipped_alike_padded_end_to_end_and_in_stacks(
    zoo: Any, name: str, stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = zoo.base(name, double=True)
    assert (base.packing is not None) == (name == "mixtral")
    plain = trained(replace(base, packing=None), private(zoo, base))
    monkeypatch.setattr(per_row, "SMALL", 0)  # so that rows lie end to end without stacks too
    other = replace(base, products=OneByOne()) if stacked else base
    for one, found in zip(plain, trained(other, private(zoo, base)), strict=True):
        compare(one, found, 1e-9)
    assert any(0 < (found.clipped or 0) < 1 for found in plain)


def test_an_expert_that_no_token_reaches_has_a_gradient_of_zeros(zoo: Any) -> None:
    base = zoo.base("gpt-oss")
    for layer in base.model.model.layers:
        layer.mlp.router.bias.data[3] = -1e4
    with MultiAdapterModel(base, tasks(zoo, base)[:1], train=True) as bank:
        grads = dict(bank.gradients(base.losses(zoo.batch(base))[0].sum(), [0]))
        silent = {n for n, p in bank.parameters(0).items() if not grads[p].any()}
    assert silent == {
        f"model.layers.{i}.mlp.experts.{kind}_proj[3].{f}"
        for i in (0, 1)
        for kind in ("gate_up", "down")
        for f in "AB"
    }


@pytest.mark.parametrize("strategy", [FlexLoRA(), FLoRA()])
def test_strategies_combine_each_expert_by_itself_as_peft_reads_it(
    zoo: Any, tmp_path: Path, strategy: Any
) -> None:
    base = zoo.base("mixtral")
    sent = [task.adapter for task in tasks(zoo, base)]
    zero = {f"{name}.B": torch.zeros_like(pair.B) for name, pair in sent[2].pairs.items()}
    start = strategy.init(sent[2].with_tensors(zero), {}, 0)
    peers = [
        Peer(k, r, {}, {name: pair.scale for name, pair in adapter.pairs.items()})
        for k, (r, adapter) in enumerate(zip(RANKS, sent, strict=True))
    ]
    each = zip(sent, (1, 2, 5), peers, strict=True)
    updates = [Update(adapter, w, peer) for adapter, w, peer in each]
    done = strategy.aggregate(start, updates, np.random.default_rng(0))
    changes = []
    for k, adapter in enumerate([*sent, done.whole()]):
        save_adapter(adapter, base, tmp_path / str(k))
        model = PeftModel.from_pretrained(zoo.plain(base), str(tmp_path / str(k)))
        changes.append(model.base_model.model.model.layers[1].mlp.experts.get_delta_weight("default"))
    mean = sum(w / 8 * change for w, change in zip((1, 2, 5), changes[:3], strict=True))
    assert changes[3].shape == (4, 16, 24)
    torch.testing.assert_close(changes[3], mean, rtol=1e-4, atol=1e-5)


class One(nn.Module):
    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(*up.T.shape, False), nn.Linear(*down.T.shape, False)
        self.up.weight.data, self.out.weight.data = up, down

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Apart(nn.Module):
    """Experts in a list of modules, as transformers once had them."""

    def __init__(self, new: Any) -> None:
        super().__init__()
        both = zip(new.gate_up_proj.data, new.down_proj.data, strict=True)
        self.list = nn.ModuleList([One(up, down) for up, down in both])

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            token, at = torch.where(chosen == e)
            found.index_add_(0, token, self.list[e](x[token]) * weights[token, at, None])
        return found


def test_experts_that_are_modules_are_targets_even_where_no_token_reaches_them(zoo: Any) -> None:
    base = zoo.base("olmoe")
    for layer in base.model.model.layers:
        layer.mlp.experts = Apart(layer.mlp.experts)
        layer.mlp.gate.weight.data[3] = layer.mlp.gate.weight.data[:3].mean(0)  # never among the first two
    base = tried(base, None, None)
    names = targets(base, ["up", "out"])
    assert len(names) == 2 * 4 * 2
    work = [Task(zoo.adapter(base, r, 1.0, r, ["up", "out"], False)) for r in (2, 3)]
    rows = rows_of(zoo, base)
    for task, own in zip(work, rows, strict=False):
        assert zoo.gap(fit(base, [FitJob(task, [own])], adam)[0].adapter, task.adapter) > 1e-3
    with pytest.raises(ApartError, match=r"experts.list.\d.up' is fed"):
        fit(base, [FitJob(task, [own]) for task, own in zip(work, rows, strict=False)], adam)


def moe(zoo: Any) -> tuple[Any, Any]:
    model = MixtralForSequenceClassification.from_pretrained(zoo.folder("mixtral"), num_labels=2)
    return model, zoo.tokenizer()


def test_a_run_adapts_experts(zoo: Any) -> None:
    lora = fedlora.LoRASpec(targets=["q_proj"], target_parameters=BOTH)
    run = fedlora.simulate(
        moe(zoo), "tiny", strategy="flexlora", lora=lora, clients=2, rounds=1, ranks=[1, 2], progress=False
    )
    names = {name for name, _ in run.adapter.tensors()}
    assert "model.layers.1.mlp.experts.down_proj[3].B" in names


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora": fedlora.LoRASpec(target_parameters=BOTH, dora=True)}, "PEFT has no DoRA of experts"),
        ({"strategy": "fedms"}, "FedMS trains with a client of its own, which adapts modules only"),
    ],
)
def test_what_cannot_go_with_experts_is_refused(zoo: Any, more: dict[str, Any], message: str) -> None:
    settings = {"lora": fedlora.LoRASpec(target_parameters=BOTH)} | more
    with pytest.raises(ConfigError, match=message):
        fedlora.simulate(moe(zoo), "tiny", clients=2, rounds=1, progress=False, **settings)
