"""What a configuration may name to be made, and what the command line alone may add to it.

A configuration can come from anyone: with a run's folder, over the wire. Its `_target_` is code to be called.
"""

import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn, optim
from yaml import YAMLError  # type: ignore[import-untyped]

from fedlora.config.composition import PLACED
from fedlora.errors import CheckpointError, ConfigError, FedLoraError

# What each group of a configuration may name of fedlora. The rest also writes, removes and loads files, and
# only `data` may read them: a server must not have a site open a file by the way of, say, `client`.
OURS = {
    "strategy": ("fedlora.strategies",),
    "client": ("fedlora.clients", "fedlora.training.rules"),
    "privacy": ("fedlora.privacy",),
    "data": ("fedlora.data",),
    "model": ("fedlora.models.packaged",),
    "rule": ("fedlora.training.rules",),
    "lora": ("fedlora.models.parametrizations",),
    "robust": ("fedlora.robust",),
    "engine": ("fedlora.engines", "fedlora.deploy.engine"),
    "scheduler": ("fedlora.rounds.scheduling",),
    "stop": ("fedlora.callbacks.early_stopping",),
    "keep": ("fedlora.callbacks.best_checkpoint",),
}
TORCH = {
    "torch.optim": optim.Optimizer,
    "torch.nn": nn.Module,
}  # torch.load and others run what they are given
# Hydra's own words beside `_target_`. They change what is made of a target without changing its name.
WORDS = ("_args_", "_convert_", "_mode_", "_partial_", "_recursive_")


@dataclass(frozen=True)
class Trust:
    """What only who sits at the command line, or a site for itself, can grant.

    Args:
        allow: modules beside fedlora and torch that a `_target_` may name.
        pickle: whether weights may be pickled.
    """

    allow: tuple[str, ...] = ()
    pickle: bool = False

    @classmethod
    def said(cls, words: Sequence[str]) -> tuple["Trust", list[str]]:
        """What a command line grants, and its other words.

        Raises:
            ConfigError: no list of modules, or neither true nor false.
        """
        keys = {"allow": "a list of modules, such as [my_module]", "model.allow_pickle": "true or false"}
        found: dict[str, Any] = {"allow": [], "model.allow_pickle": False}
        for word in words:
            key = word.partition("=")[0]
            if key not in keys:
                continue
            try:
                (override,) = OverridesParser.create().parse_overrides([word])
                found[key] = value = override.value()
            except HydraException:
                value = None
            good = isinstance(value, list) and all(isinstance(name, str) for name in value)
            if not (good if key == "allow" else isinstance(value, bool)):
                raise ConfigError(f"{key}: expected {keys[key]}, got '{word}'")
        rest = [word for word in words if word.partition("=")[0] not in keys]
        return cls(tuple(found["allow"]), found["model.allow_pickle"]), rest

    def into(self, config: DictConfig) -> DictConfig:
        """The configuration with this granted, whatever it says of itself."""
        return OmegaConf.merge(config, {"allow": list(self.allow), "model": {"allow_pickle": self.pickle}})  # type: ignore[return-value]


