"""From a composed configuration to the description of a run: the only reader of Hydra's configuration."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from fedlora.callbacks.base import Callback
from fedlora.callbacks.csv import CSV
from fedlora.callbacks.mlflow import MLflow
from fedlora.callbacks.tensorboard import TensorBoard
from fedlora.callbacks.tracker import Tracker
from fedlora.callbacks.wandb import WandB
from fedlora.compression import Compression
from fedlora.core.parametrization import LORA
from fedlora.core.strategy import Strategy
from fedlora.core.update_step import UpdateStep
from fedlora.data import Dataset
from fedlora.engines.base import Engine
from fedlora.errors import ConfigError
from fedlora.models import parametrizations
from fedlora.models.device import AUTO, chosen_dtype
from fedlora.privacy import Privacy
from fedlora.robust.base import Robust
from fedlora.rounds.scheduling import Scheduler
from fedlora.runner.spec import RunSpec
from fedlora.runner.spec_parts import DataSpec, EvaluationSpec, LoRASpec, ModelSpec
from fedlora.server_optimizers import ServerOptimizer
from fedlora.training.client import Client
from fedlora.training.rules import LocalRule

from .defaults import defaults
from .instantiate import kept, make, named

HELD_OUT = "fedlora.data.files.held_out"  # what data=sites makes; its name could be that of anybody's folder
FILES = "fedlora.data.files.load"
# What may be of anyone's making.
CODE = (
    "strategy",
    "client",
    "privacy",
    "robust",
    "rule",
    "steps",
    "compression",
    "server",
    "scheduler",
    "engine",
)
ROLES = ("text", "label", "prompt", "response")
# A tracker is chosen by name and not by `_target_`: a kept configuration, which may come from anyone, brings
# no code that sends numbers anywhere.
TRACKERS: dict[str, type[Tracker]] = {
    "csv": CSV,
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def run_spec(config: DictConfig, given: Mapping[str, Any] | None = None) -> RunSpec:
    """The description of the run that a configuration composes; nothing of it is loaded.

    Args:
        config: composed, every reference resolved; its `allow` says which code of the user's it may name.
        given: parts of a run that was started from Python, which its configuration cannot name: strategy,
            client, lora, privacy, robust, rule, steps, compression, server, scheduler, engine, model
            (ModelSpec), data (DataSpec); and callbacks beside those that the configuration names, or None for
            none at all.

    Raises:
        FedLoraError: a setting that cannot be, or names code that it must not.
    """
    if config.get("pairs"):
        raise ConfigError("pairs: one run cannot have several settings of a kind; say fedlora run -m")
    given = dict(given or {})

    def part(name: str, made: Callable[[], Any]) -> Any:
        return given[name] if name in given else made()

    check_lacking(config, given)
    config = settled(config)
    privacy: Privacy | None = part("privacy", lambda: named(config, "privacy", Privacy))
    added = given.get("callbacks", ())
    return RunSpec(
        strategy=part("strategy", lambda: make(config, "strategy", Strategy)),
        client=part("client", lambda: make(config, "client", Client)),
        model=part("model", lambda: model_spec(config)),
        data=part("data", lambda: data_spec(config)),
        models=tuple(model_spec(one) for one in _model_choices(config)),
        lora=part("lora", lambda: lora_spec(config)),
        evaluate=EvaluationSpec(**plain(config.evaluate)),
        privacy=privacy,
        robust=part("robust", lambda: named(config, "robust", Robust)),
        rule=part("rule", lambda: named(config, "rule", LocalRule)),
        steps=tuple(part("steps", lambda: _steps(config)) or ()),
        compression=part("compression", lambda: named(config, "compression", Compression)),
        server=part("server", lambda: named(config, "server", ServerOptimizer)),
        scheduler=part("scheduler", lambda: make(config, "scheduler", Scheduler)),
        engine=part("engine", lambda: make(config, "engine", Engine)),
        callbacks=() if added is None else (*_callbacks(config), *added),
        clients=config.clients,
        clients_per_round=config.clients_per_round,
        rounds=config.rounds,
        ranks=plain(config.ranks),
        weights=config.weights,
        min_updates=config.min_updates,
        secure_sum=config.secure_sum,
        record_updates=config.record_updates,
        seed=config.seed,
        settings=kept(config),
        defaults=defaults,
    )


def check_lacking(config: DictConfig, given: Collection[str]) -> None:
    """Refuse a configuration without the objects that it could not name.

    Raises:
        ConfigError: which parts are lacking, and how to give them.
    """
    if lacking := sorted({*(config.get("from_python") or ())} - {*given}):
        objects = ", ".join(f"{name}=..." for name in lacking)
        raise ConfigError(
            f"this run was started from Python with objects that no configuration can name "
            f"({', '.join(lacking)}); go on with it from Python: fedlora.open(DIR).resume("
            f"{objects}), or read it with fedlora.open(DIR, {objects})"
        )


def kept_spec(config: DictConfig, given: Mapping[str, Any] | None = None, strategy: bool = False) -> RunSpec:
    """The description of a run whose model and rows alone are wanted.

    Its client, privacy, rules, compression, scheduler and engine are None, and it has no steps and no
    callbacks: to read what a run has left, no code of the user's is needed, and nothing that a stranger's
    folder names is made.

    Args:
        config: the run's.
        given: as for `run_spec`.
        strategy: whether the strategy is wanted too, which is None otherwise.
    """
    left = [name for name in (*CODE, "callbacks") if not (strategy and name == "strategy")]
    parts = dict.fromkeys(left) | dict(given or {})
    if "data" in (config.get("from_python") or ()) and "data" not in parts:  # not everyone will read them
        lacking: Any = partial(check_lacking, config, parts)
        rows = DataSpec(source=lacking, name=config.data.name, max_length=config.data.max_length)
        return run_spec(config, parts | {"data": rows})
    return run_spec(config, parts)


def settled(config: DictConfig) -> DictConfig:
    """The configuration with what this machine decides: a model's dtype where that is auto.

    A run keeps what comes out, so that whoever resumes, exports or verifies it elsewhere has the same.
    """
    if config.model.get("dtype") != AUTO:
        return config
    dtype = chosen_dtype(AUTO, config.model.device)
    return OmegaConf.merge(config, {"model": {"dtype": dtype}})  # type: ignore[return-value]


def model_spec(config: DictConfig) -> ModelSpec:
    """The base model that a configuration names."""
    m = config.model
    path = None if OmegaConf.is_missing(m, "path") else m.path
    return ModelSpec(
        path=path,
        source=partial(make, config, "model.source") if m.get("source") else None,
        name=str(m.get("name", path)),
        dtype=m.dtype,
        device=m.device,
        quantize=m.quantize,
        gradient_checkpointing=m.get("gradient_checkpointing"),
        attention=m.get("attention"),
        allow_pickle=bool(m.get("allow_pickle")),
        lora_targets=plain(m.get("lora_targets", "all-linear")),
        lr=float(m.get("lr", ModelSpec.lr)),
    )


def data_spec(config: DictConfig) -> DataSpec:
    """The rows that a configuration names, and how they become clients."""
    d = config.data
    source = d.get("source") or {}
    names = ("partition", "alpha", "shards", "min_rows", "max_rows", "max_length", "file", "client")
    return DataSpec(
        source=partial(make, config, "data.source", Dataset),
        name=str(d.name),
        at_sites=source.get("_target_") == HELD_OUT,
        columns={role: plain(d.get(role)) for role in ROLES},
        quotes=d.get("quotes"),
        tested=partial(_tested, config) if source.get("_target_") == FILES and source.get("test") else None,
        **{name: d[name] for name in names if name in d},
    )


def lora_spec(config: DictConfig) -> LoRASpec:
    """The adapter's form that a configuration names.

    Raises:
        ConfigError: a parametrization of no such name, or one that cannot be made.
    """
    known = {name.lower(): getattr(parametrizations, name) for name in ("DoRA", "Sparse")}
    settings, form = plain(config.lora), plain(config.lora.get("parametrization"))
    if isinstance(form, str):
        if form not in ("lora", *known):
            raise ConfigError(
                f"lora.parametrization: expected lora, {', '.join(known)} or a _target_, got '{form}'"
            )
        form = known[form]() if form in known else LORA
    else:
        kind = parametrizations.Parametrization
        form = LORA if form is None else make(config, "lora.parametrization", kind)
    return LoRASpec(**settings | {"parametrization": form})


def plain(value: Any) -> Any:
    """A part of a configuration as ordinary lists and dictionaries."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _steps(config: DictConfig) -> list[UpdateStep]:
    """The update steps that a configuration lists; a run of before there were any lists none.

    Raises:
        ConfigError: no list, or something in it that makes no step.
    """
    given = config.get("steps")
    listed = () if given is None else given
    if not isinstance(listed, ListConfig | tuple) or not all(isinstance(one, DictConfig) for one in listed):
        raise ConfigError(f"steps: expected a list such as [{{_target_: my_steps.Mine}}], got {given!s:.60}")
    return [make(config, f"steps.{at}", UpdateStep) for at in range(len(listed))]


