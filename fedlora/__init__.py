"""Federated LoRA: fine-tune one language model over text that cannot be pooled."""

from fedlora import errors
from fedlora.adapter import Adapter, Pair
from fedlora.protocol import Peer, State, Task, Update
from fedlora.strategy import Strategy

__all__ = ["Adapter", "Pair", "Peer", "State", "Strategy", "Task", "Update", "errors"]
__version__ = "0.1.0"
