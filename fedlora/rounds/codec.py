"""Tasks and updates as Flower records, and back; what comes from a client is checked here.

A task is sent as it packs itself, without the tensors that the node already holds. An update is sent as its
shared tensors under their names (`module.A`, `module.B`, the extras), with one scale for each module in the
order of the names. What the parts of a task have clients send besides lies among them, under names such as
`0/NAME`, which no tensor of an adapter has.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedlora.core.adapter import Adapter, Pair, digest
from fedlora.core.base_delta import BaseDelta
from fedlora.core.messages import Peer, Task, Update
from fedlora.errors import CheckpointError, IncompatibleUpdates
from fedlora.storage.client_state import BASE_DELTA
from fedlora.training.client import TrainResult

MOST_EXAMPLES = 1e12  # more rows than any client has; sums of such weights stay exact enough
HEADER = 1024  # bytes that an array's own header may take
FAILED = 2  # flwr's error code for a ClientApp that raised
REFUSED = 1000  # code of the error with which a client replies that it must not train
MOST_METRICS = 64  # numbers that a client may report
LONGEST = 400  # characters of a client's own words that are worth repeating
RECORDS = {"arrays", "metrics", "config"}  # of an update
GAIN = "gain/"  # begins the name of a tensor of a base delta's increment
LARGEST = 1e6  # a trained tensor's norm beyond this is a diverged or hostile client, never a useful update


@dataclass(frozen=True)
class Held:
    """What the server knows that a node holds.

    Args:
        digests: tensor name -> its digest.
        version: of the state that the node's base delta comes from; None where it is not known.
    """

    digests: Mapping[str, str] = field(default_factory=dict)
    version: int | None = None


def write_task(
    task: Task, round: int, seed: int, held: Held | None = None, version: int | None = None
) -> tuple[RecordDict, Held]:
    """The records that the server sends for a task, and what the node holds once it has received them.

    A tensor is sent unless the node holds the same bits from the task before; it holds all tensors that it
    did not both train and share. Where a base delta has grown since the one that the node holds, only the
    increment is sent, if it is smaller.

    Args:
        task: the client's task.
        round: the round, from 1.
        seed: the run's.
        held: what the node holds.
        version: the state that the task comes from, a number that grows by one with each state.
    """
    held = held or Held()
    tensors, header = task.pack()
    of_base = _base_delta_digests(task)
    digests = {n: of_base[n] if n in of_base else _seal(tensor) for n, tensor in _kept(task).items()}
    missing = {name for name in digests if held.digests.get(name) != digests[name]}
    increment = Adapter(BaseDelta.of(task.base_delta).increment)
    gain = {f"{GAIN}{name}": tensor for name, tensor in increment.tensors()}
    base_delta = missing & of_base.keys()
    follows = None not in (version, held.version) and version == held.version + 1  # type: ignore[operator]
    grown = bool(follows and gain and _bytes(gain.values()) < _bytes(tensors[name] for name in base_delta))
    shared = tensors.keys() - digests.keys()
    still = {name for name in shared & held.digests.keys() if held.digests[name] == _seal(tensors[name])}
    # The node still has a factor that was frozen the last time.
    sent = {name: tensors[name] for name in (shared - still) | (missing - base_delta if grown else missing)}
    to = _digest_of_all(of_base) if grown else ""
    whole = _bytes(tensors.values())
    numbers = {"round": round, "seed": seed, "whole": whole, "version": -1 if version is None else version}
    config = ConfigRecord({**numbers, "task": header, "grown": to})
    arrays = ArrayRecord({n: _array(t) for n, t in sorted((sent | gain if grown else sent).items())})
    return RecordDict({"arrays": arrays, "config": config}), Held(digests, version)


def read_task(
    content: RecordDict, held: Mapping[str, Tensor] | None = None
) -> tuple[Task, int, int, dict[str, Tensor]]:
    """The task, the round and the seed that `write_task` wrote, and what the node now has to hold.

    Raises:
        CheckpointError: the server counts on tensors that this node does not hold, or the increment does
            not lead to the base delta that the server has.
        ConfigError: the task has a part of a class that this node has not imported.
    """
    config, arrays = content.config_records["config"], content.array_records["arrays"]
    tensors = dict(held or {}) | {n: torch.from_numpy(array.numpy().copy()) for n, array in arrays.items()}
    try:
        if config["grown"]:
            tensors |= _grown(tensors)
        task = Task.unpack(tensors, str(config["task"]))
    except KeyError as error:
        raise CheckpointError(f"this node was restarted and lacks {error}, which it held before") from error
    kept = _kept(task)
    if config["grown"] and config["grown"] != _digest_of_all(_base_delta_digests(task)):
        raise CheckpointError("this node was restarted: what it holds is not the base delta that has grown")
    return task, int(config["round"]), int(config["seed"]), kept  # type: ignore[arg-type]


def write_update(outcome: TrainResult, task: Task, round: int, examples: int) -> RecordDict:
    """What a client sends: the shared factors, the extras, what a method adds, its rows and its metrics."""
    metrics = {name: float(value) for name, value in outcome.metrics.items()}
    numbers = MetricRecord({"num-examples": examples, "round": round, **metrics})
    tensors = {**dict(outcome.adapter.tensors()), **outcome.sent}
    arrays = ArrayRecord({name: _array(tensors[name]) for name in [*task.shared(), *outcome.sent]})
    records = {"arrays": arrays, "metrics": numbers, "config": _scales(outcome.adapter)}
    return RecordDict(records)  # type: ignore[arg-type]


def read_update(reply: Message, task: Task, peer: Peer, round: int) -> Update:
    """Check a reply against the task that was sent, and complete it with the factors that stayed.

    Raises:
        IncompatibleUpdates: the client failed, or sent another round, other records, names, shapes, ranks,
            scales or dtypes, numbers that are not finite or absurdly large, or an invalid number of rows.
            The message says what and where; the caller adds the client.
    """
    numbers = numbers_of(reply, round)
    try:
        arrays = reply.content.array_records["arrays"]
        config = reply.content.config_records["config"]
    except KeyError as error:
        raise IncompatibleUpdates(f"the reply lacks the record {error}") from error
    if more := sorted({*reply.content} - RECORDS) + sorted({*config} - {"scales"}):
        raise IncompatibleUpdates(f"the reply has {_said(more)}, which nobody asked for")
    weight, scales = numbers.pop("num-examples", None), config.get("scales", [])
    if type(weight) not in (int, float) or not 1 <= weight <= MOST_EXAMPLES:
        raise IncompatibleUpdates(
            f"expected a number of examples from 1 to {MOST_EXAMPLES:.0e}, got {weight!s:.20}"
        )
    names, sent, beside = task.shared(), _answered(task, arrays), task.sent()
    expected = {*names, *beside}
    if expected != arrays.keys():
        missing, unknown = sorted(expected - arrays.keys()), sorted(arrays.keys() - expected)
        raise IncompatibleUpdates(f"wrong tensors: missing {missing[:3]}, unknown {_said(unknown[:3])}")
    if scales != [pair.scale for pair in sent.pairs.values()]:
        raise IncompatibleUpdates("the scales differ from those that were sent")
    wanted = dict(sent.tensors())
    found = {name: _checked(name, arrays[name], wanted[name]) for name in names}
    others = {name: _checked(name, arrays[name], like) for name, like in beside.items()}
    return Update(sent.with_tensors(found), float(weight), peer, metrics_of(numbers), sent=others)


def numbers_of(reply: Message, round: int) -> dict[str, Any]:
    """The numbers of a client's reply, which must be of this round.

    Raises:
        IncompatibleUpdates: the client failed or refused, or its reply is of another round or has no numbers.
    """
    if reply.has_error():
        what = "the client refused: " if reply.error.code == REFUSED else "the client failed: "
        raise IncompatibleUpdates(f"{what}{_said(reply.error.reason)}")
    if "metrics" not in reply.content.metric_records:
        raise IncompatibleUpdates("the reply lacks the record 'metrics'")
    numbers = dict(reply.content.metric_records["metrics"])
    if type(said := numbers.get("round")) is not int or said != round:
        raise IncompatibleUpdates(f"the reply belongs to round {_said(said)}, expected {round}")
    if len(numbers) > MOST_METRICS or any(len(name) > LONGEST for name in numbers):
        raise IncompatibleUpdates(
            f"the reply has {len(numbers)} metrics, expected {MOST_METRICS} of names up to {LONGEST} letters"
        )
    return numbers


def metrics_of(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Those of a reply's numbers that go into the logs."""
    return {
        name: float(value)
        for name, value in numbers.items()
        if name != "round" and isinstance(value, int | float) and abs(value) < 1e300
    }


