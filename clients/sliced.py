"""Local training of a model in two slices, with an encrypted channel between them.

Huang, Wang, Cheng, Zhou, Yu, Wang. "A Fast, Performant, Secure Distributed Training Framework for Large
Language Model". ICASSP 2024. https://arxiv.org/abs/2401.09796

The first `cut` layers run at the client, the rest elsewhere, in the paper in an enclave of the server. Hidden
states go forward over the cut and their gradients come back, both encrypted (AES-256-GCM). With b bytes a
number this costs, for each token of a padded batch,

    2 · b · d_model  bytes, and 28 a message for its nonce and tag

What is computed is the same, to the last bit. Every strategy works over it.

Differs from the paper: only its abstract was at hand. Both slices run in this process. The enclave itself (a
trusted execution environment) is out of reach here: what is shown is the training, the channel and its bytes,
and no protection from whoever owns the machine. The key would come out of the enclave's attestation; here
each client draws one each round. The paper speaks of lightweight encryption, this is a standard cipher. Its
Sparsification Parameter Fine-tuning is not covered, nor its first scheme, with an enclave at the client.
"""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedlora.data import Example
from fedlora.errors import ModelError
from fedlora.models import Base
from fedlora.ranges import check_whole
from fedlora.training.client import Client, TrainRequest, TrainResult
from fedlora.training.rules.base import LocalRule

from .local import LocalTraining

# Where transformers keeps the layers: BERT and RoBERTa, DistilBERT, Llama and its like, GPT-2.
LAYERS = ("encoder.layer", "transformer.layer", "layers", "h")
NONCE, OVERHEAD = 12, 28  # bytes of a nonce, and of a nonce and a tag


@dataclass(frozen=True)
class SlicedTraining(Client):
    """Local training with the model cut after some layer, over a channel that is encrypted and counted.

    Each client trains by itself, over its own channel. Evaluation does not go over the cut.

    Args:
        local: what is trained, by which steps.
        cut: how many layers run at the client; at least one, and one less than there are.
    """

    local: LocalTraining
    cut: int

    def __post_init__(self) -> None:
        check_whole("client.cut", self.cut)

    @classmethod
    def of(cls, cut: int, **local: Any) -> "SlicedTraining":
        """As a configuration says it: the settings of `LocalTraining` beside its own."""
        return cls(LocalTraining(**local), cut)

    def shared(self, base: Base) -> None:
        """Nothing beside the model; but a base that cannot be cut there is refused before the first round.

        Raises:
            ModelError: the model's layers are not known, or the cut is not between two of them.
        """
        Cut(base, self.cut, Channel(""))

    def train(self, base: Base, assignments: Sequence[TrainRequest]) -> list[TrainResult]:
        """Local training, client by client, and what went over the cut.

        Raises:
            ModelError: the model's layers are not known, or the cut is not between two of them.
        """
        outcomes = []
        for assignment in assignments:
            with Cut(base, self.cut, Channel(f"{assignment.client}/{assignment.round}")) as cut:
                outcome = self.local.train(base, [assignment])[0]
            outcomes.append(replace(outcome, metrics=outcome.metrics | cut.metrics()))
        return outcomes

    def evaluate(self, base: Base, assignments: Sequence[TrainRequest]) -> list[tuple[float, float]]:
        """As in local training."""
        return self.local.evaluate(base, assignments)

    def with_rules(self, rules: Sequence[LocalRule]) -> "SlicedTraining":
        """The same with rules in its local training."""
        return replace(self, local=self.local.with_rules(rules))

    def step_tokens(self, rows: Sequence[Example]) -> int:
        """As many as in local training."""
        return self.local.step_tokens(rows)

    @property
    def other_than_sgd(self) -> str | None:
        """As in local training."""
        return self.local.other_than_sgd

    @property
    def micro_tokens(self) -> int | None:
        """As in local training."""
        return self.local.micro_tokens


class Channel:
    """Authenticated encryption between the two slices, by a key of its own; counts the bytes of each way.

    Args:
        name: whose channel it is, which each message is bound to.
    """

    def __init__(self, name: str) -> None:
        # Not from the run's seed: a key that can be computed is none, and no result depends on it.
        self._cipher = AESGCM(AESGCM.generate_key(bit_length=256))
        self._name, self._count, self._lock = name, itertools.count(), threading.Lock()
        self.bytes = {"up": 0, "down": 0}

    def send(self, tensor: Tensor, way: str) -> Tensor:
        """The tensor as it comes out at the other end, the same bits in memory of their own."""
        return self.receive(self.sealed(tensor, way), tensor, way)

    def sealed(self, tensor: Tensor, way: str) -> bytes:
        """The message: a nonce that is never used twice, the encrypted numbers, and a tag."""
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        nonce = next(self._count).to_bytes(NONCE, "big")
        message = nonce + self._cipher.encrypt(nonce, plain, self._bound(way))
        with self._lock:
            self.bytes[way] += len(message)
        return message

    def receive(self, message: bytes, like: Tensor, way: str) -> Tensor:
        """The tensor of a message, of a known shape and dtype.

        Raises:
            cryptography.exceptions.InvalidTag: the message is not as it was sent, or went the other way.
        """
        plain = self._cipher.decrypt(message[:NONCE], message[NONCE:], self._bound(way))
        numbers = torch.frombuffer(bytearray(plain), dtype=like.dtype)
        return numbers.view(like.shape).to(like.device)

    def _bound(self, way: str) -> bytes:
        return f"{self._name}/{way}".encode()


class Cut:
    """A model whose hidden states go over a channel after some layer, for use in a `with` block.

    Args:
        base: the model.
        after: how many layers come before the cut.
        channel: what goes over it.
    """

    def __init__(self, base: Base, after: int, channel: Channel) -> None:
        layers = layers_of(base)
        if not after < len(layers):
            raise ModelError(
                f"client.cut: '{base.path}' has {len(layers)} layers, expected 1 to {len(layers) - 1} "
                f"of them at the client, got {after}"
            )
        self._layer, self._channel = layers[after - 1], channel
        self._tokens, self._lock = 0, threading.Lock()
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def __enter__(self) -> Self:
        self._handle = self._layer.register_forward_hook(self._cross)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.remove()

    def metrics(self) -> dict[str, float]:
        """Bytes up and down, and of both a token, padding included."""
        up, down = (float(self._channel.bytes[way]) for way in ("up", "down"))
        a_token = (up + down) / max(1, self._tokens)
        return {"cut_bytes_up": up, "cut_bytes_down": down, "cut_bytes_per_token": a_token}

    def _cross(self, layer: nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        with self._lock:
            self._tokens += states.shape[:-1].numel()
        crossed = _Crossing.apply(states, self._channel)  # type: ignore[no-untyped-call]
        return (crossed, *output[1:]) if isinstance(output, tuple) else crossed


class _Crossing(torch.autograd.Function):
    """The identity, by way of the channel: the states up, their gradients down."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, channel: Channel) -> Tensor:
        ctx.channel = channel
        return channel.send(states, "up")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.channel.send(grads[0], "down"), None


def layers_of(base: Base) -> nn.ModuleList:
    """The model's transformer layers, in their order.

    Raises:
        ModelError: it keeps them where nobody looked.
    """
    for path in LAYERS:
        try:
            found = base.model.base_model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return found
    raise ModelError(
        f"client=sliced cannot find the layers of '{base.path}' ({type(base.model).__name__}): expected a "
        f"list of them at one of {', '.join(LAYERS)}; use client=local"
    )
