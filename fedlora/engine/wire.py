"""Tasks and updates as Flower records, and back; what comes from a client is checked here.

A record holds the tensors under their names (`module.A`, `module.B`, the extras) and, beside them, one scale
a module in the order of the modules' names. Factors that a strategy does not share are never sent.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedlora.adapter import Adapter, Pair
from fedlora.client import Outcome
from fedlora.errors import IncompatibleUpdates
from fedlora.protocol import Peer, Task, Update

MOST_EXAMPLES = 1e12  # more rows than any client has; sums of such weights stay exact enough
HEADER = 1024  # bytes that an array's own header may take
LARGEST = 1e6  # a trained tensor's norm beyond this is a diverged or hostile client, never a useful update


def write_task(task: Task, round: int, seed: int) -> RecordDict:
    """What the server sends: the adapter, what to train and share, the round and the seed."""
    config = ConfigRecord()
    config["round"], config["seed"] = round, seed
    config["train"], config["share"] = "".join(sorted(task.train)), "".join(sorted(task.share))
    config.update(_scales(task.adapter))
    return RecordDict({"arrays": _arrays(task.adapter, "AB"), "config": config})


def read_task(content: RecordDict) -> tuple[Task, int, int]:
    """The task, the round and the seed that `write_task` wrote."""
    config = content.config_records["config"]
    adapter = _adapter(content.array_records["arrays"], config.get("scales", []))  # type: ignore[arg-type]
    task = Task(adapter, frozenset(str(config["train"])), frozenset(str(config["share"])))
    return task, int(config["round"]), int(config["seed"])  # type: ignore[arg-type]


def write_update(outcome: Outcome, task: Task, round: int, examples: int) -> RecordDict:
    """What a client sends: the shared factors, the extras, its number of rows and its metrics."""
    metrics = {name: float(value) for name, value in outcome.metrics.items()}
    numbers = MetricRecord({"num-examples": examples, "round": round, **metrics})
    arrays = _arrays(outcome.adapter, task.share)
    records = {"arrays": arrays, "metrics": numbers, "config": _scales(outcome.adapter)}
    return RecordDict(records)  # type: ignore[arg-type]


def read_update(reply: Message, task: Task, peer: Peer, round: int) -> Update:
    """Check a reply against the task that was sent, and complete it with the factors that stayed.

    Raises:
        IncompatibleUpdates: the client failed, or sent another round, other names, shapes, ranks, scales or
            dtypes, numbers that are not finite or absurdly large, or a number of rows that is none. The
            message says what and where; the caller knows who.
    """
    if reply.has_error():
        raise IncompatibleUpdates(f"the client failed: {reply.error.reason}")
    try:
        arrays = reply.content.array_records["arrays"]
        numbers = dict(reply.content.metric_records["metrics"])
        scales = reply.content.config_records["config"].get("scales", [])
    except KeyError as error:
        raise IncompatibleUpdates(f"the reply lacks the record {error}") from error
    if numbers.get("round") != round:
        raise IncompatibleUpdates(f"the reply belongs to round {numbers.get('round')}, expected {round}")
    weight = numbers.pop("num-examples", None)
    if not isinstance(weight, int | float) or not 1 <= weight <= MOST_EXAMPLES:
        raise IncompatibleUpdates(
            f"expected a number of examples from 1 to {MOST_EXAMPLES:.0e}, got {weight!s:.20}"
        )
    expected = dict(_named(task.adapter, task.share))
    if expected.keys() != arrays.keys():
        missing, unknown = sorted(expected.keys() - arrays.keys()), sorted(arrays.keys() - expected.keys())
        raise IncompatibleUpdates(f"wrong tensors: missing {missing[:3]}, unknown {unknown[:3]}")
    if scales != [pair.scale for pair in task.adapter.pairs.values()]:
        raise IncompatibleUpdates("the scales differ from those that were sent")
    found = {name: _checked(name, arrays[name], want) for name, want in expected.items()}
    pairs = {
        name: Pair(found.get(f"{name}.A", pair.A), found.get(f"{name}.B", pair.B), pair.scale)
        for name, pair in task.adapter.pairs.items()
    }
    adapter = Adapter(pairs, {name: found[name] for name in task.adapter.extra})
    metrics = {
        name: float(value)
        for name, value in numbers.items()
        if name != "round" and isinstance(value, int | float) and abs(value) < 1e300
    }
    return Update(adapter, float(weight), peer, metrics)


def size(content: RecordDict) -> int:
    """Bytes of the records of one message, names included."""
    return sum(_count(record) for record in content.values())


def _count(record: Any) -> int:
    if isinstance(record, ArrayRecord):
        return record.count_bytes()
    # Flower fails on an empty list, which a client may send; its name counts.
    full = {name: value for name, value in record.items() if value != []}
    return int(type(record)(full).count_bytes()) + sum(len(name) for name in record if name not in full)


def _checked(name: str, array: Array, want: Tensor) -> Tensor:
    """The tensor of an array, which must be like the one that was sent."""
    kind = str(want.dtype).removeprefix("torch.")
    if tuple(array.shape) != tuple(want.shape) or array.dtype != kind:
        raise IncompatibleUpdates(
            f"'{name}': expected {kind} {tuple(want.shape)}, got {array.dtype} {tuple(array.shape)}"
        )
    # np.load would open a zip archive, and allocate whatever a header asks for.
    if not array.data.startswith(b"\x93NUMPY") or len(array.data) > want.nbytes + HEADER:
        raise IncompatibleUpdates(f"'{name}': its bytes are no array of {want.nbytes} bytes")
    try:
        value = torch.from_numpy(array.numpy().copy())
    except Exception as error:  # numpy raises a dozen kinds over hostile bytes, MemoryError among them
        raise IncompatibleUpdates(f"'{name}': its bytes are no array: {error}") from error
    if tuple(value.shape) != tuple(want.shape) or value.dtype != want.dtype:
        raise IncompatibleUpdates(
            f"'{name}': said {kind} {tuple(want.shape)}, holds {value.dtype} {tuple(value.shape)}"
        )
    length = float(value.double().norm())
    if not length <= LARGEST:
        what = f"a norm of {length:.3g}" if math.isfinite(length) else "numbers that are not finite"
        raise IncompatibleUpdates(f"'{name}' has {what}; expected a norm of at most {LARGEST:.0e}")
    return value


def _named(adapter: Adapter, factors: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
    for name, pair in adapter.pairs.items():
        for factor in sorted(factors):
            yield f"{name}.{factor}", pair.A if factor == "A" else pair.B
    yield from adapter.extra.items()


def _scales(adapter: Adapter) -> ConfigRecord:
    scales = [pair.scale for pair in adapter.pairs.values()]
    return ConfigRecord({"scales": scales} if scales else {})


def _arrays(adapter: Adapter, factors: Iterable[str]) -> ArrayRecord:
    return ArrayRecord({name: Array(t.cpu().contiguous().numpy()) for name, t in _named(adapter, factors)})


def _adapter(arrays: ArrayRecord, scales: list[float]) -> Adapter:
    tensors = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
    modules = sorted(name[:-2] for name in tensors if name.endswith(".A"))
    pairs = {
        name: Pair(tensors.pop(f"{name}.A"), tensors.pop(f"{name}.B"), scale)
        for name, scale in zip(modules, scales, strict=True)
    }
    return Adapter(pairs, tensors)
