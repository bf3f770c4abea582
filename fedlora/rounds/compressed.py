"""Messages in code: what `write_task` and `write_update` wrote with fewer bytes, and back.

A task's shared tensors, which it brings anew every round, become the arrays of the run's code for downloads.
An update's tensors become those of the code of their change, and the server adds the change to what it sent.
All else of a message stays as it was written, also what a local rule has clients send beside the adapter.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fedlora.compression.base import Compression, MessageKey
from fedlora.compression.update import lengths, tensors, vector
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.errors import CheckpointError, IncompatibleUpdates
from fedlora.rounds.codec import array_of

ADAPTER = "adapter/"  # begins the names of an adapter's tensors in a packed task
CODE = "code/"  # and those of the arrays of a code
SHAPES = "shapes"  # of the tensors that are in code, in a task's config
REPLY = "shape"  # in an update's config: of which of the shapes that the task allows it is


def code_task(content: RecordDict, task: Task, codec: Compression, key: MessageKey) -> None:
    """Put a task's shared tensors into code, in place; those of another dtype than float32 stay exact."""
    arrays = content.array_records["arrays"]
    given = dict(task.adapter.tensors())
    names = [name for name in task.shared() if f"{ADAPTER}{name}" in arrays]
    found = {name: given[name] for name in names if given[name].dtype == torch.float32}
    if not any(tensor.numel() for tensor in found.values()):
        return
    form = {name: tuple(tensor.shape) for name, tensor in found.items()}
    coded = codec.encode(vector(found), lengths(form), key)
    for name in found:
        del arrays[f"{ADAPTER}{name}"]
    for name, array in coded.items():
        arrays[f"{CODE}{name}"] = Array(array)
    content.config_records["config"][SHAPES] = json.dumps(form, separators=(",", ":"))


def plain_task(content: RecordDict, codec: Compression | None, client: int) -> RecordDict:
    """What `read_task` reads, of a task that may be in code.

    Raises:
        CheckpointError: it is in code, and this client knows of none, or of another one.
    """
    config = content.config_records["config"]
    if SHAPES not in config:
        return content
    if codec is None:
        raise CheckpointError("the task is in code, and by this client's settings tasks are in none")
    form = {name: tuple(shape) for name, shape in json.loads(str(config[SHAPES])).items()}
    key = MessageKey(int(config["seed"]), client, int(config["round"]), down=True)  # type: ignore[arg-type]
    arrays = content.array_records["arrays"]
    try:
        coded = _read(arrays, codec, lengths(form), key, CODE)
    except IncompatibleUpdates as error:
        raise CheckpointError(f"the task is in code, not as by this client's settings: {error}") from error
    rest = {name: array for name, array in arrays.items() if not name.startswith(CODE)}
    found = {f"{ADAPTER}{name}": Array(t.numpy()) for name, t in tensors(coded, form).items()}
    return RecordDict({**content, "arrays": ArrayRecord({**rest, **found})})


def code_update(content: RecordDict, task: Task, adapter: Adapter, arrays: Mapping[str, Any]) -> None:
    """Put the arrays of a code in the place of an update's tensors.

    Args:
        content: what `write_update` wrote; changed in place.
        task: what the client was sent.
        adapter: what it sends, in one of the shapes that the task allows.
        arrays: of the code of its change.
    """
    beside = _beside(content.array_records["arrays"], task)
    content["arrays"] = ArrayRecord({name: Array(array) for name, array in arrays.items()} | beside)
    forms, form = _forms(task), _form(adapter, task)
    if form != forms[0]:
        content.config_records["config"][REPLY] = forms.index(form)


def plain_update(reply: Message, task: Task, codec: Compression, key: MessageKey) -> None:
    """Put the tensors that an update in code stands for into their place, so that `read_update` reads them.

    Args:
        reply: a client's; what is wrong with it beside its code stays so. Its content is changed.
        task: what the client was sent, as the server has it.
        codec: of the run's updates.
        key: of the message.

    Raises:
        IncompatibleUpdates: it has other arrays than the code makes, or names a shape that there is none of.
    """
    if reply.has_error() or "arrays" not in reply.content.array_records or not task.shared():
        return
    content, forms = RecordDict(dict(reply.content)), _forms(task)
    config = ConfigRecord(dict(content.config_records.get("config", {})))
    which = config.pop(REPLY, 0)
    if type(which) is not int or not 0 <= which < len(forms):
        raise IncompatibleUpdates(f"'{REPLY}': expected a number below {len(forms)}, got {which!r:.20}")
    form, start = forms[which], dict(task.adapter.tensors())
    arrays = content.array_records["arrays"]
    beside = _beside(arrays, task)
    coded = {name: array for name, array in arrays.items() if name not in beside}
    change = tensors(_read(coded, codec, lengths(form), key), form)
    found = dict(beside)
    for name, shape in form.items():
        begun = start[name][tuple(slice(0, length) for length in shape)]
        found[name] = Array((begun.double() + change[name].double()).to(begun.dtype).numpy())
    content["arrays"], content["config"] = ArrayRecord(found), config
    reply.content = content


def _read(
    arrays: Mapping[str, Array], codec: Compression, sizes: Any, key: MessageKey, prefix: str = ""
) -> Any:
    """The numbers of arrays in code, each of which is checked before anything is made of it."""
    wanted = {f"{prefix}{name}": kind for name, kind in codec.form(sizes, key).items()}
    given = {name for name in arrays if name.startswith(prefix)}
    if given != wanted.keys():
        missing, unknown = sorted(wanted.keys() - given), [f"{n:.60}" for n in sorted(given - wanted.keys())]
        raise IncompatibleUpdates(f"wrong arrays: missing {missing[:3]}, unknown {unknown[:3]}")
    read = {name: array_of(name, arrays[name], kind, shape) for name, (kind, shape) in wanted.items()}
    return codec.decode({name.removeprefix(prefix): array for name, array in read.items()}, sizes, key)


def _beside(arrays: Mapping[str, Array], task: Task) -> dict[str, Array]:
    """What a task has clients send beside the adapter, which stays as it was written."""
    wanted = task.sent()
    return {name: array for name, array in arrays.items() if name in wanted}


def _forms(task: Task) -> list[dict[str, tuple[int, ...]]]:
    """The shapes in which a client may reply: those of the task, and those that its method allows."""
    others = [other for part in task.method for other in part.replies(task.adapter)]
    return [_form(adapter, task) for adapter in (task.adapter, *others)]


def _form(adapter: Adapter, task: Task) -> dict[str, tuple[int, ...]]:
    """The shapes of what a task shares, in an adapter."""
    found: dict[str, Tensor] = dict(adapter.tensors())
    return {name: tuple(found[name].shape) for name in task.shared()}
