"""Models with random weights: small ones of four architectures, and the shapes of two Llamas.

The large shapes have the numbers of the public configurations of Llama-3.2-1B and Llama-3.1-8B. Their weights
are made on the device, so that nothing is read or carried. No text is tokenised either: a small tokenizer
serves where fedlora asks for one, and token ids are drawn from the model's whole vocabulary.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from fedlora.core.adapter import Adapter, Pair
from fedlora.models import Base, LoRA, fresh_adapter, targets
from fedlora.models.loading import finished
from fedlora.models.packaged import tiny
from fedlora.seeds import generator
from fedlora.tasks import Classification, Instruction, LearningTask

LABELS = 6
SMALL = {"vocab_size": 300, "max_position_embeddings": 128}
Config = Mapping[str, Any]


def llama3(factor: float, **numbers: Any) -> Config:
    """The numbers of a Llama 3 model, with what all of them share."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    shared = {"vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    return {**shared, **heads, "rope_parameters": rope, **numbers}


LLAMAS: dict[str, Config] = {
    "1B": llama3(
        32.0, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True
    ),
    "8B": llama3(
        8.0, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, tie_word_embeddings=False
    ),
}
# The same code on a machine without a GPU: other numbers, and not even the ratio of the two models.
TINY: dict[str, Config] = {
    "1B": {**LLAMAS["1B"], "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "8B": {**LLAMAS["8B"], "vocab_size": 512, "hidden_size": 96, "intermediate_size": 192}
    | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
}


def bert() -> Any:
    """A BERT encoder with a head for classification, small."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return BertForSequenceClassification(BertConfig(**SMALL, **sizes, num_labels=LABELS))


def llama() -> Any:
    """A Llama with four query heads to two key and value heads, small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL, **_decoder()))


def qwen3() -> Any:
    """A Qwen3, which normalises queries and keys, small."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SMALL, **_decoder(), head_dim=32))


def gpt2() -> Any:
    """A GPT-2, whose layers keep their weights transposed, small and without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 300, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))


SMALL_MODELS: dict[str, tuple[Callable[[], Any], LearningTask]] = {
    "BERT encoder": (bert, Classification()),
    "Llama, grouped queries": (llama, Instruction()),
    "Qwen3": (qwen3, Instruction()),
    "GPT-2": (gpt2, Instruction()),
}


def small_base(name: str, device: str, dtype: str, rounded: bool = False, plain: bool = False) -> Base:
    """One of the small models on a device, the same weights every time.

    Args:
        name: a key of `SMALL_MODELS`.
        device: where it goes.
        dtype: of its weights, such as "float32".
        rounded: whether the weights are rounded to bfloat16 first.
        plain: whether it stays as transformers makes it.
    """
    make, task = SMALL_MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    if rounded:
        model.bfloat16()
    return finished(
        model.to(getattr(torch, dtype)), tokenizer(), task, (), f"small {name}", device=device, plain=plain
    )


def llama_base(config: Config, device: str, dtype: torch.dtype) -> Base:
    """A Llama for instructions, its random weights made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=dtype)
    return finished(model, tokenizer(), Instruction(), (), "random weights")


@cache
def tokenizer() -> Any:
    """A tokenizer of bytes that needs no download."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny())


def start(base: Base, rank: int, B: float = 0.0) -> Adapter:
    """The adapter that a client of a rank starts from, on all linear layers, float32 on the CPU.

    Args:
        base: the model.
        rank: of every pair.
        B: the spread of B's numbers; LoRA starts with zeros, from which the first step leaves A as it is.
    """
    modules = targets(base, "all-linear")
    made = fresh_adapter(base, modules, LoRA(scale=2.0).peer(0, rank, modules), base.heads)
    rng = generator(0, "B")
    pairs = {
        name: Pair(pair.A, torch.from_numpy(rng.normal(0, B, tuple(pair.B.shape))).float(), pair.scale)
        for name, pair in made.pairs.items()
    }
    return Adapter(pairs, {name: value.float() for name, value in made.extra.items()})


def operations(base: Base, tokens: int, answered: int) -> float:
    """FLOPs that no trainer of a frozen decoder can leave out: 4 N a token.

    2 N are the forward pass and 2 N the gradients of the activations; none is needed of the frozen weights.
    N counts the linear layers of the blocks. The output layer counts for response tokens alone. Attention's
    own products are not counted.

    Args:
        base: the decoder.
        tokens: all trained tokens.
        answered: those of them that are response.
    """
    head = base.model.get_output_embeddings().weight
    table = base.model.get_input_embeddings().weight
    inside = sum(p.numel() for p in base.model.parameters() if p is not head and p is not table)
    needed: float = 4.0 * (inside * tokens + head.numel() * answered)
    return needed


def _decoder() -> dict[str, Any]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **heads}
