"""Which code a configuration may name: a `_target_` is called, and can come from anyone."""

import inspect
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn, optim

from fedlora.errors import ConfigError

# What each group of a configuration may name of fedlora. The rest also writes, removes and loads files, and
# only `data` may read them: a server must not have a site open a file by the way of, say, `client`.
OURS = {
    "strategy": ("fedlora.strategies",),
    "client": ("fedlora.clients", "fedlora.training.rules", "fedlora.training.round_schedule"),
    "privacy": ("fedlora.privacy",),
    "data": ("fedlora.data",),
    "model": ("fedlora.models.packaged",),
    "rule": ("fedlora.training.rules",),
    "lora": ("fedlora.models.parametrizations",),
    "robust": ("fedlora.robust",),
    "compression": ("fedlora.compression",),
    "server": ("fedlora.server_optimizers",),
    "steps": ("fedlora.robust",),
    "engine": ("fedlora.engines", "fedlora.deploy.engine"),
    "scheduler": ("fedlora.rounds.scheduling", "fedlora.schedulers"),
    "stop": ("fedlora.callbacks.early_stopping",),
    "keep": ("fedlora.callbacks.best_checkpoint",),
}
TORCH = {
    "torch.optim": optim.Optimizer,
    "torch.nn": nn.Module,
}  # torch.load and others run what they are given
# Hydra's own words beside `_target_`. They change what is made of a target without changing its name.
WORDS = ("_args_", "_convert_", "_mode_", "_partial_", "_recursive_")


def checked(config: DictConfig, key: str) -> Any:
    """A part of a configuration, every reference resolved and every `_target_` in it one that may be named.

    Args:
        config: the whole one, whose `allow` says what else may be.
        key: the part, such as "data.source".

    Raises:
        ConfigError: what was named, and what to say if it is to be trusted; or one of Hydra's words that
            would make something else of it.
    """
    part = OmegaConf.to_container(OmegaConf.select(config, key), resolve=True)
    allow = tuple(config.get("allow") or ())
    for place, node in nodes(part, key):
        if isinstance(node, str) and "${" in node:  # a reference after all, resolved only when it is too late
            raise ConfigError(f"{place}: expected a plain value, got '{node}'; write it without ${{")
        if isinstance(node, dict) and "_target_" in node:
            _check(place, node["_target_"], key.partition(".")[0], allow)
    for place, node in nodes(part, key):
        if isinstance(node, dict):
            _check_words(place, node, key, allow)
    return part


def _check_words(place: str, node: dict[Any, Any], key: str, allow: Sequence[str]) -> None:
    """Refuse Hydra's words, which could turn an object that protects into one that is never made.

    Only `_partial_` has a use, for what an object calls later, such as an optimizer of torch's: below the top
    of a part, beside a target that is not fedlora's own.
    """
    for word in sorted(str(name) for name in node if name in WORDS):
        later = place != key and isinstance(node[word], bool)
        if word == "_partial_" and later and _within(str(node.get("_target_")), (*TORCH, *allow)):
            continue
        raise ConfigError(
            f"{place}.{word}: this word of Hydra's is not for configurations of a run, since it changes what "
            "is made; leave it out"
        )


def nodes(node: Any, place: str) -> Iterator[tuple[str, Any]]:
    """A part of a configuration and all that is in it, each with its place."""
    yield place, node
    if isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from nodes(value, f"{place}.{name}")


def _check(place: str, target: Any, group: str, allow: Sequence[str]) -> None:
    """Refuse a target that is not ours, torch's or allowed; nothing else is imported to find out.

    Of ours it is a class or a class method; only rows and packaged models are made by plain functions.
    """
    ours, makers = OURS.get(group, ()), group in ("data", "model")
    if not isinstance(target, str):
        raise ConfigError(f"{place}: expected a dotted name under _target_, got {target!r}")
    public = not any(part.startswith("_") for part in target.split("."))
    if not _within(target, allow) and not (public and _within(target, (*ours, *TORCH))):
        root, _, _ = target.partition(".")
        raise _refusal(place, target, target.rpartition(".")[0] if root in ("fedlora", "torch") else root)
    try:
        found = found_at(target)
    except Exception as error:  # whatever a module raises when it is imported
        raise ConfigError(f"{place}: cannot find '{target}': {' '.join(str(error).split())}") from error
    for thing in [found.__self__, found.__func__] if inspect.ismethod(found) else [found]:
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            raise _refusal(place, target, str(getattr(thing, "__module__", None) or target))
        home = str(thing.__module__)
        kind = next((kind for module, kind in TORCH.items() if _within(home, [module])), None)
        torch_s = kind is not None and inspect.isclass(thing) and issubclass(thing, kind)
        if not (_within(home, (*ours, *allow)) or torch_s):
            raise _refusal(place, target, home)
    if inspect.isfunction(found) and not makers and not _within(home, allow):
        raise _refusal(place, target, home)


def found_at(target: str) -> Any:
    """What Hydra will call: an attribute where there is one, else a module of that name."""
    first, *rest = target.split(".")
    found: Any = import_module(first)
    for depth, part in enumerate(rest, 1):
        try:
            found = getattr(found, part)
        except AttributeError:
            if not inspect.ismodule(found):
                raise
            found = import_module(".".join([first, *rest[:depth]]))
    return found


def _refusal(place: str, target: str, module: str) -> ConfigError:
    return ConfigError(
        f"{place}: '{target}' is outside of what a configuration may name of fedlora and torch; say "
        f"allow=[{module}] if you trust it"
    )


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
