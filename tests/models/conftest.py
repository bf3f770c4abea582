"""Tiny random models of several architectures, with rows and adapters for them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)
from transformers.utils import logging

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import Batch, Example, collate
from fedlora.models import Base, MultiAdapterModel, expert_targets, load, targets

LABELS = ("a", "b", "c")
VOCABULARY = 60
WIDE = 0.3  # initial weights large enough for every layer to matter


def _bert(**more: Any) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=WIDE,
        **more,
    )


def _experts(kind: str, **more: Any) -> Any:
    """A decoder that keeps the experts of a layer in one parameter, with values that matter."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        initializer_range=WIDE,
        pad_token_id=0,
        eos_token_id=2,
        **more,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 or "bias" in name or "router" in name or ".gate." in name:
            parameter.data.normal_(0, WIDE)
    return model


MAKE: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: _experts("Mixtral", num_local_experts=4, sliding_window=None),
    "olmoe": lambda: _experts("Olmoe", num_experts=4),
    "qwen3-moe": lambda: _experts("Qwen3Moe", head_dim=8, num_experts=4, moe_intermediate_size=24),
    "gpt-oss": lambda: _experts(
        "GptOss",
        head_dim=8,
        num_local_experts=4,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "bert": lambda: BertModel(_bert()),
    "bert-mlm": lambda: BertForMaskedLM(_bert()),  # its checkpoint has no pooler
    "roberta": lambda: RobertaModel(
        RobertaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=40,
            initializer_range=WIDE,
            pad_token_id=1,
            type_vocab_size=1,
        )
    ),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
            max_position_embeddings=32,
            initializer_range=WIDE,
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
            initializer_range=WIDE,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            initializer_range=WIDE,
            bos_token_id=2,
            eos_token_id=2,
        )
    ),
}
# What a test asks for -> the checkpoint, and what it is trained for.
NAMES = {
    **{name: (name, "instruction") for name in ("mixtral", "olmoe", "qwen3-moe", "gpt-oss")},
    "bert": ("bert", "classification"),
    "bert-mlm": ("bert-mlm", "classification"),
    "roberta": ("roberta", "classification"),
    "distilbert": ("distilbert", "classification"),
    "llama": ("llama", "instruction"),
    "gpt2": ("gpt2", "instruction"),
    "llama-cls": ("llama", "classification"),
    "gpt2-cls": ("gpt2", "classification"),
}


