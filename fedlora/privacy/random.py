"""Cryptographic random numbers: AES-256 in counter mode with a key from the operating system.

An attacker who knows or guesses the seed of a generator can subtract its noise, and torch's CPU generators
use 32 bits of a seed only. The noise and the batches of private training therefore come from this module and
do not depend on the run's seed.
"""

import hashlib
import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from torch import Tensor

from fedlora.models.pack import upload

PAIRS = 8192  # normals are made in pairs, this many at a time, which fit into the cache
BLOCKS = 256  # and so many times as many on a GPU: 34 MB of random bits


class Source:
    """A stream of random numbers with its own key; only one thread may use it at a time.

    Args:
        insecure_test_seed: makes the stream repeatable, for tests. Such numbers give no privacy.
    """

    def __init__(self, insecure_test_seed: str | None = None) -> None:
        key = os.urandom(32)
        if insecure_test_seed is not None:
            key = hashlib.sha256(f"fedlora insecure test seed {insecure_test_seed}".encode()).digest()
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def uniforms(self, count: int) -> Tensor:
        """Uniform numbers above 0 and at most 1 with 53 random bits, (count,), float64."""
        return _uniforms(_Bits(count).draw(self._stream), torch.empty(count, dtype=torch.float64))

    def normals(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal numbers (Box and Muller, 1958), (count,), float64.

        Args:
            count: how many.
            device: where they are wanted. The random bits are the CPU's wherever that is; what is made of
                them is computed there, and a GPU rounds it otherwise.
        """
        if not count:
            return torch.empty(0, dtype=torch.float64, device=device)
        found = torch.empty(math.ceil(count / (2 * PAIRS)), 2, PAIRS, dtype=torch.float64, device=device)
        blocks = torch.split(found, 1 if found.device.type == "cpu" else BLOCKS)
        bits, u = _Bits(blocks[0].numel()), torch.empty_like(blocks[0])  # once: new memory is slow
        for block in blocks:
            drawn = upload(bits.draw(self._stream, block.numel()), found.device)
            radius, angle = _uniforms(drawn.view_as(block), u[: len(block)]).unbind(1)
            radius.log_().mul_(-2).sqrt_()
            angle.mul_(2 * math.pi)
            torch.cos(angle, out=block[:, 0]).mul_(radius)
            torch.sin(angle, out=block[:, 1]).mul_(radius)
        return found.view(-1)[:count]

    def chosen(self, count: int, rate: float) -> list[int]:
        """A Poisson sample: each index below `count` is included with probability `rate`, independently."""
        drawn: list[int] = np.flatnonzero(self.uniforms(count).numpy() <= rate).tolist() if count else []
        return drawn


class _Bits:
    """Random bits of a stream, drawn into the same memory again and again.

    Args:
        count: how many numbers of 64 bits at most.
    """

    def __init__(self, count: int) -> None:
        self._zeros, self._data = bytes(8 * count), bytearray(8 * count + 15)  # the cipher wants the room
        self._numbers = torch.frombuffer(self._data, dtype=torch.int64, count=count)

    def draw(self, stream: CipherContext, count: int | None = None) -> Tensor:
        """The stream's next numbers, (count,), int64; until the next draw."""
        found = self._numbers[:count]
        stream.update_into(memoryview(self._zeros)[: 8 * len(found)], self._data)
        return found


def _uniforms(bits: Tensor, out: Tensor) -> Tensor:
    """What `Source.uniforms` says, of bits that are lost by it, in the shape and the place of `out`."""
    # A shift by half a step excludes 0, whose logarithm would give an infinite normal. It is added last,
    # because float64 can represent it there.
    return out.copy_(bits.bitwise_right_shift_(11)).add_(2.0**52).mul_(2.0**-53).add_(2.0**-54)
