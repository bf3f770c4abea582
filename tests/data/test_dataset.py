import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data.dataset import Dataset, Row, hold_out
from fedlora.errors import ConfigError, DataError
from fedlora.tasks import Classification, Instruction


def test_labels_are_those_of_the_training_rows_sorted() -> None:
    train = [Row("a", "no"), Row("b", "yes"), Row("c", "maybe")]
    built = Dataset.build("d", Classification(), train, [Row("e", "yes")])
    assert built.labels == ("maybe", "no", "yes")
    assert built.train == tuple(train)


def test_instructions_have_no_labels() -> None:
    assert Dataset.build("d", Instruction(), [Row("q", "a")], [Row("r", "b")]).labels == ()


def test_an_empty_part_is_refused() -> None:
    with pytest.raises(DataError, match=r"'d': expected training rows, got none"):
        Dataset.build("d", Instruction(), [], [Row("q", "a")])
    with pytest.raises(DataError, match=r"'d': expected test rows, got none"):
        Dataset.build("d", Instruction(), [Row("q", "a")], [])


def test_an_unknown_test_label_is_named_and_counted() -> None:
    train = [Row("a", "no"), Row("b", "yes")]
    test = [Row("c", "ja"), Row("d", "ja"), Row("e", "nein"), Row("f", "no")]
    with pytest.raises(DataError, match=r"label 'ja' of 2 test rows \(and 1 more labels\).*remove those"):
        Dataset.build("d", Classification(), train, test)


def test_a_single_label_is_refused() -> None:
    with pytest.raises(DataError, match=r"at least 2 labels.*only 'no'.*label column"):
        Dataset.build("d", Classification(), [Row("a", "no")], [Row("b", "no")])


@given(labels=st.lists(st.sampled_from("abc"), min_size=20, max_size=60), size=st.integers(1, 30))
def test_holding_out_splits_the_rows_and_leaves_every_label_in_training(labels: list[str], size: int) -> None:
    rows = [Row(str(i), label) for i, label in enumerate(labels)]
    train, test = hold_out(rows, Classification(), size, seed=0)
    assert sorted(train + test, key=lambda row: int(row.source)) == rows
    assert len(test) == min(size, len(rows) // 5)
    assert {row.target for row in train} == set(labels)
    assert hold_out(rows, Classification(), size, seed=0) == (train, test)
    assert hold_out(rows, Classification(), size, seed=1) != (train, test)


def test_a_label_that_occurs_once_is_never_held_out() -> None:
    rows = [Row(str(i), "rare" if i == 0 else "common") for i in range(10)]
    for seed in range(30):
        assert rows[0] in hold_out(rows, Classification(), 2, seed)[0]


def test_holding_out_of_too_few_rows_is_refused() -> None:
    with pytest.raises(DataError, match=r"held out of 4 rows.*add rows"):
        hold_out([Row(str(i), "a") for i in range(4)], Instruction(), 1, 0)
    with pytest.raises(DataError, match=r"10 rows with 10 labels"):
        hold_out([Row(str(i), str(i)) for i in range(10)], Classification(), 1, 0)
    with pytest.raises(ConfigError, match=r"test_rows: expected at least 1, got 0"):
        hold_out([Row(str(i), "a") for i in range(10)], Instruction(), 0, 0)
