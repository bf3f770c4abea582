import hashlib
from typing import Any

import pytest
import torch

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import collate
from fedlora.errors import ModelError
from fedlora.models import Base, MultiAdapterModel
from fedlora.training.steps import FitJob
from fedlora.training.trainer import fit


def seal(base: Base) -> str:
    digest = hashlib.sha256()
    for name, tensor in base.model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2"])
def test_the_base_is_bit_identical_before_during_and_after(zoo: Any, name: str) -> None:
    base = zoo.base(name)
    rows = zoo.rows(base, 8, 1)
    before, batch = seal(base), collate(rows, base.tokenizer.pad_token_id)
    plain = base.logits(batch)
    adapters = [zoo.adapter(base, 2, seed=1), zoo.adapter(base, 3, seed=2)]
    seen = []

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        made = torch.optim.AdamW([p for found in groups.values() for p in found], lr=0.1)
        made.register_step_post_hook(lambda *_: seen.append(seal(base)))
        return made

    fit(base, [FitJob(Task(adapter), [rows[:4], rows[4:]]) for adapter in adapters], optimizer)
    assert set(seen) == {before}
    assert seal(base) == before
    assert zoo.clean(base)
    assert torch.equal(base.logits(batch), plain)
    assert all(p.grad is None for p in base.model.parameters())


def test_an_error_inside_leaves_the_base_as_it_was(zoo: Any) -> None:
    base = zoo.base("bert")
    before = seal(base)
    with pytest.raises(ZeroDivisionError), MultiAdapterModel(base, [Task(zoo.adapter(base, 2))]):
        1 / (0 if not zoo.clean(base) else 1)
    assert zoo.clean(base)
    with pytest.raises(RuntimeError, match="stop"):
        fit(base, [FitJob(Task(zoo.adapter(base, 2)), [zoo.rows(base, 2, 0)])], failing)
    assert zoo.clean(base)
    assert seal(base) == before


def failing(groups: Any) -> torch.optim.Optimizer:
    raise RuntimeError("stop")


def test_the_bank_never_writes_to_the_adapters_it_was_given(zoo: Any) -> None:
    base = zoo.base("bert")
    adapter = zoo.adapter(base, 2)
    before = adapter.digest()
    [one] = fit(
        base,
        [FitJob(Task(adapter), [zoo.rows(base, 4, 0)])],
        lambda g: torch.optim.SGD([p for found in g.values() for p in found], lr=1.0),
    )
    assert adapter.digest() == before
    with MultiAdapterModel(base, [Task(adapter)], train=True) as bank:
        copy = bank.adapter(0)
        assert copy.digest() == before
        bank.factors(0)["A"][0].data.zero_()
        assert copy.digest() == adapter.digest() == before
    assert one.adapter.digest() != before


def test_the_groups_of_parameters_are_those_that_are_trained(zoo: Any) -> None:
    base = zoo.base("bert")
    adapter = zoo.adapter(base, 2)
    for train, expected in (
        ("AB", {"A", "B", "head"}),
        ("A", {"A", "head"}),
        ("B", {"B", "head"}),
        ("", {"head"}),
    ):
        with MultiAdapterModel(base, [Task(adapter, frozenset(train))] * 2, train=True) as bank:
            assert set(bank.factors(1)) == expected
            assert not {p for g in bank.factors(0).values() for p in g} & {
                p for g in bank.factors(1).values() for p in g
            }
    with MultiAdapterModel(base, [Task(zoo.adapter(base, 2, head=False))], train=True) as bank:
        assert set(bank.factors(0)) == {"A", "B"}
    with MultiAdapterModel(base, [Task(adapter)]) as bank:
        assert bank.factors(0) == {}


def test_an_adapter_of_another_model_is_refused(zoo: Any) -> None:
    base = zoo.base("bert")
    good = zoo.adapter(base, 2)
    name, pair = next(iter(good.pairs.items()))
    unknown = Adapter({"bert.nowhere": pair})
    with (
        pytest.raises(ModelError, match=r"'bert\.nowhere', a module that the model lacks"),
        MultiAdapterModel(base, [Task(unknown)]),
    ):
        pass
    wrong = Adapter({**good.pairs, name: Pair(torch.zeros(2, 7), torch.zeros(9, 2))})
    with (
        pytest.raises(ModelError, match=rf"{name}' is \(9, 7\), the layer"),
        MultiAdapterModel(base, [Task(wrong)]),
    ):
        pass
    norm = Adapter({"bert.embeddings.LayerNorm": pair})
    with pytest.raises(ModelError, match="needs a linear layer"), MultiAdapterModel(base, [Task(norm)]):
        pass
    short = Adapter(good.pairs, {"classifier.weight": good.extra["classifier.weight"]})
    with pytest.raises(ModelError, match=r"classifier\.bias' is None"):
        MultiAdapterModel(base, [Task(short)])
    more = Adapter(good.pairs, {**good.extra, "scorer.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"no head of the model owns: \['scorer\.weight'\]"):
        MultiAdapterModel(base, [Task(more)])
    assert zoo.clean(base)


def test_the_second_adapter_is_checked_like_the_first(zoo: Any) -> None:
    base = zoo.base("bert")
    good = zoo.adapter(base, 2)
    name = next(iter(good.pairs))
    fewer = Adapter({n: p for n, p in good.pairs.items() if n != name}, good.extra)
    wrong = Adapter({**good.pairs, name: Pair(torch.zeros(2, 7), torch.zeros(9, 2))}, good.extra)
    headless = Adapter(good.pairs)
    for other in (fewer, wrong, headless):
        with pytest.raises(ModelError), MultiAdapterModel(base, [Task(good), Task(other)]):
            pass
    # Else the second's head is left out.
    with pytest.raises(ModelError), MultiAdapterModel(base, [Task(headless), Task(good)]):
        pass
