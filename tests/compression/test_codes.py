"""Each code by itself: what it makes of numbers, in how many bytes, and right on average."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.compression import BF16, NF4, Int8, MessageKey, RandK, Segments, TopK
from fedlora.compression.places import length_of, read_places, write_places
from fedlora.errors import ConfigError, IncompatibleUpdates

SIZES = [70, 1, 0, 129]
KEY = MessageKey(0, 3, 2)
CODES = [BF16(), Int8(), Int8(block=7), NF4(), TopK(density=0.3), RandK(density=0.3)]
RANDOM_NF4 = RandK(density=0.25, values="nf4")
CODES += [
    TopK(density=0.3, values="nf4"),
    RandK(density=0.3, values="int8"),
    Segments(),
    Segments(count=3, values="nf4"),
]


def numbers(seed: int = 0) -> np.ndarray:
    """Numbers of the magnitudes of trained factors, with zeros and large ones among them."""
    rng = np.random.default_rng(seed)
    found = rng.standard_normal(sum(SIZES)) * 10.0 ** rng.integers(-6, 2, sum(SIZES))
    return np.where(rng.random(sum(SIZES)) < 0.1, 0, found).astype(np.float32)


def there_and_back(code, given, key=KEY):
    return code.decode(code.encode(given, SIZES, key), SIZES, key)


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_arrays_have_the_form_that_the_receiver_expects_and_follow_from_the_key(code):
    given = numbers()
    arrays = code.encode(given.copy(), SIZES, KEY)
    assert {n: (str(a.dtype), a.shape) for n, a in arrays.items()} == code.form(SIZES, KEY)
    again = code.encode(given, SIZES, KEY)
    assert all(np.array_equal(again[n], a) for n, a in arrays.items())
    back = code.decode(arrays, SIZES, KEY)
    assert back.dtype == np.float32
    assert back.shape == given.shape


@pytest.mark.parametrize(
    ("code", "bits"),
    [(BF16(), 16), (Int8(), 8 + 32 / 64), (NF4(), 4 + 32 / 64), (Int8(block=256), 8 + 32 / 256)],
    ids=repr,
)
def test_codes_of_values_take_the_bits_that_they_say(code, bits):
    arrays = code.encode(np.ones(1 << 12, dtype=np.float32), [1 << 12], KEY)
    assert sum(array.nbytes for array in arrays.values()) == bits * (1 << 12) / 8


@pytest.mark.parametrize(
    ("code", "step"),
    [(BF16(), 2**-7), (Int8(), 1 / 127), (NF4(), 0.31), (RandK(density=0.25), 4), (RANDOM_NF4, 4)],
    ids=repr,
)
def test_a_code_is_right_on_average(code, step):
    """The mean over m messages is within 5 standard errors, as estimated from the messages themselves.

    What is drawn fewer than about 10 times in m messages need not show in them: 10 steps over m more.
    """
    given, m = numbers(), 600
    got = np.stack([there_and_back(code, given, MessageKey(s, 1, 1)) for s in range(m)]).astype(np.float64)
    error, most = got.std(axis=0) / math.sqrt(m), np.abs(given) if isinstance(code, BF16) else largest(given)
    if isinstance(code, RandK):  # whose blocks are of the numbers that are kept
        most = np.abs(given).max()
    assert (np.abs(got.mean(axis=0) - given) <= 5 * error + 10 * step * most / m).all()
    assert (error > 0).mean() > 0.3  # and it is by chance that it is


def largest(given: np.ndarray) -> np.ndarray:
    """The largest magnitude of each number's block of 64, none of which goes beyond its tensor."""
    found, begin = np.zeros(len(given)), 0
    for size in SIZES:
        for start in range(begin, begin + size, 64):
            own = slice(start, min(start + 64, begin + size))
            found[own] = np.abs(given[own]).max()
        begin += size
    return found


