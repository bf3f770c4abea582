"""Scores against numbers by hand, and the choice of rows."""

from collections import Counter

import pytest

from fedlora.data import Row
from fedlora.training.generation import Answer, chosen, exact, rouge_l, scores


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (" Yes.\n", "yes"),
        ("“New  York”", "new york"),
        ("a. good, old dog!", "A. good, old dog"),
        ("ÉTÉ", "été"),
        ("…", "…"),
    ],
)
def test_case_blanks_and_punctuation_at_the_ends_do_not_count(said: str, expected: str) -> None:
    assert exact(said, expected)


@pytest.mark.parametrize(
    ("said", "expected"),
    [("no", "yes"), ("-5", "5"), ("5%", "5"), ("", "yes"), ("a b", "ab"), ("yes it is", "yes"), (".", "!")],
)
def test_all_else_counts(said: str, expected: str) -> None:
    assert not exact(said, expected)


@pytest.mark.parametrize(
    ("said", "expected", "f1"),
    [
        # Lin 2004, section 3: of "police killed the gunman" 3 words in order, then 2.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("a b c d e", "a x c y e z q", 2 * 3 / 12),
        ("the cat", "the cat sat on the mat", 2 * 2 / 8),
        ("a a a", "a", 2 * 1 / 4),
        ("The Cat.", "the, cat", 1.0),
        ("über_alle 7 Maß", "Über alle, 7 Maß!", 1.0),
        ("nothing", "in common", 0.0),
        ("", "words", 0.0),
        ("★★★", "★★★", 1.0),
        ("★★", "★★★", 0.0),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(said: str, expected: str, f1: float) -> None:
    assert rouge_l(said, expected) == pytest.approx(f1)
    assert rouge_l(expected, said) == pytest.approx(f1)


ROWS = [Row(f"q{i}", "a", "abc"[min(i // 10, 2)]) for i in range(40)]  # 10 of a, 10 of b, 20 of c


def test_rows_are_spread_over_the_natural_clients() -> None:
    found = chosen(ROWS, 9, seed=0)
    assert Counter(ROWS[i].client for i in found) == {"a": 3, "b": 3, "c": 3}
    assert Counter(ROWS[i].client for i in chosen(ROWS, 34, seed=0)) == {"a": 10, "b": 10, "c": 14}
    assert found == sorted(found) == chosen(ROWS, 9, seed=0)
    assert found != chosen(ROWS, 9, seed=1)


def test_more_than_there_are_is_all_and_none_is_none() -> None:
    assert chosen(ROWS, 99, seed=0) == list(range(40))
    assert chosen(ROWS, 0, seed=0) == []


def test_rows_without_a_client_are_drawn_as_one_lot() -> None:
    plain = [Row(f"q{i}", "a") for i in range(40)]
    found = chosen(plain, 10, seed=3)
    assert len(set(found)) == 10
    assert found != list(range(10))
    assert set(found) < set(chosen(plain, 20, seed=3))


def test_scores_are_means_over_rows_and_over_each_clients_rows() -> None:
    rows = [Row("q" * 400, " Yes\n", "a"), Row("q", "no", "b"), Row("q", "the old dog", "b")]
    found = [Answer.to(rows[i], i, said) for i, said in enumerate(["yes", "yes", "dog"])]
    assert (len(found[0].prompt), found[0].expected, found[0].exact) == (300, "Yes", True)
    told = scores(found)
    assert told["exact_match"] == pytest.approx(1 / 3)
    assert told["rouge_l"] == pytest.approx((1 + 0 + 2 / 4) / 3)
    assert told["answers"] == {
        "a": {"answered": 1, "exact_match": 1.0, "rouge_l": 1.0},
        "b": {"answered": 2, "exact_match": 0.0, "rouge_l": pytest.approx(0.25)},
    }
    assert scores([]) == {}
