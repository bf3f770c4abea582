"""The rows that a configuration names, and whose they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedlora.config.instantiate import make
from fedlora.data import Dataset, Example, Kind, Part, Row, encode, partition
from fedlora.data.dataset import hold_out
from fedlora.errors import ConfigError
from fedlora.models import Base

HELD_OUT = "fedlora.data.files.held_out"  # what data=sites makes; its name could be that of anybody's folder
VALIDATION = 500  # rows that are cut from the training rows at most; a fifth of them if that is less


def at_sites(config: DictConfig) -> bool:
    """Whether the training rows are at other sites, so that here are test rows alone (data=sites)."""
    return bool(OmegaConf.select(config, "data.source._target_") == HELD_OUT)


def load_dataset(config: DictConfig) -> Dataset:
    """Training rows, and those to evaluate on: the test rows, or a validation part of the training rows.

    Raises:
        FedLoraError: the rows cannot be used, or there are none to cut a validation part from.
    """
    dataset: Dataset = make(config, "data.source", Dataset)
    if config.evaluate.rows == "test":
        return dataset
    if config.evaluate.rows != "validation":
        raise ConfigError(f"evaluate.rows: expected test or validation, got '{config.evaluate.rows}'")
    if not dataset.train:
        raise ConfigError(
            "evaluate.rows=validation: the training rows are at the sites; say evaluate.rows=test"
        )
    kept, held = hold_out(dataset.train, dataset.kind, VALIDATION, config.seed)
    return replace(dataset, train=tuple(kept), test=tuple(held), cut=True)


def partition_rows(config: DictConfig, dataset: Dataset) -> list[Part]:
    """The training rows dealt to clients, as the configuration says."""
    d = config.data
    how = (d.partition, config.clients, d.alpha, d.shards, d.min_rows, d.max_rows, config.seed)
    return partition(dataset.train, *how, kind=dataset.kind)


def metrics(kind: Kind, loss: float, right: float) -> dict[str, float]:
    """Loss and share of right answers as the metrics of what is trained for."""
    if kind == "classification":
        return {"loss": loss, "accuracy": right}
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": right}


@dataclass(frozen=True)
class _Tokenizer:
    """A tokenizer, the same as any other that was loaded from there."""

    path: str
    itself: Any = field(compare=False)


def encode_rows(config: DictConfig, dataset: Dataset, rows: Sequence[Row], base: Base) -> Sequence[Example]:
    """The tokens of some of a data set's rows; the jobs of a process share those of equal rows.

    Nobody writes to what is shared. Other rows of another seed are other rows: tokens are kept of the last
    training and test rows only, since a large set's take gigabytes and a small one's a tenth of a second.
    """
    tokenizer = _Tokenizer(base.path, base.tokenizer)
    examples = _encoded(dataset.kind, tuple(rows), dataset.labels, tokenizer, config.data.max_length)
    base.check_lengths(examples)
    return examples


@lru_cache(maxsize=2)
def _encoded(
    kind: Kind, rows: tuple[Row, ...], labels: tuple[str, ...], tokenizer: _Tokenizer, max_length: int
) -> Sequence[Example]:
    return encode(kind, rows, labels, tokenizer.itself, max_length)
