"""Rows that lie end to end: the same losses and gradients as of padded batches, for every kind of model."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
import transformers
from small_models import DECODERS, ENCODERS, base_of, model_of

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.models import Base, MultiAdapterModel, targets
from fedlora.models.attention import OURS, attend_our_way
from fedlora.models.first_token import only_first_token
from fedlora.models.pack import Pack
from fedlora.models.packing import packing_of
from fedlora.models.parametrizations import Sparse
from fedlora.training.evaluation import losses_of


def rows(kind: str, lengths: Sequence[int], seed: int = 0) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i, length in enumerate(lengths):
        ids = torch.randint(3, 60, (length,), generator=draw).tolist()
        response = min(i, length)  # the first row has no response, others all of it or a part
        target = (
            i % 3 if kind == "classification" else [-100] * (length - response) + ids[length - response :]
        )
        found.append(Example(ids, target))
    return found


def task_of(base: Base, seed: int, rank: int, sparse: bool = False, base_delta: bool = False) -> Task:
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    shapes = targets(base, "all-linear")
    pairs = {n: Pair(random(rank, i), random(o, rank), 0.3) for n, (o, i) in shapes.items()}
    values = {f"{n}.sparse": random(7) for n in shapes}
    deltas = {n: Pair(random(3, i), random(o, 3), 0.1) for n, (o, i) in shapes.items()} if base_delta else {}
    if sparse:
        return Task(Adapter({}, {**base.head_state(), **values}, Sparse(5)), base_delta=deltas)
    return Task(Adapter(pairs, base.head_state()), base_delta=deltas)


def results(base: Base, tasks: list[Task], micro: list[tuple[int, Example]]) -> list[torch.Tensor]:
    """Losses, shares, and the gradient of a weighted sum of losses by all that is trained."""
    with MultiAdapterModel(base, tasks, train=True) as bank:
        each, right = losses_of(base, bank, micro, len(tasks))
        leaves = [p for slot in range(len(tasks)) for found in bank.factors(slot).values() for p in found]
        weights = torch.arange(1, 1 + len(each), dtype=each.dtype)
        grads = torch.autograd.grad((weights * each).sum(), leaves, allow_unused=True)
    return [each.detach(), right, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
@pytest.mark.parametrize(
    "lengths",
    [[5, 1, 7, 3], [4], [16, 16, 16], [20, 3, 33, 16, 17]],
    ids=["of several lengths", "one row", "of one length", "of several widths"],
)
def test_losses_and_gradients_of_two_clients_are_those_of_the_padded_batch(
    family: str, lengths: list[int]
) -> None:
    base = base_of(family)
    assert base.packing is not None
    assert base.packing.offset == (2 if "oberta" in family.lower() else 0)
    tasks = [task_of(base, 1, 1), task_of(base, 2, 3, base_delta=True)]
    micro = [(int(i >= len(lengths) / 2), row) for i, row in enumerate(rows(base.task.name, lengths))]
    padded = results(dataclasses.replace(base, packing=None), tasks, micro)
    unpadded = results(base, tasks, micro)
    assert len(padded) == len(unpadded) > 10
    for one, other in zip(unpadded, padded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_sparse_values_see_each_token_s_own_client() -> None:
    base = base_of("Bert")
    tasks = [task_of(base, 1, 1, sparse=True), task_of(base, 2, 3, sparse=True)]
    micro = [(i // 2, row) for i, row in enumerate(rows("classification", [5, 1, 7, 3]))]
    for one, other in zip(
        results(base, tasks, micro),
        results(dataclasses.replace(base, packing=None), tasks, micro),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_in_bfloat16_too_up_to_its_rounding(family: str) -> None:
    base = base_of(family, torch.bfloat16)
    assert base.packing is not None
    assert base.packing.offset == 0
    batch = rows(base.task.name, [5, 1, 7, 3])
    micro = [(0, row) for row in batch]
    with torch.no_grad(), MultiAdapterModel(base, [Task(Adapter({}))]) as bank:
        unpadded, _ = losses_of(base, bank, micro, 1)
        with MultiAdapterModel(
            other := dataclasses.replace(base, packing=None), [Task(Adapter({}))]
        ) as plain:
            padded, _ = losses_of(other, plain, micro, 1)
    torch.testing.assert_close(unpadded, padded, rtol=2e-2, atol=2e-2)


def test_a_decoder_makes_logits_of_the_tokens_before_the_response_s_and_of_no_others() -> None:
    base, seen = base_of("Llama"), list[tuple[int, ...]]()
    base.model.lm_head.register_forward_hook(lambda m, x, y: seen.append(tuple(y.shape)))
    with torch.no_grad(), MultiAdapterModel(base, [Task(Adapter({}))]) as bank:
        losses_of(base, bank, [(0, row) for row in rows("instruction", [5, 4, 7, 3])], 1)
    assert seen == [(1, 0 + 1 + 2 + 2, 60)]  # the last row's first token is foretold by nothing


def test_where_the_vocabulary_s_layer_is_adapted_batches_are_padded() -> None:
    base = base_of("Llama")
    draw = torch.Generator().manual_seed(1)
    A, B = torch.randn(2, 16, generator=draw).double(), torch.randn(60, 2, generator=draw).double()
    tasks = [Task(Adapter({"lm_head": Pair(s * A, B, 0.3)})) for s in (1.0, -1.0)]
    micro = [(i // 2, row) for i, row in enumerate(rows("instruction", [5, 4, 7, 3]))]
    with MultiAdapterModel(base, tasks) as bank:
        assert not bank.unpadded
    unpadded, padded = (results(b, tasks, micro) for b in (base, dataclasses.replace(base, packing=None)))
    for one, other in zip(unpadded, padded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_models_that_would_say_something_else_are_padded() -> None:
    assert packing_of(model_of("Qwen2", use_sliding_window=True, sliding_window=2), None) is None
    torch.manual_seed(0)
    plain = transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(vocab_size=60, dim=16, hidden_dim=24, n_layers=2, n_heads=4)
    ).eval()
    assert only_first_token(plain) is None  # so that a pack has no first tokens to read
    eager = model_of("Llama")
    eager.config._attn_implementation = "eager"
    assert not attend_our_way(eager)


class Sized(torch.nn.Module):
    """A layer that looks at its whole input, as one that mixes rows or counts tokens would."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(1, keepdim=True)


