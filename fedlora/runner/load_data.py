"""The rows of a run, and whose they are."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from fedlora.data import Dataset, Example, Part, Row, partition
from fedlora.data.dataset import hold_out
from fedlora.errors import ConfigError, DataError
from fedlora.models import Base
from fedlora.seeds import generator
from fedlora.tasks import LearningTask

from .spec import RunSpec
from .spec_parts import DataSpec, Partitioner

VALIDATION = 500  # rows that are cut from the training rows at most; a fifth of them if that is less


def load_dataset(spec: RunSpec) -> Dataset:
    """Training rows, and those to evaluate on: the test rows, or a validation part of the training rows.

    Raises:
        FedLoraError: the rows cannot be used, or there are none to cut a validation part from.
    """
    dataset = spec.data.source()
    if spec.evaluate.rows == "test":
        return dataset
    if not dataset.train:
        raise ConfigError(
            "evaluate.rows=validation: the training rows are at the sites; say evaluate.rows=test"
        )
    kept, held = hold_out(dataset.train, dataset.task, VALIDATION, spec.seed)
    return replace(dataset, train=tuple(kept), test=tuple(held), cut=True)


def partition_rows(data: DataSpec, dataset: Dataset, clients: int | None, seed: int) -> list[Part]:
    """The training rows dealt to clients, as the specification says.

    Raises:
        FedLoraError: no such partition, or one that these rows do not have.
    """
    if not isinstance(data.partition, str):
        return _own_partition(data.partition, dataset, clients, seed)
    how = (data.partition, clients, data.alpha, data.shards, data.min_rows, data.max_rows, seed)
    return partition(dataset.train, *how, group=dataset.task.group)


def _own_partition(how: Partitioner, dataset: Dataset, clients: int | None, seed: int) -> list[Part]:
    """The parts that a function of the user's makes, checked: positions of rows, each in one part at most."""
    made = [np.asarray(part) for part in how(dataset.train, clients, generator(seed, "partition"))]
    for part in made:
        if part.ndim != 1 or (len(part) and not np.issubdtype(part.dtype, np.integer)):
            raise DataError(
                f"data.partition: expected whole numbers in each part, the positions of its rows, got one "
                f"of shape {part.shape} of {part.dtype}"
            )
    every = np.concatenate(made) if made else np.zeros(0, np.int64)
    inside = bool(((every >= 0) & (every < len(dataset.train))).all())
    if not made or not all(len(part) for part in made) or not inside or len(set(every)) < len(every):
        raise DataError(
            f"data.partition: expected parts of at least one row, each a position from 0 to "
            f"{len(dataset.train) - 1} in one part at most; '{getattr(how, '__name__', how)}' made others"
        )
    if clients is not None and len(made) != clients:
        warnings.warn(
            f"data.partition: of {clients} clients {len(made)} got a part, so this run has {len(made)}",
            stacklevel=2,
        )
    width = len(str(len(made) - 1))
    return [Part(f"client-{i:0{width}}", part.astype(np.int64)) for i, part in enumerate(made)]


@dataclass(frozen=True)
class _Tokenizer:
    """A tokenizer, the same as any other that was loaded from there."""

    path: str
    itself: Any = field(compare=False)


def encode_rows(max_length: int, dataset: Dataset, rows: Sequence[Row], base: Base) -> Sequence[Example]:
    """The tokens of some of a data set's rows; the runs of a process share those of equal rows.

    Nobody writes to what is shared. Other rows of another seed are other rows: tokens are kept of the last
    training and test rows only, since a large set's take gigabytes and a small one's a tenth of a second.
    """
    tokenizer = _Tokenizer(base.path or str(id(base.tokenizer)), base.tokenizer)
    examples = _encoded(dataset.task, tuple(rows), dataset.labels, tokenizer, max_length)
    base.check_lengths(examples)
    return examples


@lru_cache(maxsize=2)
def _encoded(
    task: LearningTask, rows: tuple[Row, ...], labels: tuple[str, ...], tokenizer: _Tokenizer, max_length: int
) -> Sequence[Example]:
    return task.encode(rows, labels, tokenizer.itself, max_length)
