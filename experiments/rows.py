"""The rows that a configuration names, and whose they are."""

from dataclasses import replace

from omegaconf import DictConfig

from fedlora.data import Dataset, Part, partition
from fedlora.data.dataset import hold_out
from fedlora.errors import ConfigError

from .targets import make

VALIDATION = 500  # rows that are cut from the training rows at most; a fifth of them if that is less


def dataset_of(config: DictConfig) -> Dataset:
    """Training rows, and those to evaluate on: the test rows, or a validation part of the training rows.

    Raises:
        FedLoraError: the rows cannot be used, or there are none to cut a validation part from.
    """
    dataset: Dataset = make(config, "data.source")
    if config.evaluate.rows == "test":
        return dataset
    if config.evaluate.rows != "validation":
        raise ConfigError(f"evaluate.rows: expected test or validation, got '{config.evaluate.rows}'")
    if not dataset.train:
        raise ConfigError("evaluate.rows=validation: the training rows are at the sites; say evaluate.rows=test")
    kept, held = hold_out(dataset.train, dataset.kind, VALIDATION, config.seed)
    return replace(dataset, train=tuple(kept), test=tuple(held))


def deal(config: DictConfig, dataset: Dataset) -> list[Part]:
    """The training rows dealt to clients, as the configuration says."""
    d = config.data
    how = (d.partition, config.clients, d.alpha, d.shards, d.min_rows, d.max_rows, config.seed)
    return partition(dataset.train, *how, kind=dataset.kind)
