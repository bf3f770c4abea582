"""The strategy, the base model and the client of a run, as a caller names them."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

import fedlora.clients
import fedlora.compression
import fedlora.server_optimizers
import fedlora.strategies
from fedlora.compression import Compression
from fedlora.config.presets import model_preset, presets
from fedlora.core.strategy import Strategy
from fedlora.errors import ConfigError
from fedlora.runner.spec_parts import LoRASpec, ModelSpec
from fedlora.server_optimizers import ServerOptimizer
from fedlora.training.client import Client


def strategy_of(given: Strategy | str) -> Strategy:
    """A strategy by its name on the command line, or as it is given.

    Raises:
        ConfigError: no such name.
    """
    if isinstance(given, Strategy):
        return given
    names = {name.lower(): name for name in fedlora.strategies.__all__}
    if not isinstance(given, str) or given.lower() not in names:
        raise ConfigError(f"strategy: expected an object or one of {', '.join(sorted(names))}, got {given!r}")
    made: Strategy = getattr(fedlora.strategies, names[given.lower()])()
    return made


def compression_of(given: Compression | str | None) -> Compression | None:
    """A compression by its name on the command line, or as it is given.

    Raises:
        ConfigError: no such name.
    """
    if not isinstance(given, str):
        return given
    ours = (getattr(fedlora.compression, name) for name in fedlora.compression.__all__)
    names = {cls.__name__.lower(): cls for cls in ours if cls in Compression.__subclasses__()}
    if given != "none" and given not in names:
        known = ", ".join(["none", *sorted(names)])
        raise ConfigError(f"compression: expected an object or one of {known}, got {given!r}")
    return None if given == "none" else names[given]()


def server_of(given: ServerOptimizer | str | None) -> ServerOptimizer | None:
    """A server optimizer by its name on the command line, or as it is given; None without one.

    Raises:
        ConfigError: no such name.
    """
    if given is None or isinstance(given, ServerOptimizer):
        return given
    names = {name.lower(): name for name in fedlora.server_optimizers.__all__ if name != "ServerOptimizer"}
    if not isinstance(given, str) or given.lower() not in names:
        raise ConfigError(f"server: expected an object or one of {', '.join(sorted(names))}, got {given!r}")
    made: ServerOptimizer = getattr(fedlora.server_optimizers, names[given.lower()])()
    return made


def model_of(given: Any) -> tuple[ModelSpec, dict[str, Any] | None]:
    """A base model as `simulate` takes it, and its settings in plain values; None for one in memory.

    Raises:
        ConfigError: nothing of the kind.
    """
    if isinstance(given, ModelSpec):
        words = {f.name: getattr(given, f.name) for f in fields(given) if f.name != "loaded"}
        named = given.loaded is None and given.source is None
        return given, (words | {"name": given.name or given.path}) if named else None
    if isinstance(given, tuple) and len(given) == 2:
        if not isinstance(given[0], nn.Module) or isinstance(given[1], nn.Module):
            kinds = " and ".join(type(part).__name__ for part in given)
            raise ConfigError(f"model: expected (model, tokenizer), in this order, got {kinds}")
        name = str(getattr(given[0], "name_or_path", "")) or type(given[0]).__name__
        return ModelSpec(name=name, loaded=given), None
    if isinstance(given, str | Path):
        if str(given) in presets("model") and not Path(given).exists():
            return model_preset(str(given))
        path = str(Path(given).absolute()) if Path(given).exists() else str(given)
        return model_of(ModelSpec(path=path, name=str(given)))
    raise ConfigError(
        f"model: expected {', '.join(presets('model'))}, a folder, a hub name, a ModelSpec or (model, "
        f"tokenizer), got {type(given).__name__}"
    )


def client_of(strategy: Strategy, model: ModelSpec, lora: LoRASpec) -> Client:
    """The client that a strategy is trained with where the caller names none."""
    local: Client = fedlora.clients.LocalTraining(lr=model.lr * strategy.lr_factor)
    if not strategy.client:
        return local
    made = getattr(fedlora.clients, strategy.client)
    own = {"targets": lora.targets} if "targets" in {f.name for f in fields(made)} else {}
    client: Client = made(local, **own)
    return client
