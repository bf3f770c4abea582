"""The promises of a parametrization, each a check of its own, and one call that tries them all.

    from fedlora.testing import check_parametrization

    check_parametrization(MyParametrization(seed=3))

The checks put it on the layers of the tiny random encoder (`model=tiny`), in float64.
"""

import copy
import dataclasses
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.core.parametrization import Parametrization
from fedlora.data import Example
from fedlora.models import Base, LoRA, MultiAdapterModel, fresh_adapter, load, merge, parametrized, targets
from fedlora.models.lora import layer_of
from fedlora.models.packaged import tiny
from fedlora.privacy import self_test
from fedlora.tasks import Classification
from fedlora.testing.promises import Broken, broken_of, report, what_came

CLOSE = 1e-5  # relative; the factors are in float32
RANK = 3


@dataclasses.dataclass(frozen=True)
class Tried:
    """A parametrization on a model.

    Args:
        form: what is checked.
        base: the model.
        start: its adapter before the first round.
        moved: the adapter with every factor moved off its start.
        rows: encoded rows.
    """

    form: Parametrization
    base: Base
    start: Adapter
    moved: Adapter
    rows: list[Example]

    def logits(self, adapter: Adapter, base: Base | None = None) -> Tensor:
        """The logits of the rows."""
        base = base or self.base
        with torch.no_grad(), MultiAdapterModel(base, [Task(adapter)]) as model:
            model.route([len(self.rows)])
            return base.logits(base.collate(self.rows))

    def apart(self, one: Tensor, other: Tensor) -> float:
        """How far logits are from others, relative."""
        return float((one - other).norm() / other.norm())


def check_parametrization(form: Parametrization, seed: int = 0) -> None:
    """Try every promise on a parametrization.

    Args:
        form: an instance, with the settings that are to be checked.
        seed: of the values to which its factors are moved.

    Raises:
        AssertionError: some promises are broken; a line names each and says what came.
    """
    report(type(form).__name__, broken(form, seed))


def broken(form: Parametrization, seed: int = 0) -> Iterator[tuple[str, str]]:
    """The promises that a parametrization breaks: the name of each, and what came."""
    try:
        one = tried(form, seed)
    except Exception as error:  # whatever an author's code raises
        yield "it starts", what_came(error)
        return
    yield from broken_of(PROMISES, one)


def tried(form: Parametrization, seed: int = 0) -> Tried:
    """The parametrization on the tiny model, at its start and moved off it."""
    base = load(tiny(), Classification(), ("x", "y", "z"))
    base.model.double()
    modules, rng = targets(base, ["query", "dense"]), np.random.default_rng([seed, 9])
    fresh = fresh_adapter(base, modules, LoRA().peer(0, RANK, modules), base.heads)
    start = parametrized(base, fresh, form, seed=seed)

    def moved(tensor: Tensor) -> Tensor:
        return tensor + 0.3 * torch.from_numpy(rng.standard_normal(tuple(tensor.shape))).to(tensor)

    heads = start.heads()
    other = start.with_tensors({n: moved(t) for n, t in start.tensors() if n not in heads})
    rows = [Example(rng.integers(2, 200, 3 + 2 * i).tolist(), i % 3) for i in range(6)]
    return Tried(form, base, start, other, rows)


def its_start_changes_nothing(one: Tried) -> None:
    """A model with the parametrization at its start does what the base does."""
    plain = one.logits(Adapter({}, one.start.heads()))
    if (gap := one.apart(one.logits(one.start), plain)) > CLOSE:
        raise Broken(f"at its start it changes the logits by {gap:.1e}")
    if one.apart(one.logits(one.moved), plain) < 1e-3:
        raise Broken("moving its factors changes nothing")


def every_factor_learns(one: Tried) -> None:
    """Every factor gets a gradient, and the base none."""
    with MultiAdapterModel(one.base, [Task(one.moved)], train=True) as model:
        model.route([len(one.rows)])
        named = {name: p for name, p in model.parameters(0).items() if p.requires_grad}
        losses, _ = one.base.losses(one.base.collate(one.rows))
        grads = torch.autograd.grad(losses.sum(), list(named.values()), allow_unused=True)
    still = [name for name, grad in zip(named, grads, strict=True) if grad is None or not grad.any()]
    if still:
        raise Broken(f"no gradient reaches {', '.join(still[:3])}")


def a_merged_model_does_the_same(one: Tried) -> None:
    """`weight`, in which a model is merged, says what `low_rank`, `dense` and `output` do."""
    alone = dataclasses.replace(one.base, model=copy.deepcopy(one.base.model))
    merge(alone, one.moved)
    if (gap := one.apart(one.logits(Adapter({}), alone), one.logits(one.moved))) > CLOSE:
        raise Broken(f"the merged model's logits differ by {gap:.1e}")


def its_low_rank_form_does_the_same(one: Tried) -> None:
    """What is written as plain pairs of LoRA has the same function."""
    plain = one.moved.plain(partial(layer_of, one.base))
    if (gap := one.apart(one.logits(plain), one.logits(one.moved))) > CLOSE:
        raise Broken(f"the logits of its low-rank form differ by {gap:.1e}")


def clients_at_once_are_each_alone(one: Tried) -> None:
    """Of several clients in one pass each gets the logits that it would get alone."""
    both, half = [one.moved, one.start], len(one.rows) // 2
    with torch.no_grad(), MultiAdapterModel(one.base, [Task(adapter) for adapter in both]) as model:
        model.route([half, len(one.rows) - half])
        got = one.base.logits(one.base.collate(one.rows))
    want = torch.cat([one.logits(both[0])[:half], one.logits(both[1])[half:]])
    if (gap := one.apart(got, want)) > CLOSE:
        raise Broken(f"beside another client the logits differ by {gap:.1e}")


def an_adapter_survives_its_message(one: Tried) -> None:
    """What a client is sent, and what a checkpoint keeps, is the same adapter."""
    back = Task.unpack(*Task(one.moved).pack()).adapter
    if back.digest() != one.moved.digest() or back.parametrization != one.form:
        raise Broken("an adapter that was packed and unpacked is another one; keep settings in plain fields")


def rows_have_gradients_of_their_own(one: Tried) -> None:
    """Where it says so, privacy of records can clip each row's gradient."""
    if one.form.by_row:
        self_test(one.base, Task(one.moved))


def the_same_rank_changes_no_factor(one: Tried) -> None:
    """`resize` to the rank that there is gives the same factors."""
    for module, own in one.moved.own_factors().items():
        same = one.form.resize(own, RANK)
        if same.keys() != own.keys() or any(not torch.equal(same[word], own[word]) for word in own):
            raise Broken(f"resize to the same rank gives other factors of '{module}'")


PROMISES = (
    its_start_changes_nothing,
    every_factor_learns,
    a_merged_model_does_the_same,
    its_low_rank_form_does_the_same,
    clients_at_once_are_each_alone,
    an_adapter_survives_its_message,
    rows_have_gradients_of_their_own,
    the_same_rank_changes_no_factor,
)
