"""Ledgers on disk: written before anything leaves, and never taken back."""

from pathlib import Path

from fedlora.errors import CheckpointError
from fedlora.privacy import Ledger
from fedlora.storage.atomic import locked, write_whole

LEDGER = "ledger.json"


def read_ledger(path: Path) -> Ledger | None:
    """What was spent so far; None for nothing.

    Raises:
        CheckpointError: the ledger is damaged, so that nobody knows what is left.
    """
    try:
        return Ledger.load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, CheckpointError) as error:
        raise CheckpointError(f"'{path}', what was spent, cannot be read: {error}") from error


def spend(path: Path, before: Ledger | None, after: Ledger) -> None:
    """Write down what has been spent, all of it; on disk when this returns, so call it before sending.

    Args:
        path: the ledger's file.
        before: what it held when the spending was decided on; None for nothing.
        after: what it holds from now on.

    Raises:
        CheckpointError: it holds something else by now, or `after` lacks some of it.
    """
    with locked(path.with_name(f"{path.name}.lock")):
        if read_ledger(path) != before:
            raise CheckpointError(
                f"'{path}' is no longer the ledger that was read before training, which another process has "
                "changed or removed since; nothing is sent, ask again"
            )
        if before is not None and not after.covers(before):
            raise CheckpointError(f"'{path}' can only grow, and some of what was spent would be missing")
        text = after.dump() + "\n"
        write_whole(path, lambda file: file.write_text(text, "utf-8"))
