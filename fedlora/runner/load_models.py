"""The base models of a run."""

import functools
import warnings
from collections.abc import Callable

from fedlora.data import Dataset
from fedlora.errors import ConfigError
from fedlora.models import Base, load, load_given
from fedlora.models.device import lacks_bfloat16

from .spec_parts import LoRASpec, ModelSpec

# A base is never written to, so the runs of one process share it.
shared = functools.lru_cache(maxsize=1)(load)


def trained_heads(lora: LoRASpec, base: Base) -> tuple[str, ...]:
    """The heads that are trained, by `lora.head`."""
    return {"train": base.heads, "last": base.last, "freeze": ()}[lora.head]


def load_base(model: ModelSpec, dataset: Dataset, seed: int, loader: Callable[..., Base] = load) -> Base:
    """The base model that a specification names.

    Args:
        model: which one, and how it is loaded.
        dataset: what it will be trained for.
        seed: of a head that the checkpoint lacks.
        loader: `fedlora.models.load`, or what caches or changes it.

    Raises:
        ConfigError: neither a path nor a source is named.
        ModelError: no such model, or one that cannot do this.
    """
    seed = seed if dataset.task.new_head else 0  # only a new head is drawn from it
    how = (model.gradient_checkpointing, model.attention)
    if model.loaded is not None:
        return load_given(*model.loaded, dataset.task, dataset.labels, seed, model.name, *how)
    path = model.path or (model.source() if model.source is not None else None)
    if not path:
        raise ConfigError("model.path: needs a value, got none; say model.path=FOLDER-OR-NAME")
    if model.dtype == "bfloat16" and model.device == "cpu" and lacks_bfloat16():
        warnings.warn(
            "model.dtype=bfloat16: this processor has no instructions for it, so that it takes several times "
            "as long as float32; say model.dtype=float32",
            stacklevel=2,
        )
    where = (model.dtype, model.device, seed, model.quantize, model.allow_pickle)
    return loader(path, dataset.task, dataset.labels, *where, *how)