def read(run: Path, trust: Trust) -> DictConfig:
    """The configuration in a run's folder, which can grant itself nothing.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"expected a run's folder, '{run}' has no config.yaml")
    try:
        config = OmegaConf.load(run / "config.yaml")
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        why = " ".join(str(error).split())
        raise CheckpointError(
            f"'{run / 'config.yaml'}' is no YAML ({why}); restore the file or run again"
        ) from error
    if not isinstance(config, DictConfig):
        raise CheckpointError(f"expected a run's settings in '{run / 'config.yaml'}', got a list")
    if "_target_" not in (config.get("engine") or {}):
        raise CheckpointError(
            f"'{run / 'config.yaml'}' was written by an older fedlora, whose runs this one cannot read; "
            "export its adapter with that version, and go on from it with lora.adapter=DIR"
        )
    return trust.into(config)


def received(text: str) -> DictConfig:
    """The configuration that a server sent, whose values must stand in it as they are.

    A server sends what `compose` has resolved. A reference that is left would be resolved by whoever reads
    it, and `${oc.env:...}` would then read the reader's environment into what it answers.

    Raises:
        ConfigError: it is no mapping, or a value or a key holds a reference.
    """
    try:
        config = OmegaConf.create(text)
    except Exception as error:  # whatever YAML's parser raises
        raise ConfigError(f"the server's configuration cannot be read: {type(error).__name__}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError("the server's configuration: expected keys and values, got something else")
    for place, node in _nodes(OmegaConf.to_container(config, resolve=False), ""):
        if any(isinstance(x, str) and "${" in x for x in (node, place)):
            raise ConfigError(
                f"the server's configuration: expected plain values, got a reference at "
                f"'{place.lstrip('.')}'; it must be resolved before it is sent"
            )
    return config


def kept(config: DictConfig) -> str:
    """The configuration as a run keeps it: one that was continued is the same run, and grants nothing.

    Paths of what is there are absolute, so that the run can be read and continued from any folder.
    """
    made: DictConfig = OmegaConf.merge(config, {"resume": None})  # type: ignore[assignment]
    for key in PLACED:
        path = OmegaConf.select(made, key, throw_on_missing=False)
        if not isinstance(path, str) or not Path(path).exists():
            continue
        group, _, name = key.partition(".")
        OmegaConf.update(made, key, str(Path(path).absolute()))
        if (made[group].get("source") or {}).get(name) == path:  # resolved before
            OmegaConf.update(made, f"{group}.source.{name}", str(Path(path).absolute()))
    return OmegaConf.to_yaml(Trust().into(made))


def differences(settings: str, run: Path, but: Collection[str]) -> list[str]:
    """The settings in which a run, as `kept` writes it, differs from that in a folder, these left out."""
    old, new = (dict(OmegaConf.to_container(c)) for c in (read(run, Trust()), OmegaConf.create(settings)))  # type: ignore[arg-type]
    return sorted(str(key) for key in {*old, *new} - {*but} if old.get(key) != new.get(key))


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
    for place, node in _nodes(part, key):
        if isinstance(node, str) and "${" in node:  # a reference after all, resolved only when it is too late
            raise ConfigError(f"{place}: expected a plain value, got '{node}'; write it without ${{")
        if isinstance(node, dict) and "_target_" in node:
            _check(place, node["_target_"], key.partition(".")[0], allow)
    for place, node in _nodes(part, key):
        if isinstance(node, dict):
            _check_words(place, node, key, allow)
    return part


def make(config: DictConfig, key: str, kind: type = object) -> Any:
    """Make what the `_target_` of a part names, which must be ours, torch's or allowed.

    Args:
        config: the whole configuration.
        key: the part, such as "strategy" or "data.source".
        kind: the class that the made object must have.

    Raises:
        FedLoraError: what the target itself raises, or a ConfigError in one line for anything else.
    """

    def check(cls: type) -> None:
        if not issubclass(cls, kind):
            raise ConfigError(
                f"{key}: expected a _target_ that makes a {kind.__name__}, got a {cls.__name__}"
            )

    try:
        part = checked(config, key)
        found = _found(part["_target_"]) if isinstance(part, dict) and "_target_" in part else None
        maker = found.__self__ if inspect.ismethod(found) else found
        if inspect.isclass(maker):
            check(maker)  # before it is made: to make the wrong thing could already do harm
        # Lists as they are: in Hydra's own a dataclass, such as a local rule, would become a configuration.
        made = hydra.utils.instantiate(part, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, FedLoraError):
            raise cause from None
        raise ConfigError(f"{key}: {' '.join(str(cause or error).split())}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error
    check(type(made))
    return made


def named(config: DictConfig, key: str, kind: type) -> Any:
    """What the `_target_` of a part makes, as `make` does; None where the part names none.

    Raises:
        FedLoraError: as `make` does, or a ConfigError where the part is no mapping.
    """
    part = config.get(key)
    if part is not None and not isinstance(part, DictConfig):
        raise ConfigError(f"{key}: expected keys and values, got {part!r:.60}")
    return make(config, key, kind) if "_target_" in (part or {}) else None


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


def _nodes(node: Any, place: str) -> Iterator[tuple[str, Any]]:
    yield place, node
    if isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _nodes(value, f"{place}.{name}")


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
        found = _found(target)
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


def _found(target: str) -> Any:
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
