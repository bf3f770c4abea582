"""Whether the parts of a run's description are what they must be; a wrong one fails late, or not at all."""

import inspect
from typing import TYPE_CHECKING, Any

from fedlora.callbacks.base import Callback
from fedlora.compression import Compression
from fedlora.core.strategy import Strategy
from fedlora.core.update_step import UpdateStep
from fedlora.engines.base import Engine
from fedlora.errors import ConfigError
from fedlora.privacy import Privacy
from fedlora.ranges import check_whole
from fedlora.robust.base import Robust
from fedlora.rounds.scheduling import Scheduler
from fedlora.server_optimizers import ServerOptimizer
from fedlora.training.client import Client
from fedlora.training.rules import LocalRule

if TYPE_CHECKING:
    from .spec import RunSpec

KINDS: dict[str, type] = {
    "strategy": Strategy,
    "client": Client,
    "privacy": Privacy,
    "robust": Robust,
    "rule": LocalRule,
    "compression": Compression,
    "server": ServerOptimizer,
    "scheduler": Scheduler,
    "engine": Engine,
}
FACTS = ("mixed_ranks", "linear", "exact")  # of a strategy, those that have no default
SPACES = ("factors", "product", "rank", "base_delta")  # of a strategy for server optimizers, or none


def check_parts(spec: "RunSpec") -> None:
    """Refuse parts of another kind; None passes, for whoever reads a run without them.

    Raises:
        ConfigError: a part that is no object of its kind, such as a class without its brackets, or a strategy
            that does not say what it needs to.
    """
    for name, kind in KINDS.items():
        if (part := getattr(spec, name)) is not None:
            _check(name, part, kind)
    for name, kind in {"steps": UpdateStep, "callbacks": Callback}.items():
        for at, part in enumerate(getattr(spec, name)):
            _check(f"{name}[{at}]", part, kind)
    for at, step in enumerate(spec.steps):
        if not (step.at_client or step.at_server):
            raise ConfigError(
                f"steps[{at}]: {type(step).__name__} has no half; write its on_client, its on_server or both"
            )
    if spec.robust is not None and spec.robust.at_client:
        raise ConfigError(
            f"robust: a rule works at the server alone, and {type(spec.robust).__name__} has an on_client, "
            "which nobody would apply; give it in steps=[...]"
        )
    if spec.strategy is not None and (lacking := [f for f in FACTS if not hasattr(spec.strategy, f)]):
        raise ConfigError(
            f"strategy: expected {', '.join(FACTS)} to be True or False in {type(spec.strategy).__name__}, "
            f"got no {', '.join(lacking)}; fedlora.Strategy says what each means"
        )
    if spec.strategy is not None and (space := spec.strategy.server_space) not in ("", *SPACES):
        name = type(spec.strategy).__name__
        raise ConfigError(
            f"strategy: expected {name}.server_space to be one of {', '.join(SPACES)}, or left out, got "
            f"{space!r}; fedlora.Strategy says what each means"
        )
    check_whole("clients", spec.clients, none=True)


def _check(name: str, part: Any, kind: type) -> None:
    if isinstance(part, kind):
        return
    got = f"{part!r:.60}"
    if inspect.isclass(part):
        got = f"the class {part.__name__}"
        got += f"; write {part.__name__}(...)" if issubclass(part, kind) else ""
    raise ConfigError(f"{name}: expected an object of a subclass of {kind.__name__}, got {got}")