def _tested(config: DictConfig, labels: Sequence[str]) -> Dataset:
    """The test rows of files, without the training rows."""
    given = {name: config.data.source.get(name) for name in ("test", *ROLES, "quotes")}
    alone = config.copy()
    alone.data.source = {"_target_": HELD_OUT, "labels": list(labels), **given}
    made: Dataset = make(alone, "data.source", Dataset)
    return made


def _model_choices(config: DictConfig) -> list[DictConfig]:
    """The configuration once for every one of several models that clients have, in their turn."""
    given = [config.models] if isinstance(config.models, str) else plain(config.models) or []
    return [_with_model(config, str(name)) for name in given]


def _with_model(config: DictConfig, name: str) -> DictConfig:
    """The configuration with another model: a choice of the group `model`, or else a folder or hub name."""
    found: Mapping[str, Any] = {"path": name, "source": None}
    for file in (resources.files("fedlora.config.conf") / "model").iterdir():
        if file.name != f"{name}.yaml":  # compared and not joined: a name could lead to any file
            continue
        found = plain(OmegaConf.create(file.read_text(encoding="utf-8")))
    if found["path"] == "???":
        raise ConfigError(f"models: '{name}' is any model; say the folder or hub name itself in its place")
    given = {"path": found["path"], "source": found["source"], "name": name}
    return OmegaConf.merge(config, {"model": given})  # type: ignore[return-value]


def _callbacks(config: DictConfig) -> Iterator[Callback]:
    """The callbacks that a configuration names: a tracker, early stopping, the best checkpoint."""
    found = (_tracker(config), named(config, "stop", Callback), named(config, "keep", Callback))
    yield from (callback for callback in found if callback is not None)


def _tracker(config: DictConfig) -> Tracker | None:
    """The tracker that a run asks for."""
    track = dict(config.get("track") or {"name": "none"})
    name = track["name"]
    if name == "none":
        return None
    if name not in TRACKERS:
        raise ConfigError(f"track: expected none, {', '.join(TRACKERS)}, got '{name}'")
    try:
        return TRACKERS[name](**{key: value for key, value in track.items() if key != "name"})
    except TypeError as error:
        raise ConfigError(f"track: {' '.join(str(error).split())}") from error


def folder_of(config: DictConfig) -> Path | None:
    """The folder that `out` names; None where it names none.

    Raises:
        ConfigError: it is empty.
    """
    if config.out == "":
        raise ConfigError("out: expected a folder, got nothing; leave it out for one of the run's own")
    return None if config.out is None else Path(config.out)
