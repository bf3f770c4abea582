import dataclasses
import math

import pytest
import torch

from fedlora.core.adapter import Adapter, Pair
from fedlora.errors import FedLoraError, IncompatibleUpdates
from fedlora.models.parametrizations import DoRA

A, B = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2)


def test_rank_and_shape_are_those_of_the_update():
    pair = Pair(A, B, 2)
    assert (pair.rank, pair.shape, pair.scale) == (2, (4, 3), 2.0)
    assert isinstance(pair.scale, float)


@pytest.mark.parametrize(
    ("a", "b", "scale", "message"),
    [
        (A, B.T, 1.0, r"A \(2, 3\) and B \(2, 4\)"),
        (A[0], B, 1.0, r"A \(3,\)"),
        (A, B[None], 1.0, r"B \(1, 4, 2\)"),
        (A[:1], B, 1.0, r"A \(1, 3\) and B \(4, 2\)"),
        (A, B.double(), 1.0, "float32 on cpu and torch.float64"),
        (A, B.to("meta"), 1.0, "meta"),
        (A, B, math.nan, "finite scale, got nan"),
        (A, B, math.inf, "finite scale, got inf"),
        (A, B, -math.inf, "finite scale, got -inf"),
    ],
)
def test_factors_that_do_not_fit_are_refused_with_what_came(a, b, scale, message):
    with pytest.raises(IncompatibleUpdates, match=message) as caught:
        Pair(a, b, scale)
    assert isinstance(caught.value, FedLoraError)


def test_pairs_and_adapters_are_values_that_cannot_be_reassigned():
    adapter = Adapter({"m": Pair(A, B)})
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.pairs = {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.pairs["m"].scale = 3.0


def test_names_are_kept_sorted_whatever_the_order_they_came_in():
    pairs = {name: Pair(A, B) for name in ("z", "a", "m")}
    extra = {"w": A, "b": B}
    one, two = Adapter(pairs, extra), Adapter(dict(reversed(pairs.items())), dict(reversed(extra.items())))
    assert [name for name, _ in one.tensors()] == ["a.A", "a.B", "m.A", "m.B", "z.A", "z.B", "b", "w"]
    assert list(one.pairs) == ["a", "m", "z"]
    assert list(one.extra) == ["b", "w"]
    assert one.digest() == two.digest()


def test_an_adapter_keeps_its_own_dictionaries():
    pairs, extra = {"m": Pair(A, B)}, {"w": A}
    adapter = Adapter(pairs, extra)
    pairs["n"], extra["v"] = Pair(A, B), B
    assert (list(adapter.pairs), list(adapter.extra)) == (["m"], ["w"])


def test_other_tensors_take_the_places_that_they_name_and_the_rest_stays():
    extra = {"m.magnitude": torch.ones(4), "w": A}
    adapter = Adapter({"m": Pair(A, B, 2.0), "n": Pair(A, B, 0.5)}, extra, DoRA())
    given = {"n.A": torch.zeros(2, 3), "m.B": B + 1, "m.magnitude": torch.zeros(4)}
    found = adapter.with_tensors(given)
    assert found.parametrization == DoRA()
    assert dict(found.tensors()).keys() == dict(adapter.tensors()).keys()
    for name, tensor in found.tensors():
        assert tensor is given.get(name, dict(adapter.tensors())[name])
    assert [pair.scale for pair in found.pairs.values()] == [2.0, 0.5]
    assert adapter.with_tensors({}).digest() == adapter.digest()
    assert torch.equal(dict(adapter.tensors())["m.B"], B)


@pytest.mark.parametrize(("name", "tensor"), [("m.C", torch.eye(2)), ("o.A", A), ("m", A), ("m.A", A[:1])])
def test_a_tensor_that_has_no_place_is_refused(name, tensor):
    with pytest.raises(IncompatibleUpdates, match=r"'m\.C'|'o\.A'|'m'|A \(1, 3\)"):
        Adapter({"m": Pair(A, B)}).with_tensors({name: tensor})


def test_digest_is_equal_for_equal_values_wherever_and_however_they_lie_in_memory():
    one = Adapter({"m": Pair(A, B)}, {"w": torch.ones(3)})
    two = Adapter({"m": Pair(A.T.contiguous().T, B.clone().requires_grad_())}, {"w": torch.ones(6)[::2]})
    assert one.digest() == two.digest()


SQUARE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
BASE = Adapter({"m": Pair(SQUARE, SQUARE, 2.0)}, {"w": torch.zeros(2, 3)})


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(Adapter({"m": Pair(SQUARE, SQUARE, 2.0 + 1e-12)}, BASE.extra), id="scale"),
        pytest.param(Adapter({"m": Pair(SQUARE, SQUARE.T, 2.0)}, BASE.extra), id="transposed square B"),
        pytest.param(Adapter({"m": Pair(SQUARE.T, SQUARE, 2.0)}, BASE.extra), id="transposed square A"),
        pytest.param(Adapter({"n": Pair(SQUARE, SQUARE, 2.0)}, BASE.extra), id="module renamed"),
        pytest.param(Adapter(BASE.pairs, {"v": torch.zeros(2, 3)}), id="extra renamed"),
        pytest.param(Adapter(BASE.pairs, {"w": torch.zeros(3, 2)}), id="extra reshaped"),
        pytest.param(Adapter(BASE.pairs, {"w": torch.zeros(6)}), id="extra flattened"),
        pytest.param(Adapter(BASE.pairs, {"w": torch.zeros(2, 3).half()}), id="dtype of an extra"),
        pytest.param(Adapter(BASE.pairs, {"w": torch.zeros(2, 3).int()}), id="dtype of the same bytes"),
        pytest.param(Adapter({"m": Pair(SQUARE.double(), SQUARE.double(), 2.0)}, BASE.extra), id="dtype"),
        pytest.param(Adapter(BASE.pairs), id="extra missing"),
        pytest.param(Adapter({}, BASE.extra), id="pair missing"),
        pytest.param(Adapter({**BASE.pairs, "n": BASE.pairs["m"]}, BASE.extra), id="pair added"),
        pytest.param(Adapter({"m": Pair(SQUARE, SQUARE + 1e-6, 2.0)}, BASE.extra), id="one value"),
        pytest.param(Adapter({}, {**BASE.extra, "m.A": SQUARE, "m.B": SQUARE}), id="pair as extras"),
    ],
)
def test_digest_changes_with(other):
    assert other.digest() != BASE.digest()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool]
)
def test_digest_reads_every_dtype_also_scalars_and_empty_tensors(dtype):
    tensors = [torch.ones(()), torch.ones(0), torch.ones(2, 3)]
    digests = [Adapter({}, {"w": tensor.to(dtype)}).digest() for tensor in tensors]
    assert len(set(digests)) == 3
