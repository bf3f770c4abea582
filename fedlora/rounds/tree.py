"""The tree of a run: which clients are below which edge, and what travels between edges and the server.

A tree [4, 8] is read from the server down: the server has 4 edges, each edge has 8 clients. In [2, 4, 8] the
server has 2 edges, each of them 4 edges, and each of those 8 clients. All levels but the last are edges; the
clients are dealt to them evenly, in the order of their ids, and stay there for the whole run.

A message to an edge holds what all clients below it are sent, each tensor and each record once. A message
from an edge holds one update, which stands for its clients (`fedlora.core.bundle`).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlora.core.adapter import Pair
from fedlora.core.messages import Peer, Task, Update
from fedlora.errors import IncompatibleUpdates
from fedlora.rounds.codec import array_of
from fedlora.secure_aggregation.crypto import Words

Path = tuple[int, ...]  # of an edge: its number below the server, below that edge, and so on
T = TypeVar("T")


@dataclass(frozen=True)
class Tree:
    """The edges between the server and its clients.

    Args:
        fans: how many the server has below it, each edge of the first level, and so on to the clients.
        clients: how many there are, numbered from 0.
    """

    fans: tuple[int, ...]
    clients: int

    @property
    def levels(self) -> int:
        """How many levels of edges there are; 0 where the server talks to the clients itself."""
        return len(self.fans) - 1

    def edge(self, client: int) -> Path:
        """The edge that a client talks to: its path from the server."""
        path, first, last = [], 0, self.clients
        for fan in self.fans[:-1]:
            size = last - first  # of which part i has those from ⌊size · i / fan⌋ on
            at = ((client - first + 1) * fan - 1) // size
            first, last = first + size * at // fan, first + size * (at + 1) // fan
            path.append(at)
        return tuple(path)


def called(path: Path) -> str:
    """An edge's name in messages: "edge 0.3" is the fourth below the first."""
    return f"edge {'.'.join(map(str, path))}"


def below(items: Sequence[T], edge_of: Callable[[T], Path], level: int) -> list[tuple[Path, list[T]]]:
    """What belongs to each edge of a level, in the order of the edges; an edge without anything is left out.

    Args:
        items: in the order of their edges.
        edge_of: gives the path of an item's edge.
        level: 0 for the edges of the server.
    """
    return [(path, list(part)) for path, part in groupby(items, key=lambda item: edge_of(item)[: level + 1])]


def write_tasks(contents: Mapping[int, RecordDict]) -> RecordDict:
    """What an edge is sent for its clients, every tensor and every record once.

    Args:
        contents: node -> the records of its message.
    """
    numbers: dict[str, str] = {}  # digest -> its number, which is shorter than the names of small tensors
    arrays: dict[str, Array] = {}
    records: dict[str, Any] = {}
    forms: dict[str, list[int]] = {}

    def number(data: bytes) -> str:
        return numbers.setdefault(hashlib.sha256(data).hexdigest(), str(len(numbers)))

    for node, content in contents.items():
        form: dict[str, Any] = {}
        for name, record in content.items():
            if isinstance(record, ArrayRecord):
                form[name] = {key: number(array.data) for key, array in record.items()}
                arrays |= {form[name][key]: array for key, array in record.items()}
            else:
                assert isinstance(record, ConfigRecord), "a task has no metrics"
                form[name] = number(repr(sorted(record.items())).encode())
                records[form[name]] = record
        forms.setdefault(json.dumps(form, separators=(",", ":")), []).append(node)
    return RecordDict({"arrays": ArrayRecord(arrays), "forms": ConfigRecord(dict(forms)), **records})


