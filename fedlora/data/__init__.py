"""Data sets, their partition into clients, and their encoding; loaders are `packaged`, `files` and `hub`."""

from fedlora.data.dataset import Dataset, Kind, Row
from fedlora.data.encode import Batch, Example, collate, encode
from fedlora.data.partition import Part, partition

__all__ = ["Batch", "Dataset", "Example", "Kind", "Part", "Row", "collate", "encode", "partition"]