def _said(words: object) -> str:
    """A client's own words in one line, cut to LONGEST characters and without control characters."""
    shown = "".join(c if c.isprintable() else " " for c in str(words)[: 2 * LONGEST])
    return " ".join(shown.split())[:LONGEST]


def size(content: RecordDict) -> int:
    """Bytes of the records of one message, names included."""
    return sum(_count(record) for record in content.values())


def _count(record: Any) -> int:
    if isinstance(record, ArrayRecord):
        return record.count_bytes()
    full, empty = record.copy(), [name for name, value in record.items() if value in ([], "", b"")]
    for name in empty:  # Flower fails on an empty list or string; their names count
        del full[name]
    return int(full.count_bytes()) + sum(len(name) for name in empty)


def array_of(name: str, array: Array, kind: str, shape: tuple[int, ...]) -> Any:
    """A copy of a client's array in numpy, which must have this dtype and shape.

    Raises:
        IncompatibleUpdates: it has another dtype or shape, or its bytes are no array.
    """
    if tuple(array.shape) != shape or array.dtype != kind:
        raise IncompatibleUpdates(
            f"'{name}': expected {kind} {shape}, got {_said(f'{array.dtype} {tuple(array.shape)}')}"
        )
    # np.load would open a zip archive, and allocate whatever a header asks for.
    most = math.prod(shape) * np.dtype(kind).itemsize
    if not array.data.startswith(b"\x93NUMPY") or len(array.data) > most + HEADER:
        raise IncompatibleUpdates(f"'{name}': its bytes are no array of {most} bytes")
    try:
        value = array.numpy().copy()
    except Exception as error:  # numpy raises a dozen kinds over hostile bytes, MemoryError among them
        raise IncompatibleUpdates(f"'{name}': its bytes are no array: {_said(error)}") from error
    if value.shape != shape or str(value.dtype) != kind:
        raise IncompatibleUpdates(f"'{name}': said {kind} {shape}, holds {value.dtype} {value.shape}")
    return value


