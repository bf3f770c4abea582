"""The configuration of a run: its types, and how overrides become one, with errors in one line."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from fedlora.errors import ConfigError

from .sources import hydra_here, know_choices

PATHS = ("out", "resume", "data.train", "data.test", "data.path", "model.path", "lora.adapter")
COLUMNS = tuple(f"data.{role}" for role in ("text", "label", "prompt", "response", "client"))  # 1 is a name
PLACED = tuple(key for key in PATHS if "." in key)  # what a deployment's server opens in a folder of its own
NEVER_A_NAME = ("data.train", "data.test", "lora.adapter")  # the others may be names on the Hugging Face hub
APPEND = re.compile(r"\. To append to your config use \+.*?(?=: |$)")
DICTIONARIES = ("lora.rank_pattern", "lora.alpha_pattern")


@dataclass
class Evaluate:
    """When and on what to evaluate."""

    every: int = 1
    rows: str = "test"
    clients: bool = False
    updates: bool = False
    answers: int = 0


@dataclass
class Lora:
    """The adapter's form."""

    targets: Any = None
    target_parameters: Any = field(default_factory=list)
    scale: float = 2.0
    alpha: float | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    head: str = "train"
    init: str | None = None
    dora: bool = False
    parametrization: Any = None
    adapter: str | None = None


@dataclass
class Schema:
    """A whole run; the groups are checked by the classes that they name."""

    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    client: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    privacy: dict[str, Any] = field(default_factory=dict)
    robust: dict[str, Any] = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)
    steps: list[Any] = field(default_factory=list)
    compression: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    track: dict[str, Any] = field(default_factory=dict)
    stop: dict[str, Any] = field(default_factory=dict)
    keep: dict[str, Any] = field(default_factory=dict)
    pairs: list[Any] = field(default_factory=list)
    compare: dict[str, Any] = field(default_factory=dict)
    models: Any = None
    clients: int | None = 8
    clients_per_round: int | None = None
    rounds: int = 5
    ranks: Any = 8
    weights: str = "examples"
    min_updates: int = 1
    secure_sum: bool = False
    record_updates: bool = False
    seed: int = 0
    lora: Lora = field(default_factory=Lora)
    evaluate: Evaluate = field(default_factory=Evaluate)
    allow: list[str] = field(default_factory=list)
    out: str | None = None
    resume: str | None = None


def register() -> None:
    """Make known the schema, and what its YAML calls.

    `${times:a,b}` is the product, by which a strategy sets its rate to a model's. `${dealt:n,how}` is how
    many clients get rows where the user names no number: n, or null, which is all, where they are natural.
    """
    OmegaConf.register_new_resolver("times", lambda a, b: float(a) * float(b), replace=True)
    OmegaConf.register_new_resolver("dealt", lambda n, how: None if how == "natural" else n, replace=True)
    ConfigStore.instance().store(name="schema", node=Schema)
    know_choices()


def compose(overrides: Sequence[str]) -> DictConfig:
    """The configuration that these overrides give, every reference in it resolved.

    Raises:
        ConfigError: an unknown key, group choice or value, in one line.
    """
    register()
    overrides = [opened(_quoted(word)) for word in overrides]
    try:
        with hydra_here():
            try:
                config = hydra.compose("config", list(overrides))
            except (HydraException, OmegaConfBaseException):
                _know(overrides)  # says more of a wrong key, and takes as long again
                raise
            resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    return config


def resolve(config: DictConfig) -> None:
    """Resolve every reference in a configuration, in place.

    Raises:
        ConfigError: a choice of data needs a value that was not given, or a path of a deployment's data is
            not there.
        OmegaConfBaseException: a reference leads nowhere.
    """
    for key in config.data:
        if OmegaConf.is_missing(config.data, key):
            raise ConfigError(f"data.{key}: needs a value, got none; say data.{key}=...")
    if str(config.engine.get("_target_")).startswith("fedlora.deploy."):
        _place(config)
    OmegaConf.resolve(config)


def _place(config: DictConfig) -> None:
    """Make the paths absolute that a process in another folder is to open, before other keys refer to them.

    Raises:
        ConfigError: a relative path of data is not there; nothing else could be meant by it.
    """
    for key in PLACED:
        node, _, name = key.partition(".")
        given = config[node]
        if name not in given or OmegaConf.is_missing(given, name) or OmegaConf.is_interpolation(given, name):
            continue
        if not isinstance(path := given[name], str) or Path(path).is_absolute():
            continue
        if Path(path).exists():
            given[name] = str(Path(path).absolute())
        elif key in NEVER_A_NAME:
            raise ConfigError(
                f"{key}: expected a file or a folder, got '{path}', which is not in {Path.cwd()}; check the "
                "path"
            )


