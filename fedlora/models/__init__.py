"""Base models from transformers, K adapters on one of them, and adapters in PEFT's files."""

from fedlora.models.adaptable import targets
from fedlora.models.base import Base
from fedlora.models.expert_targets import expert_targets
from fedlora.models.experts import lacking, layer_at
from fedlora.models.given import load_given
from fedlora.models.hidden_states import HiddenStateHook
from fedlora.models.initialization import take_out_of_base
from fedlora.models.loading import checkpoint_dtype, load
from fedlora.models.lora import LoRA, fresh_adapter, layer_weight, parametrized
from fedlora.models.multi_adapter import MultiAdapterModel
from fedlora.models.peft_files import adapts_experts, by_peft, load_adapter, merge, save_adapter
from fedlora.models.traits import Traits

__all__ = [
    "Base",
    "HiddenStateHook",
    "LoRA",
    "MultiAdapterModel",
    "Traits",
    "adapts_experts",
    "by_peft",
    "checkpoint_dtype",
    "expert_targets",
    "fresh_adapter",
    "lacking",
    "layer_at",
    "layer_weight",
    "load",
    "load_adapter",
    "load_given",
    "merge",
    "parametrized",
    "save_adapter",
    "take_out_of_base",
    "targets",
]
