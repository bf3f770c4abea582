"""Base models from transformers, K adapters on one of them, and adapters in PEFT's files."""

from fedlora.models.adaptable import targets
from fedlora.models.bank import Bank
from fedlora.models.base import Base
from fedlora.models.dora import with_magnitudes
from fedlora.models.loading import checkpoint_dtype, load
from fedlora.models.lora import LoRA, fresh_adapter, layer_weight
from fedlora.models.peft_files import by_peft, load_adapter, merge, save_adapter
from fedlora.models.starts import taken_out
from fedlora.models.tap import Tap
from fedlora.models.traits import Traits

__all__ = [
    "Bank",
    "Base",
    "LoRA",
    "Tap",
    "Traits",
    "by_peft",
    "checkpoint_dtype",
    "fresh_adapter",
    "layer_weight",
    "load",
    "load_adapter",
    "merge",
    "save_adapter",
    "taken_out",
    "targets",
    "with_magnitudes",
]
