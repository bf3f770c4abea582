"""A base model from a transformers model and a tokenizer that are in memory already."""

from collections.abc import Sequence
from typing import Any

from fedlora.data import Kind
from fedlora.errors import ModelError
from fedlora.models.base import Base
from fedlora.models.loading import finished


def load_given(
    model: Any, tokenizer: Any, kind: Kind, labels: Sequence[str] = (), seed: int = 0, name: str = ""
) -> Base:
    """The base of a model that the caller has loaded; the model is frozen and put into evaluation mode.

    Args:
        model: a transformers model with a classification head of one output a label, or a decoder.
        tokenizer: its tokenizer.
        kind: what it will be trained for.
        labels: the labels of a classification, in the order of the logits.
        seed: unused by a complete model.
        name: where it came from, for messages; empty takes the model's own.

    Raises:
        ModelError: another number of outputs than labels, or a model that cannot do this.
    """
    outputs = getattr(model.config, "num_labels", len(labels))
    if kind == "classification" and outputs != len(labels):
        raise ModelError(
            f"model: expected a head of {len(labels)} outputs, one for each label, got {outputs}; load it "
            f"with num_labels={len(labels)}, or give its folder or name instead"
        )
    if kind == "classification":
        names = dict(enumerate(labels))
        model.config.id2label, model.config.label2id = names, {label: i for i, label in names.items()}
    path = name or str(getattr(model, "name_or_path", "")) or type(model).__name__
    return finished(model, tokenizer, kind, (), path, seed)
