"""Federated LoRA: fine-tune one language model over text that cannot be pooled."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedlora import errors

if TYPE_CHECKING:
    from fedlora.core.adapter import Adapter, Pair
    from fedlora.core.messages import Peer, State, Task, Update
    from fedlora.core.strategy import Strategy

__all__ = ["Adapter", "Pair", "Peer", "State", "Strategy", "Task", "Update", "errors"]
__version__ = "0.1.0"

_HOMES = {"Adapter": "adapter", "Pair": "adapter", "Strategy": "strategy"}  # in fedlora.core


def __getattr__(name: str) -> Any:
    """A public name, when it is first asked for: what Flower starts for every message does without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'fedlora' has no attribute '{name}'")
    return getattr(import_module(f"fedlora.core.{_HOMES.get(name, 'messages')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
