import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data import Example, collate


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=6))
def test_a_batch_holds_each_row_and_masks_only_what_it_added(rows: list[list[int]]) -> None:
    pad_id = 7  # occurs as a token too
    batch = collate([Example(ids, [-100, *ids[1:]]) for ids in rows], pad_id)
    width = max(map(len, rows))
    assert (
        batch.inputs["input_ids"].shape
        == batch.inputs["attention_mask"].shape
        == batch.target.shape
        == (len(rows), width)
    )
    for i, ids in enumerate(rows):
        n = len(ids)
        assert batch.inputs["input_ids"][i].tolist() == ids + [pad_id] * (width - n)
        assert batch.inputs["attention_mask"][i].tolist() == [1] * n + [0] * (width - n)
        assert batch.target[i].tolist() == [-100, *ids[1:]] + [-100] * (width - n)


def test_a_classification_batch_has_one_target_a_row() -> None:
    batch = collate([Example([1, 2], 4), Example([3], 0)], 0)
    assert batch.target.tolist() == [4, 0]
    assert {t.dtype for t in (batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.target)} == {
        torch.int64
    }
