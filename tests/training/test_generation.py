"""Scores against numbers by hand, and the choice of rows."""

import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import decoders
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example, Row
from fedlora.models import Base, load
from fedlora.models.packaged import tiny
from fedlora.training.generation import Answer, answer, chosen, exact, rouge_l, scores


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
    metrics = scores(found)
    assert metrics["exact_match"] == pytest.approx(1 / 3)
    assert metrics["rouge_l"] == pytest.approx((1 + 0 + 2 / 4) / 3)
    assert metrics["answers"] == {
        "a": {"answered": 1, "exact_match": 1.0, "rouge_l": 1.0},
        "b": {"answered": 2, "exact_match": 0.0, "rouge_l": pytest.approx(0.25)},
    }
    assert scores([]) == {}


POSITIONS = 32


@pytest.fixture(params=["llama", "gpt2"])
def decoder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    """A random decoder of 32 positions, computed or in a table, that never ends its turn."""
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    tokenizer.eos_token = "[UNK]"
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save_pretrained(tmp_path / "model")
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    if request.param == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **ends, max_position_embeddings=POSITIONS))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=POSITIONS, **ends))
    with torch.no_grad():
        model.get_output_embeddings().weight[1] = 0.0  # the token that ends a turn is never the likeliest
    model.save_pretrained(tmp_path / "model")
    return load(tmp_path / "model", "instruction")


def test_an_answer_ends_with_the_positions_that_the_model_was_trained_for(decoder: Base) -> None:
    assert decoder.positions == POSITIONS
    lengths: list[int] = []
    generate = decoder.model.generate

    def seen(**given: object) -> torch.Tensor:
        found = generate(**given)
        lengths.append(found.shape[1])
        return found

    decoder.model.generate = seen  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (5, 24, 30):
            prompt = Example([2 + i % 90 for i in range(size)], [-100] * size)
            answer(decoder, Task(Adapter({})), [prompt], longest=8)
    assert lengths == [13, 32, 32]


def test_a_prompt_that_takes_all_positions_is_answered_by_its_last_tokens_with_a_warning(
    decoder: Base,
) -> None:
    long = [2 + i % 90 for i in range(40)]
    task = Task(Adapter({}))
    with pytest.warns(UserWarning, match=r"1 of 2 prompts take all 32 positions .* last 24 tokens are read"):
        found = answer(decoder, task, [Example([5, 6], [-100] * 2), Example(long, [-100] * 40)], longest=8)
    assert found[1]
    assert found == answer(
        decoder, task, [Example([5, 6], [-100] * 2), Example(long[-24:], [-100] * 24)], longest=8
    )