class Zoo:
    """Checkpoints are made once a session; every model is loaded anew, since a test may change it."""

    labels = LABELS

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, checkpoint: str) -> Path:
        folder = self.root / checkpoint
        if not folder.exists():
            logging.disable_progress_bar()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(checkpoint))
                model = MAKE[checkpoint]()
                for parameter in model.parameters():  # biases too, which start at zero
                    if parameter.ndim == 1:
                        parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(str(folder))
            self.tokenizer(pad=None if checkpoint == "gpt2" else "<pad>").save_pretrained(str(folder))
        return folder

    def tokenizer(self, pad: str | None = "<pad>", eos: str | None = "<end>") -> Any:
        words = ["<pad>", "<unk>", "<end>", *(f"w{i}" for i in range(VOCABULARY - 3))]
        if pad and pad not in words:
            raise ValueError(pad)
        made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=made, unk_token="<unk>", pad_token=pad, eos_token=eos, model_max_length=32
        )

    def base(self, name: str, double: bool = False, **more: Any) -> Base:
        checkpoint, kind = NAMES[name]
        base = load(self.folder(checkpoint), kind, LABELS if kind == "classification" else (), **more)
        if double:
            base.model.double()
        if double and checkpoint in ("mixtral", "olmoe", "qwen3-moe", "gpt-oss"):
            base.model.set_experts_implementation("eager")  # torch's grouped products know no float64
        return base

    def plain(self, base: Base) -> Any:
        """The model as a user of transformers loads it, with a head of its own."""
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        if base.task.generates:
            model = AutoModelForCausalLM.from_pretrained(base.path)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=len(LABELS))
        if model.config.pad_token_id is None:
            model.config.pad_token_id = base.tokenizer.pad_token_id
        return model.eval()

    def rows(self, base: Base, number: int, seed: int, longest: int = 12) -> list[Example]:
        rng = np.random.default_rng([seed, 99])
        found = []
        for _ in range(number):
            ids = rng.integers(3, VOCABULARY, rng.integers(2, longest + 1)).tolist()
            if base.task.labelled:
                found.append(Example(ids, int(rng.integers(len(LABELS)))))
            else:
                asked = int(rng.integers(1, len(ids)))
                found.append(Example(ids, [-100] * asked + ids[asked:]))
        return found

    def batch(self, base: Base) -> Batch:
        return collate(self.rows(base, 5, 3), base.tokenizer.pad_token_id)

    def ours(self, base: Base, adapter: Adapter) -> torch.Tensor:
        with torch.no_grad(), MultiAdapterModel(base, [Task(adapter)]):
            return base.logits(self.batch(base))

    def theirs(self, base: Base, model: Any) -> torch.Tensor:
        rows = self.batch(base)
        with torch.no_grad():
            return model.eval()(**rows.inputs).logits

    def same(
        self, base: Base, one: torch.Tensor, other: torch.Tensor, rows: Any, tolerance: float = 1e-5
    ) -> bool:
        """Equal at every real token, relative to the largest logit."""
        gap = (one - other).abs() / one.abs().max()
        if base.task.generates:
            gap = gap[rows.inputs["attention_mask"].bool()]
        return bool(gap.max() < tolerance)

    def clean(self, base: Base) -> bool:
        """No hook and no replaced forward is left."""
        return not any(m._forward_hooks or "forward" in vars(m) for m in base.model.modules())

    def adapter(
        self,
        base: Base,
        rank: int | Sequence[int],
        scale: float | Sequence[float] = 2.0,
        seed: int = 0,
        modules: Sequence[str] | str = "all-linear",
        head: bool = True,
        experts: Sequence[str] = (),
    ) -> Adapter:
        """Random factors, B too; ranks and scales in turn over the layers; the head moved off its start."""
        rng = np.random.default_rng([seed, 5])
        ranks = [rank] if isinstance(rank, int) else list(rank)
        scales = [scale] if isinstance(scale, int | float) else list(scale)
        dtype = next(base.model.parameters()).dtype

        def random(*shape: int, spread: float) -> torch.Tensor:  # float32 values, whatever the dtype
            return torch.from_numpy(spread * rng.standard_normal(shape)).float().to(dtype)

        pairs = {}
        shapes = targets(base, modules, experts) | expert_targets(base, experts)
        for i, (name, (d_out, d_in)) in enumerate(shapes.items()):
            r = ranks[i % len(ranks)]
            A, B = random(r, d_in, spread=d_in**-0.5), random(d_out, r, spread=0.2)
            pairs[name] = Pair(A, B, scales[i % len(scales)])
        extra = {}
        if head:
            moved = {n: p + random(*p.shape, spread=0.1) for n, p in base.head_state().items()}
            extra = {n: p.float().to(dtype) for n, p in moved.items()}
        return Adapter(pairs, extra)

    def gap(self, one: Adapter, other: Adapter) -> float:
        """The largest difference of any tensor, relative to the tensor's largest entry (or to 1)."""
        a, b = dict(one.tensors()), dict(other.tensors())
        assert a.keys() == b.keys()
        gaps = []
        for name, tensor in a.items():
            assert tensor.shape == b[name].shape, name
            assert tensor.dtype == b[name].dtype, name
            gaps.append(float((tensor - b[name]).abs().max() / tensor.abs().max().clamp_min(1)))
        return max(gaps)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))
