"""Tasks and updates as Flower records, and back; what comes from a client is checked here.

A task travels as it packs itself, without what the node holds from before; an update as its shared tensors
under their names (`module.A`, `module.B`, the extras) and one scale a module, in the order of the names.
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
from fedlora.core.algebra import accumulate, truncate
from fedlora.core.messages import Peer, Task, Update
from fedlora.errors import CheckpointError, IncompatibleUpdates
from fedlora.training.client import TrainResult

MOST_EXAMPLES = 1e12  # more rows than any client has; sums of such weights stay exact enough
HEADER = 1024  # bytes that an array's own header may take
FAILED = 2  # flwr's error code for a ClientApp that raised
REFUSED = 1000  # code of the error with which a client replies that it must not train
MOST_METRICS = 64  # numbers that a client may report
LONGEST = 400  # characters of a client's own words that are worth repeating
RECORDS = {"arrays", "metrics", "config"}  # of an update
LARGEST = 1e6  # a trained tensor's norm beyond this is a diverged or hostile client, never a useful update


@dataclass(frozen=True)
class Held:
    """What the server knows that a node holds: digests of tensors by name, and the state its fold is from."""

    digests: Mapping[str, str] = field(default_factory=dict)
    version: int | None = None


def write_task(
    task: Task, round: int, seed: int, held: Held | None = None, version: int | None = None
) -> tuple[RecordDict, Held]:
    """What the server sends, with the bytes of the whole task, and what the node holds once it has it.

    A tensor goes unless the node holds the same bits from the task before, as it does those that it did not
    both train and share; and of a fold that has grown since the node's only the gain, where that is less.

    Args:
        task: what is asked.
        round: the round, from 1.
        seed: the run's.
        held: what the node holds.
        version: the state that the task comes from, a number that grows by one with each state.
    """
    held = held or Held()
    tensors, header = task.pack()
    digests = {name: _seal(tensor) for name, tensor in _kept(task, tensors).items()}
    missing = {name for name in digests if held.digests.get(name) != digests[name]}
    gain = {name for name in tensors if name.startswith("gain/")}
    fold = {name for name in missing if name.startswith("fold/")}
    follows = None not in (version, held.version) and version == held.version + 1  # type: ignore[operator]
    grown = bool(follows and gain and _bytes(tensors, gain) < _bytes(tensors, fold))
    shared = tensors.keys() - digests.keys() - gain
    still = {name for name in shared & held.digests.keys() if held.digests[name] == _seal(tensors[name])}
    sent = (
        (shared - still)  # a factor that was frozen the last time is there from then
        | (missing - fold if grown else missing)
        | (gain if grown else set())
    )
    to = _fold_seal(digests) if grown else ""
    whole = _bytes(tensors, tensors.keys() - gain)
    numbers = {"round": round, "seed": seed, "whole": whole, "version": -1 if version is None else version}
    config = ConfigRecord({**numbers, "task": header, "grown": to})
    arrays = ArrayRecord({name: _array(tensors[name]) for name in sorted(sent)})
    return RecordDict({"arrays": arrays, "config": config}), Held(digests, version)


def read_task(
    content: RecordDict, held: Mapping[str, Tensor] | None = None
) -> tuple[Task, int, int, dict[str, Tensor]]:
    """The task, the round and the seed that `write_task` wrote, and what the node now has to hold.

    Raises:
        CheckpointError: the server counts on tensors that this node does not hold, or on a fold to which the
            gain leads nowhere here.
    """
    config, arrays = content.config_records["config"], content.array_records["arrays"]
    tensors = dict(held or {}) | {n: torch.from_numpy(array.numpy().copy()) for n, array in arrays.items()}
    try:
        if config["grown"]:
            tensors |= _grown(tensors)
        task = Task.unpack(tensors, str(config["task"]))
    except KeyError as error:
        raise CheckpointError(f"this node was restarted and lacks {error}, which it held before") from error
    kept = {name: tensors[name] for name in _kept(task, task.pack()[0])}
    if config["grown"] and config["grown"] != _fold_seal({name: _seal(t) for name, t in kept.items()}):
        raise CheckpointError("this node was restarted: what it holds is not the fold that has grown")
    return task, int(config["round"]), int(config["seed"]), kept  # type: ignore[arg-type]


def write_update(outcome: TrainResult, task: Task, round: int, examples: int) -> RecordDict:
    """What a client sends: the shared factors, the extras, its number of rows and its metrics."""
    metrics = {name: float(value) for name, value in outcome.metrics.items()}
    numbers = MetricRecord({"num-examples": examples, "round": round, **metrics})
    tensors = dict(outcome.adapter.tensors())
    arrays = ArrayRecord({name: _array(tensors[name]) for name in task.shared()})
    records = {"arrays": arrays, "metrics": numbers, "config": _scales(outcome.adapter)}
    return RecordDict(records)  # type: ignore[arg-type]


def read_update(reply: Message, task: Task, peer: Peer, round: int) -> Update:
    """Check a reply against the task that was sent, and complete it with the factors that stayed.

    Raises:
        IncompatibleUpdates: the client failed, or sent another round, other records, names, shapes, ranks,
            scales or dtypes, numbers that are not finite or absurdly large, or a number of rows that is none.
            The message says what and where; the caller knows who.
    """
    numbers = told(reply, round)
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
    names, sent = task.shared(), _pruned(task, arrays)
    if set(names) != arrays.keys():
        missing, unknown = sorted(set(names) - arrays.keys()), sorted(arrays.keys() - set(names))
        raise IncompatibleUpdates(f"wrong tensors: missing {missing[:3]}, unknown {_said(unknown[:3])}")
    if scales != [pair.scale for pair in sent.pairs.values()]:
        raise IncompatibleUpdates("the scales differ from those that were sent")
    wanted = dict(sent.tensors())
    found = {name: _checked(name, arrays[name], wanted[name]) for name in names}
    return Update(sent.with_tensors(found), float(weight), peer, metrics_of(numbers))


def told(reply: Message, round: int) -> dict[str, Any]:
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
    """What of a reply's numbers goes into the logs."""
    return {
        name: float(value)
        for name, value in numbers.items()
        if name != "round" and isinstance(value, int | float) and abs(value) < 1e300
    }