def read_tasks(content: RecordDict) -> dict[int, RecordDict]:
    """Node -> the records of its message, as `write_tasks` was given them."""
    arrays, found = content.array_records["arrays"], dict[int, RecordDict]()
    for form, nodes in content.config_records["forms"].items():
        for node in nodes:  # type: ignore[union-attr]
            found[int(node)] = RecordDict(
                {
                    name: ArrayRecord({key: arrays[number] for key, number in part.items()})
                    if isinstance(part, dict)
                    else ConfigRecord(dict(content.config_records[part]))
                    for name, part in json.loads(form).items()
                }
            )
    return dict(sorted(found.items()))


def write_sum(update: Update, names: Sequence[str]) -> RecordDict:
    """What an edge forwards: tensors of the update that stands for its clients, and its weight.

    Args:
        update: what `bundle` has made.
        names: the tensors that are its own, as `fedlora.core.bundle.forwarded` names them.
    """
    tensors = dict(update.adapter.tensors())
    arrays = ArrayRecord({name: Array(tensors[name].cpu().contiguous().numpy()) for name in names})
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"weight": update.weight})})


def read_sum(content: RecordDict, wide: Task, names: Sequence[str], peer: Peer, version: int) -> Update:
    """The update that an edge has forwarded.

    Args:
        content: what came.
        wide: the task of a client of the largest ranks, of which all is taken that is not sent.
        names: the tensors that are sent.
        peer: who sent it.
        version: the `State.round` of the state that it answers to.

    Raises:
        IncompatibleUpdates: other tensors, shapes or dtypes than the task has, apart from the rank; numbers
            that are not finite; or no weight.
    """
    arrays, like = content.array_records["arrays"], dict(wide.adapter.tensors())
    weight = content.metric_records["metrics"].get("weight")
    if not (isinstance(weight, int | float) and 0 <= weight < float("inf")):
        raise IncompatibleUpdates(f"expected a sum of weights, got {weight!s:.20}")
    if {*arrays} != {*names}:
        raise IncompatibleUpdates(f"expected the tensors {sorted(names)[:3]}, got {sorted(arrays)[:3]}")
    found = {}
    for name, array in arrays.items():
        want, shape = like[name], list(like[name].shape)
        module, _, factor = name.rpartition(".")
        if module in wide.adapter.pairs and len(array.shape) == 2:  # of any rank that its clients have
            at, side = int(factor == "B"), min(wide.adapter.pairs[module].shape)
            shape[at] = min(array.shape[at], want.shape[at] + side)
        value = array_of(name, array, str(want.dtype).removeprefix("torch."), tuple(shape))
        found[name] = torch.from_numpy(value)
    scales = {module: pair.scale for module, pair in wide.adapter.pairs.items()}
    pairs = {
        module: Pair(found.get(f"{module}.A", pair.A), found.get(f"{module}.B", pair.B), scales[module])
        for module, pair in wide.adapter.pairs.items()
    }
    extra = {name: found.get(name, tensor) for name, tensor in wide.adapter.extra.items()}
    adapter = replace(wide.adapter, pairs=pairs, extra=extra)
    return Update(adapter, float(weight), peer, version=version, several=True)


def write_report(lines: Sequence[Mapping[str, Any]]) -> RecordDict:
    """What an edge says of its clients: their lines of clients.jsonl."""
    return RecordDict({"clients": ConfigRecord({"lines": json.dumps(list(lines))})})


def write_masked_sum(total: Words, nodes: Sequence[int]) -> RecordDict:
    """What an edge forwards of masked vectors: their sum mod 2^64, with the masks still on it.

    Args:
        total: uint64, (length,).
        nodes: those whose vectors are in the sum.
    """
    arrays = ArrayRecord({"masked": Array(total)})
    return RecordDict({"arrays": arrays, "members": ConfigRecord({"nodes": list(nodes)})})


def read_masked_sum(content: RecordDict, length: int) -> Words:
    """The sum that an edge has forwarded.

    Raises:
        IncompatibleUpdates: it is no vector of this length.
    """
    found: Words = array_of("masked", content.array_records["arrays"]["masked"], "uint64", (length,))
    return found