def test_a_layer_that_looks_beyond_a_token_is_found_out() -> None:
    model = model_of("Llama")
    model.model.norm = Sized()
    assert packing_of(model, None) is None


def test_rows_of_like_length_are_a_block_padded_with_zeros() -> None:
    pack = Pack([2, 17, 16])
    x = torch.randn(1, 3, 35, 5)
    short, long = pack.spread(x)
    assert (short.shape, long.shape) == ((2, 3, 16, 5), (1, 3, 32, 5))
    assert torch.equal(short[0, :, :2], x[0, :, :2])
    assert torch.equal(short[0, :, 2:], torch.zeros(3, 14, 5))
    assert torch.equal(long[0, :, :17], x[0, :, 2:19])
    assert torch.equal(short[1], x[0, :, 19:])
    (_, real), (_, longer) = pack.blocks
    assert real is not None
    assert real[:, 0, 0].sum(1).tolist() == [2, 16]
    assert longer is not None
    assert longer[:, 0, 0].sum(1).tolist() == [17]
    assert pack.starts.tolist() == [0, 2, 19]
    assert pack.positions.tolist() == [0, 1, *range(17), *range(16)]


@pytest.mark.parametrize("lengths", [[2, 17, 16], [16, 16], [1], [40, 3, 40], [16, 32]])
def test_gathering_undoes_spreading_and_gradients_go_the_same_ways(lengths: list[int]) -> None:
    pack = Pack(lengths)
    x = torch.randn(1, 2, sum(lengths), 3, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        return pack.gather([block.transpose(1, 2) for block in pack.spread(x)])

    assert torch.equal(there_and_back(x), x.transpose(1, 2))
    assert torch.autograd.gradcheck(there_and_back, x)
    assert torch.autograd.gradcheck(lambda x: torch.cat([b.sum((0, 2)) for b in pack.spread(x)]), x)


def test_a_block_of_whole_rows_needs_no_mask_and_no_copy() -> None:
    pack = Pack([16, 16])
    x = torch.randn(1, 2, 32, 3)
    assert pack.blocks == [(16, None)]
    assert pack.spread(x)[0].data_ptr() == x.data_ptr()


def test_without_a_pack_a_model_says_what_it_said() -> None:
    model = model_of("Llama")
    ids, mask = torch.randint(3, 60, (2, 6)), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    ours = model(input_ids=ids, attention_mask=mask).logits
    assert model.config._attn_implementation == OURS
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(ours, model(input_ids=ids, attention_mask=mask).logits)
