"""Initial adapters that are taken out of the base's own weights, so that training begins on what they do.

PiSSA: Meng, Wang, Zhang. "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
Models". NeurIPS 2024. https://arxiv.org/abs/2404.02948

    W = U S Vᵀ,    B = U_{:r} (S_{:r} / s)^½,    A = (S_{:r} / s)^½ V_{:r}ᵀ

OLoRA: Büyükakyüz. "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models". 2024.
https://arxiv.org/abs/2406.01775

    W = Q R,    B = Q_{:,:r},    A = R_{:r}

The base then works as W − s B A, which here is W itself with a base delta of −s B A: the model begins as it
was, and clients of any start share one base.
"""

import zlib
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import negative, pad_orthonormal
from fedlora.core.threads import one_thread
from fedlora.errors import ConfigError
from fedlora.models.base import Base
from fedlora.models.experts import layer_at
from fedlora.models.lora import layer_weight
from fedlora.seeds import generator

STARTS = ("lora", "pissa", "olora")


def take_out_of_base(
    base: Base, adapter: Adapter, init: str, seed: int = 0
) -> tuple[Adapter, dict[str, Pair]]:
    """The adapter with its pairs along the base's weights, and the base delta that takes them out.

    Args:
        base: the model.
        adapter: whose modules, ranks, scales and extras to take, such as a fresh one.
        init: "pissa" or "olora"; "lora" leaves the adapter as it is, with nothing to take out.
        seed: of the directions beyond min(d_out, d_in), where B = 0.

    Raises:
        ConfigError: no such start.
        ModelError: a weight that is no plain matrix of floats, such as a quantised one.
    """
    if init not in STARTS:
        raise ConfigError(f"lora.init: expected {', '.join(STARTS[:-1])} or {STARTS[-1]}, got '{init}'")
    if init == "lora":
        return adapter, {}
    pairs = {}
    for name, old in adapter.pairs.items():
        weight = layer_weight(layer_at(base.model, name), name).double().cpu()
        B, A = _principal(weight, old) if init == "pissa" else _orthonormal(weight, old)
        pair = Pair(A.to(old.A.dtype).contiguous(), B.to(old.B.dtype).contiguous(), old.scale)
        pairs[name] = pad_orthonormal(pair, old.rank, generator(seed, "adapter", zlib.crc32(name.encode())))
    return replace(adapter, pairs=pairs), {name: negative(pair) for name, pair in pairs.items()}


@one_thread()
def _principal(weight: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[: pair.rank] / pair.scale).sqrt()
    return U[:, : pair.rank] * root, root[:, None] * Vh[: pair.rank]


@one_thread()
def _orthonormal(weight: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(weight)
    return Q[:, : pair.rank], R[: pair.rank]
