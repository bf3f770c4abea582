"""Files that are whole or not there: made under a temporary name, synced, and given their own."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(final: Path, make: Callable[[Path], Any]) -> Path:
    """Make a file or folder under a temporary name, then give it its own; on disk when this returns.

    Args:
        final: its own name; what is there is replaced, and the folder above is made if it is missing.
        make: makes it at the path that it is given.
    """
    made = final.with_name(f"{final.name}.tmp")
    made.parent.mkdir(parents=True, exist_ok=True)
    remove(made)
    make(made)
    for file in [made] if made.is_file() else made.rglob("*"):
        if file.is_file():
            _sync(file)
    if made.is_dir():
        remove(final)
    os.replace(made, final)
    _sync(final.parent)  # the new name, too
    return final


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
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
