"""The parts of secure aggregation: fixed-point numbers, keystreams, shares, letters."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import IncompatibleUpdates
from fedlora.secure_aggregation import crypto
from fedlora.secure_aggregation.crypto import decode, encode


@given(st.lists(st.floats(-(2.0**28), 2.0**28), max_size=9), st.integers(1, 7))
def test_a_value_is_off_by_half_a_step_at_most(values: list[float], clients: int) -> None:
    found = decode(encode(torch.tensor(values, dtype=torch.float64), clients))
    assert found.dtype == torch.float64
    assert all(abs(a - b) <= 2.0**-33 for a, b in zip(found.tolist(), values, strict=True))


def test_a_sum_of_encoded_vectors_is_the_sum_of_the_vectors() -> None:
    values = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)) * 1000
    vectors = [encode(value, 5) for value in values]
    assert {(v.dtype, v.shape) for v in vectors} == {(np.dtype(np.uint64), (12,))}
    found = decode(np.sum(vectors, axis=0, dtype=np.uint64))
    assert (found - values.double().sum(0).flatten()).abs().max() <= 5 * 2.0**-33


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("clients", [1, 3, 8, 1000, 4096])
def test_the_largest_values_sum_without_overflow_and_larger_ones_are_refused(clients: int, sign: int) -> None:
    bound = 2.0**31 / clients
    below = math.nextafter(bound, 0)
    below = below - 2.0**-33 if clients == 4096 else below  # else it would round to the bound itself
    vector = encode(torch.tensor([sign * below], dtype=torch.float64), clients)
    total = clients * int(vector.view(np.int64)[0])
    assert abs(total) < 2**63
    assert decode(vector).item() == pytest.approx(sign * below, rel=1e-15)
    for wrong in (math.nextafter(bound, math.inf), 2 * bound, 1e290):
        with pytest.raises(IncompatibleUpdates, match=f"for a sum of {clients} clients"):
            encode(torch.tensor([0.0, sign * wrong], dtype=torch.float64), clients)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(wrong: float) -> None:
    with pytest.raises(IncompatibleUpdates, match="finite"):
        encode(torch.tensor([1.0, wrong]), 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_type_is_encoded(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.5, -1.25], [3.0, 0.0]], dtype=dtype, requires_grad=True)
    assert decode(encode(values, 3)).tolist() == [0.5, -1.25, 3.0, 0.0]
    assert encode(torch.tensor([], dtype=dtype), 3).shape == (0,)


def test_a_secret_takes_as_many_shares_as_were_said() -> None:
    secret = crypto.new_key()
    shares = dict(enumerate(crypto.split(secret, 3, 4)))
    assert {len(share) for share in shares.values()} == {crypto.SHARE}
    for few in itertools.combinations(shares.items(), 3):
        assert crypto.join(dict(few)) == secret
    for fewer in itertools.combinations(shares.items(), 2):
        assert joined(dict(fewer)) != secret
    assert joined({0: shares[0], 1: shares[3], 3: shares[1]}) != secret


def joined(shares: dict[int, bytes]) -> bytes | None:
    try:
        return crypto.join(shares)
    except ValueError:
        return None


def test_a_keystream_belongs_to_its_round_its_pair_and_its_use() -> None:
    a, b = crypto.new_key(), crypto.new_key()
    one = crypto.pairwise_mask(a, crypto.public(b), 1, 2, 5, 99)
    assert np.array_equal(one, np.negative(crypto.pairwise_mask(b, crypto.public(a), 2, 1, 5, 99)))
    others = [
        crypto.pairwise_mask(a, crypto.public(b), 1, 2, 6, 99),
        crypto.self_mask(a, 5, 99),
        crypto.self_mask(a, 6, 99),
        crypto.pairwise_mask(a, crypto.public(crypto.new_key()), 1, 2, 5, 99),
    ]
    everything = [one, *others]
    assert len({vector[:4].tobytes() for vector in everything}) == 5
    assert len({crypto.agreement(a, crypto.public(b), use) for use in ("channel", "mask")}) == 2


def test_a_letter_opens_only_for_its_receiver_and_route() -> None:
    a, b, c = (crypto.new_key() for _ in range(3))
    letter = crypto.encrypt(a, crypto.public(b), b"text", "route")
    assert crypto.decrypt(b, crypto.public(a), letter, "route") == b"text"
    back = crypto.encrypt(
        b, crypto.public(a), b"text", "route"
    )  # under the same key, so not under the same nonce
    assert back[: crypto.NONCE] != letter[: crypto.NONCE]
    for key, route in ((b, "another"), (c, "route")):
        with pytest.raises(IncompatibleUpdates, match="changed on their way"):
            crypto.decrypt(key, crypto.public(a), letter, route)
    for i in (0, 12, len(letter) - 1):
        with pytest.raises(IncompatibleUpdates, match="changed on their way"):
            crypto.decrypt(
                b, crypto.public(a), letter[:i] + bytes([letter[i] ^ 1]) + letter[i + 1 :], "route"
            )
