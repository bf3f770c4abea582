"""Greedy answers of an adapter, against those of plain PEFT."""

from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.models import save_adapter
from fedlora.training import generation
from fedlora.training.generation import answer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def alone(base: Any, model: Any, example: Any, longest: int) -> str:
    """One prompt without padding, greedily, a token at a time, as anyone would write it."""
    ids = example.input_ids[: example.target.count(-100)]
    said: list[int] = []
    while len(said) < longest:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + said])).logits[0, -1]
        said.append(int(logits.argmax()))
        if said[-1] == base.tokenizer.eos_token_id:
            said.pop()
            break
    return str(base.tokenizer.decode(said, skip_special_tokens=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # pads by an id of its own; by that of the end
@pytest.mark.parametrize("tokens", [4096, 24])  # all prompts in one batch; in several
def test_answers_are_those_of_plain_peft(zoo: Any, tmp_path: Path, name: str, tokens: int) -> None:
    base = zoo.base(name)
    adapter, rows = zoo.adapter(base, 3), zoo.rows(base, 12, 5)
    longest = max(len(row.input_ids) - row.target.count(-100) for row in rows)
    save_adapter(adapter, base, tmp_path)
    plain = zoo.plain(base)
    bare = [alone(base, plain, row, longest) for row in rows]
    model = PeftModel.from_pretrained(plain, str(tmp_path))
    said = answer(base, Task(adapter), rows, tokens)
    assert said == [alone(base, model, row, longest) for row in rows]
    assert answer(base, Task(Adapter({})), rows, tokens) == bare
    more = answer(base, Task(adapter), rows[:2], tokens, longest=longest + 6)
    assert more == [alone(base, model, row, longest + 6) for row in rows[:2]]
    assert said != bare
    assert zoo.clean(base)


def test_an_answer_ends_with_its_turn_and_what_makers_set_for_sampling_is_undone(zoo: Any) -> None:
    base, rows = zoo.base("llama"), zoo.rows(zoo.base("llama"), 12, 5)
    before = answer(base, Task(Adapter({})), rows)
    assert max(len(text.split()) for text in before) > 2
    end = base.tokenizer.eos_token = next(text.split()[1] for text in before if len(text.split()) > 2)
    after = answer(base, Task(Adapter({})), rows)
    cut = [" ".join(takewhile(lambda word: word != end, text.split())) for text in before]
    longest = max(len(text.split()) for text in before)
    for text, got, want in zip(before, after, cut, strict=True):
        assert got == want or len(text.split()) < longest  # else it met the old end, which is none any more
    assert after != before
    base.model.generation_config.update(do_sample=True, temperature=9.0, top_k=3, repetition_penalty=5.0)
    assert answer(base, Task(Adapter({})), rows) == after


def test_an_answer_is_no_longer_than_the_longest_expected_nor_than_the_cap(
    zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows = zoo.base("llama"), zoo.rows(zoo.base("llama"), 12, 5)
    longest = max(len(row.input_ids) - row.target.count(-100) for row in rows)
    assert max(len(text.split()) for text in answer(base, Task(Adapter({})), rows)) == longest
    monkeypatch.setattr(generation, "LONGEST", 2)
    assert {len(text.split()) for text in answer(base, Task(Adapter({})), rows)} <= {0, 1, 2}
    strange = Adapter({"no.such.module": next(iter(zoo.adapter(base, 2).pairs.values()))})
    assert answer(base, Task(strange), []) == []  # as that of strategies beside the model


def test_batches_side_by_side_say_the_same(zoo: Any) -> None:
    base, rows = zoo.base("llama"), zoo.rows(zoo.base("llama"), 24, 6)
    task = Task(zoo.adapter(base, 3))
    one = answer(base, task, rows, tokens=24)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert answer(base, task, rows, tokens=24) == one
    finally:
        torch.set_num_threads(before)


def test_the_model_s_own_word_ends_an_answer_too(zoo: Any) -> None:
    """A list in generation_config.json, which transformers' generate reads and a tokenizer does not have."""
    base, rows = zoo.base("llama"), zoo.rows(zoo.base("llama"), 12, 5)
    before = answer(base, Task(Adapter({})), rows)
    word = next(text.split()[1] for text in before if len(text.split()) > 2)
    base.model.generation_config.eos_token_id = [
        base.tokenizer.eos_token_id,
        base.tokenizer.convert_tokens_to_ids(word),
    ]
    after = answer(base, Task(Adapter({})), rows)
    assert after == [" ".join(takewhile(lambda part: part != word, text.split())) for text in before]
    assert after != before
