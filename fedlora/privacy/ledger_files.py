"""Ledgers on disk. A ledger is written before its release is sent, and no entry is ever removed."""

from pathlib import Path

from fedlora.errors import CheckpointError
from fedlora.privacy import Ledger
from fedlora.storage.atomic import locked, write_whole

LEDGER = "ledger.json"


def read_ledger(path: Path) -> Ledger | None:
    """The ledger in a file; None if there is no file, which means that nothing was released.

    Raises:
        CheckpointError: the file is damaged, so the remaining budget is unknown.
    """
    try:
        return Ledger.load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, CheckpointError) as error:
        raise CheckpointError(f"'{path}', a privacy ledger, cannot be read: {error}") from error


def spend(path: Path, before: Ledger | None, after: Ledger) -> None:
    """Replace a ledger by one with more steps. It is on disk when this returns, so call it before sending.

    Args:
        path: the ledger's file.
        before: the ledger that was read before the release was decided on; None if there was none.
        after: the ledger with the steps of the release.

    Raises:
        CheckpointError: the file has changed since `before` was read, or `after` lacks a step of it.
    """
    with locked(path.with_name(f"{path.name}.lock")):
        if read_ledger(path) != before:
            raise CheckpointError(
                f"'{path}' is no longer the ledger that was read before training: another process has "
                "changed or removed it; nothing is sent, ask again"
            )
        if before is not None and not after.covers(before):
            raise CheckpointError(f"'{path}' can only grow, but the new ledger lacks steps of the old one")
        text = after.dump() + "\n"
        write_whole(path, lambda file: file.write_text(text, "utf-8"))
