"""Data sets, their partition into clients, and their encoding; loaders are `packaged`, `files` and `hub`."""

from fedlora.data.cells import text_in
from fedlora.data.dataset import Dataset, Row
from fedlora.data.examples import Batch, Example, collate
from fedlora.data.partition import Part, partition

__all__ = ["Batch", "Dataset", "Example", "Part", "Row", "collate", "partition", "text_in"]
