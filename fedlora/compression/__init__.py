"""How the numbers of messages travel in fewer bytes."""

from fedlora.compression.base import Compression, MessageKey
from fedlora.compression.bf16 import BF16
from fedlora.compression.int8 import Int8
from fedlora.compression.nf4 import NF4
from fedlora.compression.randk import RandK
from fedlora.compression.segments import Segments
from fedlora.compression.topk import TopK

__all__ = ["BF16", "NF4", "Compression", "Int8", "MessageKey", "RandK", "Segments", "TopK"]
