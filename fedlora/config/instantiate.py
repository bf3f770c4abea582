"""What a configuration may name to be made, and what the command line alone may add to it.

A configuration can come from anyone: with a run's folder, over the wire. Its `_target_` is code to be called.
"""

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from fedlora.config.allowed import checked, found_at, nodes
from fedlora.config.composition import PLACED
from fedlora.errors import CheckpointError, ConfigError, FedLoraError


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
    for place, node in nodes(OmegaConf.to_container(config, resolve=False), ""):
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
        found = found_at(part["_target_"]) if isinstance(part, dict) and "_target_" in part else None
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
