"""Federated LoRA: fine-tune one language model over text that cannot be pooled."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedlora import errors

if TYPE_CHECKING:
    from fedlora import (
        callbacks,
        clients,
        compression,
        privacy,
        robust,
        schedulers,
        server_optimizers,
        strategies,
    )
    from fedlora.api.compare import compare
    from fedlora.api.run import Run
    from fedlora.api.run import open_run as open
    from fedlora.api.simulate import Session, simulate
    from fedlora.api.sweep import Sweep, each, sweep
    from fedlora.core.adapter import Adapter, Pair
    from fedlora.core.messages import Peer, State, Task, Update
    from fedlora.core.strategy import Strategy
    from fedlora.core.update_step import ClientUpdate, RoundUpdates, UpdateStep
    from fedlora.rounds.scheduling import Scheduler
    from fedlora.runner.spec_parts import EvaluationSpec, LoRASpec, ModelSpec
    from fedlora.tasks import LearningTask
    from fedlora.training import rules
    from fedlora.training.client import Client, TrainRequest, TrainResult
    from fedlora.training.round_schedule import RoundSchedule

_HOMES = {  # public name -> where it is
    "Adapter": "core.adapter",
    "Client": "training.client",
    "ClientUpdate": "core.update_step",
    "EvaluationSpec": "runner.spec_parts",
    "LearningTask": "tasks",
    "LoRASpec": "runner.spec_parts",
    "ModelSpec": "runner.spec_parts",
    "Pair": "core.adapter",
    "Peer": "core.messages",
    "RoundSchedule": "training.round_schedule",
    "RoundUpdates": "core.update_step",
    "Run": "api.run",
    "Scheduler": "rounds.scheduling",
    "Session": "api.simulate",
    "State": "core.messages",
    "Strategy": "core.strategy",
    "Sweep": "api.sweep",
    "Task": "core.messages",
    "TrainRequest": "training.client",
    "TrainResult": "training.client",
    "Update": "core.messages",
    "UpdateStep": "core.update_step",
    "compare": "api.compare",
    "each": "api.sweep",
    "open": "api.run",
    "simulate": "api.simulate",
    "sweep": "api.sweep",
}
_ROOMS = {
    name: name
    for name in (
        "callbacks",
        "clients",
        "compression",
        "privacy",
        "robust",
        "schedulers",
        "server_optimizers",
        "strategies",
    )
}
_ROOMS["rules"] = "training.rules"
_NAMED = {"open": "open_run"}  # what would hide a builtin in its own module

__all__ = [
    "Adapter",
    "Client",
    "ClientUpdate",
    "EvaluationSpec",
    "LearningTask",
    "LoRASpec",
    "ModelSpec",
    "Pair",
    "Peer",
    "RoundSchedule",
    "RoundUpdates",
    "Run",
    "Scheduler",
    "Session",
    "State",
    "Strategy",
    "Sweep",
    "Task",
    "TrainRequest",
    "TrainResult",
    "Update",
    "UpdateStep",
    "callbacks",
    "clients",
    "compare",
    "compression",
    "each",
    "errors",
    "open",
    "privacy",
    "robust",
    "rules",
    "schedulers",
    "server_optimizers",
    "simulate",
    "strategies",
    "sweep",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """A public name, when it is first asked for: what Flower starts for every message does without torch."""
    if name in _ROOMS:
        return import_module(f"fedlora.{_ROOMS[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fedlora' has no attribute '{name}'")
    return getattr(import_module(f"fedlora.{_HOMES[name]}"), _NAMED.get(name, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
