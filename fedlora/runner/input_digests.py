"""What a run reads from outside, remembered by keyed digests, so that a resumed run goes on with the same."""

import hashlib
import hmac
import inspect
import json
import os
import secrets
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.data import Example, Row
from fedlora.errors import CheckpointError
from fedlora.runner.assemble import Assembly
from fedlora.runner.load_models import trained_heads
from fedlora.storage.run_folder import RunFolder

# Beside the checkpoints, which stay where the run is: the key would let short rows be found by trying.
FILE = "checkpoint/inputs.json"
SHOWN = 5  # clients that a message names


def check_inputs(job: Assembly, folder: RunFolder, resumed: bool) -> None:
    """Remember what a new run has read, and refuse to go on with a run for which it has changed.

    Digests are kept of the labels in their order, each client's training rows, the test rows, their tokens,
    the models' frozen weights, the adapter that the run began from, the trace of virtual time, and the source
    of a strategy or client of the user's own. Rows on other machines are their sites' business and not part
    of it. An own strategy that has changed is worth a warning only: to mend it is a reason to go on.

    Args:
        job: loaded.
        folder: the run's.
        resumed: whether the run goes on.

    Raises:
        CheckpointError: something has changed; says what.
    """
    file = folder.path / FILE
    if not resumed or not file.is_file():
        key = secrets.token_bytes(32)
        text = json.dumps({"key": key.hex(), **_digests(job, key)}, indent=2) + "\n"
        folder.write(FILE, lambda path: _write_private(path, text))
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        now = _digests(job, bytes.fromhex(before["key"]))
        changed = _changed(before, now)
        code = before["code"] != now["code"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{file}' is damaged ({error!r}); put it back, or begin a new run") from error
    if changed:
        raise CheckpointError(
            f"resume: since '{folder.path}' began, {' and '.join(changed)} have changed; put back what it "
            "began with, or begin a new run from what this one has learned: fedlora export "
            f"{folder.path} --to DIR, then lora.adapter=DIR"
        )
    if code:
        warnings.warn("resume: the source of this run's own strategy or client has changed", stacklevel=2)


def _write_private(path: Path, text: str) -> None:
    """Write a file that its owner alone can read."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)


def _digests(job: Assembly, key: bytes) -> dict[str, Any]:
    clients = range(len(job.parts))
    rows = [[job.dataset.train[i] for i in part.rows] for part in job.parts]
    tokens = [example for k in clients for example in job.runtime.rows(k)]
    bases, speeds = job.runtime.bases or [job.base], job.spec.engine.speeds
    return {
        "labels": _seal(key, job.dataset.labels),
        "clients": [_seal(key, _texts(own)) for own in rows],
        "test": _seal(key, _texts(job.dataset.test)),
        "tokens": _seal(key, _numbers([*tokens, *job.test])),
        "models": [_seal(key, [base.fingerprint(trained_heads(job.spec.lora, base))]) for base in bases],
        "adapter": None if job.spec.lora.adapter is None else _seal(key, [job.start.digest()]),
        "speeds": _seal(key, [Path(speeds).read_bytes()]) if isinstance(speeds, str) else None,
        "code": [_seal(key, [_source(thing)]) for thing in (job.spec.strategy, job.runtime.client)],
    }


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, in words."""
    found = []
    if before["labels"] != now["labels"]:
        found.append("the labels or their order")
    old, new = before["clients"], now["clients"]
    if len(old) != len(new):
        found.append(f"the number of clients with rows ({len(old)}, now {len(new)})")
    elif differ := [k for k, (one, two) in enumerate(zip(old, new, strict=True)) if one != two]:
        more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        who = ", ".join(map(str, differ[:SHOWN])) + more
        found.append(f"the training rows of client{'s' * (len(differ) > 1)} {who}")
    if before["test"] != now["test"]:
        found.append("the test rows")
    if not found and before["tokens"] != now["tokens"]:
        found.append("the tokenizer (equal rows have other tokens)")
    if before["models"] != now["models"]:
        found.append("the weights of the model")
    if before["adapter"] != now["adapter"]:
        found.append("the adapter in lora.adapter")
    if before.get("speeds") != now["speeds"]:
        found.append("the trace in engine.speeds")
    return found


def _seal(key: bytes, parts: Iterable[str | bytes]) -> str:
    """HMAC-SHA256 of parts in their order; each with its length, so that no two lists look alike."""
    seal = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        seal.update(len(data).to_bytes(8, "big"))
        seal.update(data)
    return seal.hexdigest()


def _texts(rows: Sequence[Row]) -> Iterable[str]:
    for row in rows:
        yield from (str(row.source), str(row.target))


def _numbers(examples: Sequence[Example]) -> Iterable[bytes]:
    for example in examples:
        for part in (example.input_ids, example.target):
            yield np.asarray(part).tobytes()


def _source(thing: object) -> str:
    """The source of the module of an object's class; nothing for what is installed with fedlora."""
    home = type(thing).__module__
    if home.partition(".")[0] == "fedlora":
        return ""
    try:
        return Path(inspect.getsourcefile(sys.modules[home]) or "").read_text(encoding="utf-8")
    except (OSError, TypeError, KeyError):
        return ""
