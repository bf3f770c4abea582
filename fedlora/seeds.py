"""Every random choice comes from (seed, purpose, client, round), never from global state.

Two choices with different keys are independent; the same key gives the same numbers on every machine and for
every order of execution, so that a client trains alike in any group, process or engine.
"""

import zlib

import numpy as np


def generator(seed: int, purpose: str, client: int = 0, round: int = 0) -> np.random.Generator:
    """A generator for one purpose ("partition", "sample", "batches", ...) of one client in one round.

    Args:
        seed: the run's seed, any non-negative integer.
        purpose: what the numbers are for; hashed (CRC-32) into the key.
        client: the client's id, 0 for choices of the server.
        round: the round, 0 for choices made once a run.
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), client, round])
