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
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

PAIRS = 8192  # normals are made in pairs, this many at a time, which fit into the cache


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
        bits = torch.frombuffer(bytearray(self._stream.update(bytes(8 * count))), dtype=torch.int64)
        # A shift by half a step excludes 0, whose logarithm would give an infinite normal. It is added last,
        # because float64 can represent it there.
        return (bits >> 11).double().add_(2.0**52).mul_(2.0**-53).add_(2.0**-54)

    def normals(self, count: int) -> Tensor:
        """Standard normal numbers (Box and Muller, 1958), (count,), float64."""
        rounds = math.ceil(count / (2 * PAIRS))
        found = torch.empty(rounds, 2, PAIRS, dtype=torch.float64)
        for pair in found:
            u = self.uniforms(2 * PAIRS)
            radius, angle = u[:PAIRS].log_().mul_(-2).sqrt_(), u[PAIRS:].mul_(2 * math.pi)
            torch.mul(radius, angle.cos(), out=pair[0])
            torch.mul(radius, angle.sin_(), out=pair[1])
        return found.view(-1)[:count]

    def chosen(self, count: int, rate: float) -> list[int]:
        """A Poisson sample: each index below `count` is included with probability `rate`, independently."""
        drawn: list[int] = np.flatnonzero(self.uniforms(count).numpy() <= rate).tolist() if count else []
        return drawn
