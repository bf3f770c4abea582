"""Ledgers on disk: written before anything leaves, and never taken back."""

from pathlib import Path

from fedlora.engine.files import write_whole
from fedlora.errors import CheckpointError
from fedlora.privacy import Ledger

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


def spend(path: Path, ledger: Ledger) -> None:
    """Write down what has been spent, all of it; on disk when this returns, so call it before sending.

    Raises:
        CheckpointError: something that was spent before is missing in it.
    """
    before = read_ledger(path)
    if before is not None and not ledger.covers(before):
        raise CheckpointError(f"'{path}' can only grow: {before} became {ledger}")
    text = ledger.dump() + "\n"
    write_whole(path, lambda file: file.write_text(text, "utf-8"))
