"""A base model from a transformers model and a tokenizer that are in memory already."""

from collections.abc import Sequence
from typing import Any

from fedlora.errors import ModelError
from fedlora.models.attention import OURS, attend_plainly, check_attention
from fedlora.models.base import Base
from fedlora.models.loading import finished
from fedlora.tasks import LearningTask


def load_given(
    model: Any,
    tokenizer: Any,
    task: LearningTask,
    labels: Sequence[str] = (),
    seed: int = 0,
    name: str = "",
    gradient_checkpointing: bool | None = None,
    attention: str | None = None,
) -> Base:
    """The base of a model that the caller has loaded: frozen, in evaluation mode, perhaps with our attention.

    Args:
        model: a transformers model of the task's kind, with the outputs that the task needs.
        tokenizer: its tokenizer.
        task: what it will be trained for.
        labels: the names of the model's outputs in their order, where they have some (`Dataset.labels`).
        seed: unused by a complete model.
        name: where it came from, for messages; empty takes the model's own.
        gradient_checkpointing: as for `load`.
        attention: as for `load`; None leaves the model's own.

    Raises:
        ModelError: another number of outputs than labels, or a model that cannot do this.
    """
    outputs = getattr(model.config, "num_labels", len(labels))
    if labels and outputs != len(labels):
        raise ModelError(
            f"model: expected a head of {len(labels)} outputs, one for each label, got {outputs}; load it "
            f"with num_labels={len(labels)}, or give its folder or name instead"
        )
    for key, value in task.options(labels).items():
        setattr(model.config, key, value)
    path = name or str(getattr(model, "name_or_path", "")) or type(model).__name__
    if getattr(model.config, "_attn_implementation", None) == OURS:
        attend_plainly(model)  # a run before this one has left it so; each finds out for itself
    if attention is not None:
        check_attention(attention)
        try:
            model.set_attn_implementation(attention)
        except (ValueError, ImportError) as error:
            why = str(error).strip().splitlines()[0]
            raise ModelError(f"model.attention={attention}: {why}") from error
    return finished(model, tokenizer, task, (), path, seed, None, gradient_checkpointing, attention)
