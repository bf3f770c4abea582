"""The base models that a configuration names."""

import functools
import warnings
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from fedlora.config.instantiate import make
from fedlora.data import Dataset
from fedlora.errors import ConfigError
from fedlora.models import Base, LoRA, load
from fedlora.runner.assign_ranks import plain


def lora_of(config: DictConfig) -> LoRA:
    """The rule from a client's rank to the scales of its modules."""
    lora = config.lora
    patterns = dict(lora.rank_pattern), dict(lora.alpha_pattern)
    return LoRA(lora.scale, lora.alpha, lora.use_rslora, *patterns)


# A base is never written to, so the runs of one process share it.
shared = functools.lru_cache(maxsize=1)(load)


def heads_of(config: DictConfig, base: Base) -> tuple[str, ...]:
    """The heads that are trained, by `lora.head`."""
    return {"train": base.heads, "last": base.last, "freeze": ()}[config.lora.head]


def model_choices(config: DictConfig) -> list[DictConfig]:
    """The configuration once for every model that clients have, in their turn."""
    named = [config.models] if isinstance(config.models, str) else plain(config.models) or []
    return [_with_model(config, str(name)) for name in named] or [config]


def _with_model(config: DictConfig, name: str) -> DictConfig:
    """The configuration with another model: a choice of the group `model`, or else a folder or hub name."""
    file = resources.files("fedlora.config.conf") / "model" / f"{name}.yaml"
    found: Any = {"path": name, "source": None}
    if file.is_file():
        found = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
    if found["path"] == "???":
        raise ConfigError(f"models: '{name}' is any model; say the folder or hub name itself in its place")
    given = {"path": found["path"], "source": found["source"]}
    return OmegaConf.merge(config, {"model": given})  # type: ignore[return-value]


def load_base(config: DictConfig, dataset: Dataset, loader: Callable[..., Base] = load) -> Base:
    """The base model that the configuration names."""
    if OmegaConf.is_missing(config.model, "path"):
        raise ConfigError("model.path: needs a value, got none; say model.path=FOLDER-OR-NAME")
    path = config.model.path or make(config, "model.source")
    m = config.model
    if m.dtype == "bfloat16" and m.device == "cpu" and _lacks_bfloat16():
        warnings.warn(
            "model.dtype=bfloat16: this processor has no instructions for it, so that it takes several times "
            "as long as float32; say model.dtype=float32",
            stacklevel=2,
        )
    seed = config.seed if dataset.kind == "classification" else 0  # only a new head is drawn from it
    where = (m.dtype, m.device, seed, m.quantize, bool(m.get("allow_pickle")))
    return loader(path, dataset.kind, dataset.labels, *where)


def _lacks_bfloat16() -> bool:
    """Whether this is known to be an x86 processor without instructions for it; older torch says nothing."""
    told: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return told.get("architecture") == "x86_64" and not (told.get("amx_bf16") or told.get("avx512_bf16"))
