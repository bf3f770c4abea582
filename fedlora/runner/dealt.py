"""What is known of a run once its rows are dealt to clients."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.data import Dataset

from .spec import RunSpec


@dataclass(frozen=True)
class Dealt:
    """What is known once the rows are dealt.

    Args:
        spec: the run.
        dataset: its rows.
        clients: how many clients there are.
        ranks: theirs.
        apart: whether the clients share an adapter that is no part of the model; None before it is loaded.
    """

    spec: RunSpec
    dataset: Dataset
    clients: int
    ranks: Sequence[int]
    apart: bool | None = None