def _said(words: object) -> str:
    """A client's own words in one line, no more of them than anyone reads, and nothing a terminal obeys."""
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
    """A copy of a client's array as numpy's, which must be of this dtype and shape; hostile bytes are none.

    Raises:
        IncompatibleUpdates: it is another one, or its bytes are no array.
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


def _kept(task: Task, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a packed task that a node holds on to: all but those that change hands every round."""
    shared = {f"adapter/{name}" for name in task.shared()}
    return {n: tensor for n, tensor in tensors.items() if n not in shared and not n.startswith("gain/")}


def _grown(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fold's tensors after the gain, from those before; a fold has scale 1 once it has grown."""
    grown: dict[str, Tensor] = {}
    for name in sorted(name for name in tensors if name.startswith("gain/") and name.endswith(".A")):
        module = name[len("gain/") : -len(".A")]
        gain = Pair(tensors[f"gain/{module}.A"], tensors[f"gain/{module}.B"])
        before = None
        if f"fold/{module}.A" in tensors:
            before = Pair(tensors[f"fold/{module}.A"], tensors[f"fold/{module}.B"])
        after = accumulate(before, gain)
        grown |= {f"fold/{module}.A": after.A, f"fold/{module}.B": after.B}
    return grown


def _pruned(task: Task, arrays: ArrayRecord) -> Adapter:
    """The task's adapter, in the smaller ranks of a client that has pruned where the task allows it."""
    if task.tail is None:
        return task.adapter
    pairs = {m: truncate(p, task.tail.pruned(p.rank)) for m, p in task.adapter.pairs.items()}
    sent = {m: arrays[f"{m}.A"].shape[:1] if f"{m}.A" in arrays else None for m in pairs}
    if sent != {m: (pair.rank,) for m, pair in pairs.items()}:
        return task.adapter
    return Adapter(pairs, task.adapter.extra)


def _scales(adapter: Adapter) -> ConfigRecord:
    scales = [pair.scale for pair in adapter.pairs.values()]
    return ConfigRecord({"scales": scales} if scales else {})


def _array(tensor: Tensor) -> Array:
    return Array(tensor.cpu().contiguous().numpy())


def _seal(tensor: Tensor) -> str:
    return digest("", [("", tensor)])


def _fold_seal(seals: Mapping[str, str]) -> str:
    """One digest of a whole fold, from those of its tensors."""
    return digest(json.dumps(sorted(item for item in seals.items() if item[0].startswith("fold/"))), [])


def _bytes(tensors: Mapping[str, Tensor], names: Iterable[str]) -> int:
    return sum(tensors[name].nbytes for name in names)