@pytest.mark.parametrize(("code", "within"), [(BF16(), 2**-7), (Int8(), 1 / 127), (NF4(), 0.31)], ids=repr)
def test_no_number_is_further_off_than_a_step(code, within):
    given = numbers()
    off = np.abs(there_and_back(code, given) - given)
    most = np.abs(given) if isinstance(code, BF16) else largest(given)
    assert (off <= within * most * (1 + 1e-6)).all()


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_zeros_stay_zeros(code):
    assert not there_and_back(code, np.zeros(sum(SIZES), dtype=np.float32)).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("code", [BF16(), Int8(), NF4(), TopK(density=0.1)], ids=repr)
def test_what_is_not_finite_arrives_as_such(code, bad):
    given = numbers()
    given[80] = bad
    assert not np.isfinite(there_and_back(code, given)).all()


def test_top_k_keeps_the_largest_over_all_tensors_and_the_first_of_equal_ones():
    given = numbers()
    got = there_and_back(TopK(density=0.1), given)
    kept = np.flatnonzero(got)
    assert len(kept) == 20
    assert np.array_equal(got[kept], given[kept])
    assert np.abs(np.delete(given, kept)).max() <= np.abs(given[kept]).min()
    equal = np.ones(sum(SIZES), dtype=np.float32)
    assert np.flatnonzero(there_and_back(TopK(density=0.01), equal)).tolist() == [0, 1]


def test_random_places_are_those_of_the_round_whoever_asks():
    def places(key: MessageKey) -> list[int]:
        ones = np.ones(sum(SIZES), dtype=np.float32)
        return np.flatnonzero(there_and_back(RandK(density=0.3), ones, key)).tolist()

    assert places(MessageKey(0, 3, 2)) == places(MessageKey(0, 8, 2))
    assert places(MessageKey(0, 3, 2)) != places(MessageKey(0, 3, 3))
    assert places(MessageKey(0, 3, 2)) != places(MessageKey(1, 3, 2))


def test_segments_take_turns_over_clients_and_rounds_and_cover_everything_once():
    given, code = numbers(), Segments(count=3, error_feedback=True)
    for keys in ([MessageKey(0, k, 1) for k in range(3)], [MessageKey(0, 5, t) for t in range(1, 4)]):
        assert np.array_equal(sum(there_and_back(code, given, key) for key in keys), given)
    whole = np.mean([there_and_back(Segments(count=3), given, MessageKey(0, k, 1)) for k in range(3)], axis=0)
    assert np.allclose(whole, given, rtol=1e-6)
    one = np.ones(1, dtype=np.float32)
    assert Segments(count=9).decode({"values": one}, [1], KEY).tolist() == [1]


@given(among=st.integers(1, 5000), share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_places_come_back_in_as_few_bits_as_promised(among, share, seed):
    count = max(1, round(share * among))
    places = np.sort(np.random.default_rng(seed).choice(among, count, replace=False))
    data = write_places(places, among)
    assert np.array_equal(read_places(data, count, among), places)
    assert len(data) == length_of(count, among) <= 2 + count * (3 + math.log2(among / count)) / 8


@given(data=st.binary(min_size=length_of(9, 200), max_size=length_of(9, 200)))
def test_bytes_of_a_stranger_are_places_or_refused(data):
    try:
        places = read_places(np.frombuffer(data, dtype=np.uint8), 9, 200)
    except IncompatibleUpdates:
        return
    assert len(places) == 9
    assert (np.diff(places) > 0).all()
    assert 0 <= places[0] < places[-1] < 200


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: TopK(density=0.0), "compression.density: expected a number above 0"),
        (lambda: RandK(density=1.5), "compression.density: expected a number above 0"),
        (lambda: TopK(values="int4"), "compression.values: expected none, bf16, int8 or nf4, got 'int4'"),
        (lambda: Int8(download="topk"), "compression.download: expected none, bf16, int8 or nf4"),
        (lambda: NF4(block=0), "compression.block: expected a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(made, words):
    with pytest.raises(ConfigError, match=words):
        made()
