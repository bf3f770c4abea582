"""Atomic files and folders: they are written under a temporary name, synced and renamed. Also file locks."""

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from fedlora.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

STALE = 3600.0  # seconds without a change after which a temporary file is taken for one of a killed process


def write_whole(final: Path, make: Callable[[Path], Any]) -> Path:
    """Write a file or folder under a temporary name and rename it. It is on disk when this returns.

    Args:
        final: the final path; what is there is replaced, and missing parent folders are made.
        make: writes the file or folder at the path that it is given; no other call gets the same path.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for old in final.parent.glob(f"{escape(final.name)}.*.tmp"):
        with suppress(FileNotFoundError):  # another process has removed it
            if time.time() - old.stat().st_mtime > STALE:
                remove(old)
    made = final.with_name(f"{final.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        make(made)
        for file in [made] if made.is_file() else made.rglob("*"):
            if file.is_file():
                _sync(file)
        if made.is_dir():
            remove(final)
        os.replace(made, final)
    finally:
        remove(made)
    _sync(final.parent)  # so that the new name is on disk as well
    return final


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file for the duration of the block; other processes and threads wait.

    Raises:
        CheckpointError: the file system does not support locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                raise CheckpointError(
                    f"'{path}' cannot be locked: {error.strerror}; keep this folder on a disk with file locks"
                ) from error
        yield


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
