"""One file, one parametrization: how a few tensors change a layer's weight. LoRA is the interface itself."""

from fedlora.core.parametrization import LORA, Layer, Parametrization
from fedlora.models.parametrizations.composed import Composed, composed
from fedlora.models.parametrizations.core_matrix import CoreMatrix
from fedlora.models.parametrizations.dora import DoRA
from fedlora.models.parametrizations.sparse import Sparse

__all__ = ["LORA", "Composed", "CoreMatrix", "DoRA", "Layer", "Parametrization", "Sparse", "composed"]
