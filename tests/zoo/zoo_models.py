"""Tiny random checkpoints of the architectures of `zoo_table`, with rows for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from zoo_entry import SIZES, Entry

from fedlora.data import Example

VOCABULARY = 96
LABELS = ("a", "b", "c")
ORDINARY = 6  # the first token id that is no special token
SHORT = (3, 9, 6, 13)  # words of a row; and of rows on both sides of a configuration's limits:
LONG = (40, 5, 56, 11)
SPECIAL = ("<pad>", "<unk>", "<end>", "<cls>", "<mask>", "<other>")
LETTERS = ("Ġ", "w", *"0123456789")  # for Qwen2's tokenizer, which spells words whatever its file says
WORDS = VOCABULARY - len(SPECIAL) - len(LETTERS)


def checkpoint(entry: Entry, folder: Path) -> Path:
    """Save a random model of an architecture, and its tokenizer, into a new folder."""
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, entry.model)(_config(entry))
        _enliven(model)
        model.save_pretrained(str(folder))
        if entry.tokenizer:
            _tokenizer(entry).save_pretrained(str(folder))
    return folder


def _config(entry: Entry) -> Any:
    common = {name: value for name, value in SIZES.items() if name not in entry.drop}
    flat = {**common, "vocab_size": VOCABULARY, **entry.sizes}
    parts = {name: {**flat, **more} if name == "text_config" else more for name, more in entry.parts.items()}
    return getattr(transformers, entry.config + "Config")(**({**entry.sizes, **parts} if parts else flat))


@torch.no_grad()
def _enliven(model: Any) -> None:
    """Give the weights sizes at which every layer matters, biases and norms included."""
    made, seen = torch.Generator().manual_seed(0), set()
    keep = ("A_log", "dt_bias", "D")  # a state-space model's own, for which zero-mean noise is no value
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or name in keep:
                continue
            seen.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=made).to(parameter.dtype)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            elif isinstance(module, torch.nn.Embedding):
                parameter.copy_(0.35 * noise)
            else:
                width = parameter.shape[0] if type(module).__name__ == "Conv1D" else parameter.shape[-1]
                parameter.copy_(noise / width**0.5)
    model.tie_weights()


def _tokenizer(entry: Entry) -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *LETTERS, *(f"w{i}" for i in range(WORDS))]
    if entry.sizes.get("pad_token_id") == 1:  # RoBERTa and its like
        words[:2] = words[1::-1]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    used = [(word, words.index(word)) for word in entry.special.split() if word != "$A"]
    made.post_processor = processors.TemplateProcessing(single=entry.special, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<end>",
        cls_token="<cls>",
        mask_token="<mask>",
        model_max_length=64,
    )


def rows(entry: Entry, number: int, seed: int, lengths: Sequence[int] = SHORT) -> list[Example]:
    """Rows of these lengths by turns, with special tokens as the tokenizer would put them."""
    rng = np.random.default_rng([seed, 7])
    before, after = ({"<cls>": 3, "<end>": 2}.get(word) for word in _around(entry))
    found = []
    for k in range(number):
        words = rng.integers(ORDINARY, VOCABULARY, lengths[k % len(lengths)]).tolist()
        ids = [t for t in (before, *words, after) if t is not None]
        if entry.kind == "classification":
            found.append(Example(ids, int(rng.integers(len(LABELS)))))
        else:
            asked = 1 + int(rng.integers(len(ids) - 2))
            found.append(Example(ids, [-100] * asked + ids[asked:]))
    return found


def _around(entry: Entry) -> tuple[str, str]:
    before, _, after = entry.special.partition("$A")
    return before.strip(), after.strip()


def lines(entry: Entry, number: int, seed: int) -> list[dict[str, str]]:
    """Rows of a data file for the command line."""
    rng = np.random.default_rng([seed, 8])
    found = []
    for k in range(number):
        text = " ".join(f"w{i}" for i in rng.integers(0, WORDS, 3 + k % 6))
        label = LABELS[int(rng.integers(len(LABELS)))]
        record = {"text": text, "label": label}
        found.append(record if entry.kind == "classification" else {"prompt": text, "response": f"w1 {text}"})
    return found
