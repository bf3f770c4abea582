"""A run that was started from Python, as the configuration that the command line would have composed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from typing import Any

from omegaconf import OmegaConf

from fedlora.callbacks.base import Callback
from fedlora.callbacks.best_checkpoint import BestCheckpoint
from fedlora.callbacks.early_stopping import EarlyStopping
from fedlora.core.parametrization import LORA
from fedlora.runner.spec import RunSpec

from .translate import TRACKERS

PUBLIC = (
    "fedlora.strategies",
    "fedlora.clients",
    "fedlora.privacy",
    "fedlora.training.rules",
    "fedlora.schedulers",
    "fedlora.compression",
)


def describe(
    spec: RunSpec, model: Mapping[str, Any] | None, data: Mapping[str, Any] | None
) -> tuple[str, list[str]]:
    """The configuration of a run as YAML, and the names of its parts that no configuration can name.

    Args:
        spec: the run.
        model: the settings of its model in plain values; None where it is an object in memory.
        data: likewise of its rows.
    """
    unnamed: list[str] = []

    def part(name: str, thing: Any) -> dict[str, Any]:
        if thing is None:
            return {"name": "none"}
        made, good = _object(thing)
        if not good:
            unnamed.append(name)
        return made

    strategy, client = part("strategy", spec.strategy), part("client", spec.client)
    privacy, robust = part("privacy", spec.privacy), part("robust", spec.robust)
    scheduler, engine = part("scheduler", spec.scheduler), part("engine", spec.engine)
    steps = [_object(step) for step in spec.steps]
    unnamed += [] if all(good for _, good in steps) else ["steps"]
    lora = {name: _listed(value) for name, value in asdict(spec.lora).items()}
    if spec.lora.parametrization == LORA:
        lora["parametrization"] = None
    else:
        lora["parametrization"], good = _object(spec.lora.parametrization)
        unnamed += [] if good else ["lora"]
    if model is None:
        unnamed.append("model")
    if data is None:
        unnamed.append("data")
    config = {
        "model": dict(model) if model is not None else {"name": spec.model.name, "path": None},
        "data": dict(data) if data is not None else _rows(spec),
        "client": client,
        "engine": engine,
        "strategy": strategy,
        "privacy": privacy,
        "robust": robust,
        "rule": part("rule", spec.rule),
        "steps": [made for made, _ in steps],
        "compression": part("compression", spec.compression),
        "server": part("server", spec.server),
        "scheduler": scheduler,
        "track": {"name": "none", "clients": False},
        "stop": {"name": "none"},
        "keep": {"name": "last"},
        **named_callbacks(spec.callbacks)[0],
        "pairs": [],
        "compare": {},
        "models": None,
        "clients": spec.clients,
        "clients_per_round": spec.clients_per_round,
        "rounds": spec.rounds,
        "ranks": spec.ranks if isinstance(spec.ranks, int) else _listed(spec.ranks),
        "weights": spec.weights,
        "min_updates": spec.min_updates,
        "secure_sum": spec.secure_sum,
        "record_updates": spec.record_updates,
        "seed": spec.seed,
        "lora": lora,
        "evaluate": asdict(spec.evaluate),
        "allow": [],
        "out": None,
        "resume": None,
        **({"from_python": sorted(unnamed)} if unnamed else {}),
    }
    return OmegaConf.to_yaml(OmegaConf.create(config)), unnamed


def named_callbacks(
    callbacks: Sequence[Callback],
) -> tuple[dict[str, dict[str, Any]], list[Callback]]:
    """The settings of those callbacks that a configuration can name, by their groups; and the others.

    Of two of a kind, the configuration names the first.
    """
    trackers = {cls: name for name, cls in TRACKERS.items()}
    groups: dict[type[Callback], str] = {EarlyStopping: "stop", BestCheckpoint: "keep"}
    found: dict[str, dict[str, Any]] = {}
    others: list[Callback] = []
    for callback in callbacks:
        cls = type(callback)
        group = "track" if cls in trackers else groups.get(cls, "")
        if not group or group in found:
            others.append(callback)
        elif group == "track":
            own = {f.name: getattr(callback, f.name) for f in fields(callback) if f.init}  # type: ignore[arg-type]
            found[group] = {"name": trackers[cls], **own}  # type: ignore[index]
        else:
            found[group] = _object(callback)[0]
    return found, others


def _rows(spec: RunSpec) -> dict[str, Any]:
    """Rows that are objects in memory: what is known of them, without the rows."""
    d = spec.data
    how = d.partition if isinstance(d.partition, str) else getattr(d.partition, "__name__", "a function")
    names = ("name", "alpha", "shards", "min_rows", "max_rows", "max_length")
    return {**{name: getattr(d, name) for name in names}, "partition": how}


def _object(thing: Any) -> tuple[dict[str, Any], bool]:
    """A part as `_target_` and its fields; and whether a configuration can make it again."""
    cls = type(thing)
    good = cls.__module__.partition(".")[0] == "fedlora" and is_dataclass(thing)
    home = next((p for p in PUBLIC if cls.__module__.startswith(f"{p}.")), cls.__module__)
    found: dict[str, Any] = {"_target_": f"{home}.{cls.__qualname__}"}
    shown = fields(thing) if is_dataclass(thing) else ()
    if not good:  # it cannot be made again of these, and its texts may be anything: a token, somebody's rows
        shown = tuple(f for f in shown if f.repr and isinstance(getattr(thing, f.name), int | float))
    for field in shown:
        value, fine = _value(getattr(thing, field.name))
        if not (field.init and value == {}):
            found[field.name] = value
        good = good and fine
    return found, good


def _value(value: Any) -> tuple[Any, bool]:
    """A field's value in plain values; and whether a configuration can make it again."""
    if value is None or isinstance(value, str | int | float | bool):
        return value, True
    if isinstance(value, list | tuple):
        parts = [_value(item) for item in value]
        return [part for part, _ in parts], all(good for _, good in parts)
    if isinstance(value, Mapping):
        pairs = {str(key): _value(item) for key, item in value.items()}
        return {key: part for key, (part, _) in pairs.items()}, all(good for _, good in pairs.values())
    if is_dataclass(value) and not isinstance(value, type):
        return _object(value)
    return _called(value)


def _called(value: Any) -> tuple[Any, bool]:
    """A class or function that a part calls later, such as an optimizer of torch's."""
    words = {}
    if isinstance(value, partial) and not value.args:
        words, value = dict(value.keywords), value.func
    home, name = getattr(value, "__module__", "?"), getattr(value, "__qualname__", type(value).__name__)
    if isinstance(value, Callable) and home.startswith("torch.optim"):  # type: ignore[arg-type]
        return {"_target_": f"torch.optim.{name}", "_partial_": True, **words}, True
    return f"{home}.{name}", False


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value
