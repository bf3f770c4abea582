"""Random numbers that nobody can repeat: AES-256 in counter mode, keyed by the operating system.

Noise of a generator with a known or guessable seed can be taken off again, and torch's CPU generators keep 32
bits of any seed. So noise and batches of private training come from here, and from no seed of the run.
"""

import hashlib
import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

PAIRS = 8192  # normals are made in pairs, so many at a time: their numbers stay in the cache


class Source:
    """A stream of random numbers with a key of its own; for one thread at a time.

    Args:
        insecure_test_seed: makes the stream repeatable, for tests; what is drawn then protects nobody.
    """

    def __init__(self, insecure_test_seed: str | None = None) -> None:
        key = os.urandom(32)
        if insecure_test_seed is not None:
            key = hashlib.sha256(f"fedlora insecure test seed {insecure_test_seed}".encode()).digest()
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def uniforms(self, count: int) -> Tensor:
        """So many numbers above 0 and at most 1, of 53 bits, in float64."""
        bits = torch.frombuffer(bytearray(self._stream.update(bytes(8 * count))), dtype=torch.int64)
        # Half a step off the grid, so that 0 never comes: its logarithm would be an infinite normal.
        # Added last, since next to 0 float64 can hold it.
        return (bits >> 11).double().add_(2.0**52).mul_(2.0**-53).add_(2.0**-54)

    def normals(self, count: int) -> Tensor:
        """So many standard normals in float64 (Box and Muller, 1958)."""
        rounds = math.ceil(count / (2 * PAIRS))
        found = torch.empty(rounds, 2, PAIRS, dtype=torch.float64)
        for pair in found:
            u = self.uniforms(2 * PAIRS)
            radius, angle = u[:PAIRS].log_().mul_(-2).sqrt_(), u[PAIRS:].mul_(2 * math.pi)
            torch.mul(radius, angle.cos(), out=pair[0])
            torch.mul(radius, angle.sin_(), out=pair[1])
        return found.view(-1)[:count]

    def chosen(self, count: int, rate: float) -> list[int]:
        """A Poisson batch: indices below `count`, each drawn by itself with probability `rate`."""
        drawn: list[int] = np.flatnonzero(self.uniforms(count).numpy() <= rate).tolist() if count else []
        return drawn