def check_keys(overrides: Sequence[str]) -> None:
    """Raise ConfigError for a key that does not exist; a sweep's values are Hydra's business."""
    try:
        with hydra_here():
            _know(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error


def _quoted(word: str) -> str:
    """A path or a column's name in the quotes that Hydra's grammar wants; its user knows the shell's only."""
    key, given, value = word.partition("=")
    # A list of columns is refused where its columns are looked for.
    quoted = "'\"[{" if key in COLUMNS else "'\""
    plain = value not in ("", "null", "???") and value[0] not in quoted and "${" not in value
    if not given or key not in (*PATHS, *COLUMNS) or not plain:
        return word
    return key + "='" + value.replace("'", "\\'") + "'"


def opened(word: str) -> str:
    """A key of a dictionary of names that nobody can know before: Hydra adds those only if told to."""
    key = word.partition("=")[0]
    return f"++{word}" if any(key == name or key.startswith(f"{name}.") for name in DICTIONARIES) else word


def path_said(word: str) -> str:
    """The path in `KEY=PATH`, quoted or not, as Hydra's grammar reads it.

    Raises:
        ConfigError: quotes that do not close.
    """
    try:
        (override,) = OverridesParser.create().parse_overrides([_quoted(word)])
    except HydraException as error:
        raise ConfigError(one_line(error)) from error
    value = override.value()
    return "" if value is None else str(value)


def choices() -> dict[str, list[str]]:
    """The configuration groups and their choices, wherever Hydra stands."""
    with hydra_here():
        return groups()


def with_hydra(overrides: Sequence[str]) -> DictConfig:
    """The configuration with Hydra's own part, unresolved."""
    try:
        with hydra_here():
            return hydra.compose("config", list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error


@cache
def groups() -> dict[str, list[str]]:
    """The configuration groups and their choices, which no one but fedlora adds to; Hydra stands there."""
    loader = GlobalHydra.instance().config_loader()
    found = {group: loader.get_group_options(group) for group in loader.list_groups("")}
    return {group: choices for group, choices in found.items() if choices and group != "hydra"}


def _know(overrides: Sequence[str]) -> None:
    """Refuse keys that do not exist, naming the nearest one that does."""
    choices = groups()
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    simple = [o for o in parsed if not o.is_sweep_override() and o.key_or_group in choices]
    chosen = [o.input_line for o in simple if o.input_line and o.value() is not None]
    for swept in (o for o in parsed if o.is_choice_sweep() and o.key_or_group in choices):
        group, values = swept.key_or_group, list(swept.sweep_string_iterator())
        if unknown := [value for value in values if value not in choices[group]]:
            near = difflib.get_close_matches(unknown[0], choices[group], 1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise ConfigError(
                f"unknown {group} '{unknown[0]}'; {hint}there are {', '.join(sorted(choices[group]))}"
            )
        chosen.append(f"{group}={values[0]}")
    known = OmegaConf.to_container(hydra.compose("config", chosen), resolve=False)
    for override in parsed:
        key = override.key_or_group
        if key in choices or override.is_force_add() or override.is_add() or key.startswith("hydra"):
            continue
        node: Any = known
        for depth, part in enumerate(key.split(".")):
            if not isinstance(node, dict):
                break  # below a value: Hydra says what is wrong
            if part not in node and not (depth and not node):
                inside = ".".join(key.split(".")[:depth])
                names = [*node, *(choices if not depth else [])]
                near = difflib.get_close_matches(part, [str(name) for name in names], 1)
                hint = f"did you mean '{near[0]}'? " if near else ""
                if not near and part != key and inside in choices:
                    hint = f"another choice of {inside}=... may have it ({', '.join(choices[inside])}); "
                where = f"under '{inside}'" if inside else "at the top"
                raise ConfigError(
                    f"unknown key '{part}' in '{override.input_line}'; {hint}"
                    f"{where} there are {', '.join(sorted({str(name) for name in names}))}"
                )
            node = node.get(part)


def one_line(error: Exception) -> str:
    """Hydra's message, and that of its cause where it says more, without line breaks."""
    if isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError):
        key = str(error).splitlines()[0].rpartition(" ")[2]
        return f"{key}: needs a value, got none; say {key}=..."
    cause = error.__cause__
    text = str(error) if cause is None or str(cause) in str(error) else f"{error}: {cause}"
    text = " ".join(text.partition("Config search path")[0].split())
    return APPEND.sub("", text)  # a key that is not known is a mistake here, and + would not mend it
