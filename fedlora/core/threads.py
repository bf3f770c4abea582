"""Arithmetic by one thread.

A factorisation is a row of small steps. Threads that sleep between them (OMP_WAIT_POLICY=PASSIVE, which the
`fedlora` command sets) make a QR thirty times slower than one thread; threads that spin make two jobs on one
machine a hundred times slower.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it, or in a function that it decorates, torch computes by one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # MKL's setting is one for all threads
    try:
        yield
    finally:
        torch.set_num_threads(before)
