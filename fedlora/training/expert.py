"""The global expert of FedMS: a whole second adapter that a client uses and leaves as it is.

Wu, Li, Wang, Wang. "FedMS: Federated Learning with Mixture of Sparsely Activated Foundations Models". 2023.
https://arxiv.org/abs/2312.15926
"""

from dataclasses import dataclass

from fedlora.core.adapter import Adapter
from fedlora.core.method import MethodPart


@dataclass(frozen=True)
class GlobalExpert(MethodPart):
    """What the second stage of FedMS needs beside the gate, which is the task's own adapter.

    Args:
        adapter: the global expert, in which a client's local expert starts.
        frozen: the modules of the local expert that the client does not train.
    """

    adapter: Adapter
    frozen: frozenset[str] = frozenset()