def _checked(name: str, array: Array, want: Tensor) -> Tensor:
    """The tensor of an array, which must be like the one that was sent."""
    kind = str(want.dtype).removeprefix("torch.")
    value = torch.from_numpy(array_of(name, array, kind, tuple(want.shape)))
    length = float(value.double().norm())
    if not length <= LARGEST:
        what = f"a norm of {length:.3g}" if math.isfinite(length) else "numbers that are not finite"
        raise IncompatibleUpdates(f"'{name}' has {what}; expected a norm of at most {LARGEST:.0e}")
    return value


def _kept(task: Task) -> dict[str, Tensor]:
    """The tensors of a packed task that a node keeps: all but those that are sent back every round."""
    shared = {f"adapter/{name}" for name in task.shared()}
    return {name: tensor for name, tensor in task.pack()[0].items() if name not in shared}


def _base_delta_digests(task: Task) -> dict[str, str]:
    """The digests of the base delta's tensors, by their packed names."""
    return {f"{BASE_DELTA}{name}": seal for name, seal in BaseDelta.of(task.base_delta).digests.items()}


def _grown(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base delta's tensors after its increment, from those before; it has scale 1 once it has grown."""
    parts = [
        {
            name.removeprefix(part).removesuffix(".A"): Pair(tensor, tensors[f"{name.removesuffix('.A')}.B"])
            for name, tensor in sorted(tensors.items())
            if name.startswith(part) and name.endswith(".A")
        }
        for part in (BASE_DELTA, GAIN)
    ]
    before, gain = parts
    grown = BaseDelta(before).plus(gain)
    return {f"{BASE_DELTA}{name}": tensor for name, tensor in Adapter({m: grown[m] for m in gain}).tensors()}


def _answered(task: Task, arrays: ArrayRecord) -> Adapter:
    """The task's adapter, or one in other shapes where the method allows them and the reply has them."""
    sent = {name: tuple(array.shape) for name, array in arrays.items()}
    for form in (task.adapter, *(other for part in task.method for other in part.replies(task.adapter))):
        shapes = {name: tuple(tensor.shape) for name, tensor in form.tensors()}
        if all(sent.get(name) == shapes[name] for name in task.shared()):
            return form
    return task.adapter


def _scales(adapter: Adapter) -> ConfigRecord:
    scales = [pair.scale for pair in adapter.pairs.values()]
    return ConfigRecord({"scales": scales} if scales else {})


def _array(tensor: Tensor) -> Array:
    return Array(tensor.cpu().contiguous().numpy())


def _seal(tensor: Tensor) -> str:
    return digest("", [("", tensor)])


def _digest_of_all(seals: Mapping[str, str]) -> str:
    """One digest of a whole base delta, from the digests of its tensors."""
    return digest(json.dumps(sorted(seals.items())), [])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
