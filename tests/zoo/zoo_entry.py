"""What the table of architectures says of each: how it is built, and what is claimed of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Args:
        config: the name of its configuration class in transformers, without "Config".
        model: the name of the class whose checkpoint is saved.
        kind: what fedlora trains it for.
        sizes: arguments of the configuration, over those of `SIZES`.
        drop: names of `SIZES` that this configuration does not take.
        parts: further configurations inside the configuration, such as `text_config`.
        targets: `lora.targets`.
        left_out: the layers that `all-linear` says it leaves out; empty where it says nothing.
        fed: parts of the lines that say, when it is loaded, how it must be fed.
        single: whether the claims are checked in float32, for models that transformers computes in float32 in
            part whatever their weights are: experts, a scan, a softmax, or the logits.
        refused: claim -> a part of what fedlora says instead; "load" and "targets" stand for the whole model.
        fast: whether it is tested by default.
        tokenizer: whether the checkpoint has one.
        special: how the tokenizer wraps a text; "$A" is the text.
    """

    config: str
    model: str
    kind: Literal["classification", "instruction"]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    drop: Sequence[str] = ()
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    targets: str | Sequence[str] = "all-linear"
    left_out: str = ""
    fed: Sequence[str] = ()
    single: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    fast: bool = False
    tokenizer: bool = True
    special: str = "$A"

    @property
    def trained(self) -> bool:
        """Whether there is something to claim: it is refused neither at load nor with all its layers."""
        return not {"load", "targets"} & self.refused.keys()


def encoder(config: str, model: str = "ForMaskedLM", **more: Any) -> Entry:
    """An encoder whose checkpoint has no classification head, which fedlora makes up."""
    sizes = {"pad_token_id": 0, **more.pop("sizes", {})}
    more.setdefault("special", "<cls> $A <end>")
    return Entry(config, config + model, "classification", sizes, **more)


def decoder(config: str, model: str = "ForCausalLM", family: str = "", **more: Any) -> Entry:
    """A causal language model that is trained on instructions."""
    ids = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 2}
    sizes = {**ids, **more.pop("sizes", {})}
    return Entry(config, (family or config) + model, "instruction", sizes, **more)
