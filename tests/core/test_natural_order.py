import random

import pytest

from fedlora.core.natural_order import in_order


@pytest.mark.parametrize(
    "names",
    [
        ["-10", "-2", "0", "1", "2", "10", "11", "100"],
        ["1", "+2", "3"],
        ["part-2.csv", "part-10.csv"],
        ["s1/seed=2", "s1/seed=10", "s2/seed=1"],
        ["2", "10", "other"],
        ["animal", "tool"],
        ["Zebra", "apple"],  # as plain text has them: capitals first
        ["", "a", "a01", "a1", "a1b", "a2"],
    ],
)
def test_numbers_in_names_count(names: list[str]) -> None:
    for seed in range(5):
        shuffled = random.Random(seed).sample(names, len(names))
        assert in_order(shuffled) == names


def test_words_keep_the_order_that_they_had() -> None:
    words = ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM", "Ärger", "über", "a b", "a-b", "a_b"]
    assert in_order(words) == sorted(words)


def test_a_number_of_thousands_of_digits_is_a_name_too() -> None:
    long = "9" * 5000
    assert in_order([long, "10", "9"]) == ["9", "10", long]
