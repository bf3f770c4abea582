"""What a run begins with: `lora.init`, `lora.dora`, `lora.adapter`, and the pairings that are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lab import SMALL

from fedlora.config.composition import compose
from fedlora.config.translate import run_spec
from fedlora.data import collate
from fedlora.models import MultiAdapterModel, save_adapter
from fedlora.runner.assemble import Assembly, assemble

pytestmark = pytest.mark.slow

Refuse = Callable[..., str]


def words(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else ""


def job(*overrides: str) -> Assembly:
    return assemble(run_spec(compose([*SMALL, *overrides])))


@pytest.mark.parametrize(
    ("overrides", "taken"),
    [
        (["strategy=fedit"], False),
        (["strategy=federa"], True),
        (["strategy=federa", "lora.init=lora"], False),
        (["strategy=fedit", "lora.init=olora"], True),
        (["strategy=flexlora", "lora.init=pissa"], True),
        (["strategy=fedfold", "lora.init=pissa", "ranks=[2,4]"], True),
        (["strategy=slora", "lora.dora=true"], False),
        (["strategy=fedit", "lora.init=pissa", "lora.dora=true"], True),
    ],
    ids=words,
)
def test_every_client_starts_from_the_function_of_the_base(overrides: list[str], taken: bool) -> None:
    found = job(*overrides)
    assert bool(found.start.base_delta) == taken
    batch = collate(found.test[:8], found.base.pad_id)
    with torch.no_grad():
        plain = found.base.logits(batch)
        for rank in set(found.ranks):
            task = found.spec.strategy.task(found.start, found.peer(0, rank))
            with MultiAdapterModel(found.base, [task]):
                assert (found.base.logits(batch) - plain).abs().max() < 1e-5
    magnitudes = found.start.adapter.own_factors()
    assert magnitudes.keys() == (found.start.adapter.pairs.keys() if "lora.dora=true" in overrides else set())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lora.init=eva"], "lora.init: expected lora, pissa or olora, got 'eva'"),
        (
            ["strategy=flexlora", "ranks=[2,4]", "lora.init=pissa"],
            "FlexLoRA gives a client of rank 2 only a part",
        ),
        (
            ["strategy=ffalora", "ranks=[2,4]", "lora.init=olora"],
            "FFALoRA gives a client of rank 2 only a part",
        ),
        (["strategy=hetlora", "lora.init=pissa"], "HetLoRA prunes directions"),
        (["strategy=slora", "lora.init=pissa"], "use lora.init=lora, or strategy.sparse_rounds=0"),
        (["strategy=fedms", "lora.dora=true"], "FedMS trains with a client of its own"),
        (["strategy=fedms", "lora.init=pissa"], "FedMS trains with a client of its own"),
        (["strategy=federa", "lora.adapter=/nowhere"], "exclude each other"),
        (["lora.init=pissa", "lora.adapter=/nowhere"], "lora.init=lora goes on from the adapter"),
        (["model.quantize=4bit"], "model.quantize=4bit needs a GPU, got model.device=cpu"),
        (["model.quantize=2bit"], "model.quantize: expected null, 4bit or 8bit, got '2bit'"),
    ],
    ids=words,
)
def test_a_start_that_cannot_be_is_refused_in_one_line(
    no_run: Refuse, overrides: list[str], said: str
) -> None:
    assert said in no_run(*overrides)


def test_an_adapter_of_dora_goes_on_as_one(no_run: Refuse, tmp_path: Path) -> None:
    first = job("lora.dora=true")
    extra = {n: t + 0.5 for n, t in first.start.adapter.extra.items()}
    moved = replace(first.start.adapter, extra=extra)
    save_adapter(moved, first.base, tmp_path / "saved")
    given = f"lora.adapter={tmp_path / 'saved'}"
    assert "is an adapter of DoRA; say lora.dora=true" in no_run(given)
    assert job(given, "lora.dora=true").start.adapter.digest() == moved.digest()
    frozen = job(given, "lora.dora=true", "lora.head=freeze")
    assert frozen.start.adapter.heads() == {}
    assert frozen.start.adapter.own_factors().keys() == moved.pairs.keys()
    head = dict(frozen.base.model.named_parameters())
    assert all(torch.equal(head[n], t) for n, t in moved.heads().items())


def test_a_plain_adapter_gets_the_magnitudes_it_has(tmp_path: Path) -> None:
    first = job("strategy=fedit")
    pairs = {m: type(p)(p.A, torch.randn_like(p.B), p.scale) for m, p in first.start.adapter.pairs.items()}
    plain: Any = type(first.start.adapter)(pairs, first.start.adapter.extra)
    save_adapter(plain, first.base, tmp_path / "saved")
    start = job(f"lora.adapter={tmp_path / 'saved'}", "lora.dora=true").start.adapter
    for m, own in start.own_factors().items():
        V = first.base.model.get_submodule(m).weight + pairs[m].scale * pairs[m].B @ pairs[m].A
        torch.testing.assert_close(own["magnitude"], V.norm(dim=1).detach(), atol=1e-5, rtol=1e-5)
