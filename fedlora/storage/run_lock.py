"""The lock of a run's folder, which one process holds at a time, and whether one does."""

import time
from pathlib import Path
from typing import IO

from fedlora.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TRIES, PAUSE = 5, 0.05  # of `hold`, and seconds between them


def hold(path: Path) -> IO[bytes]:
    """Lock a run's folder for this process, until the returned file is closed or the process ends.

    Raises:
        ConfigError: another process holds the lock.
    """
    (path / "checkpoint").mkdir(parents=True, exist_ok=True)
    file = _file(path).open("ab")
    for left in reversed(range(TRIES)):
        if _lock(file, shared=False) is not False:
            return file
        if left:
            time.sleep(PAUSE)  # somebody may be looking in this instant
    file.close()
    raise ConfigError(f"resume: another process is at work on '{path}'; wait for its end, or stop it")


def held(path: Path) -> bool | None:
    """Whether a process holds a run's folder; None where the file system does not tell.

    It is found by a shared lock that is let go of at once, for which `hold` waits.
    """
    try:
        with _file(path).open("rb") as file:
            free = _lock(file, shared=True)
    except FileNotFoundError:  # nobody has ever held it
        return False
    except OSError:  # this user may not look
        return None
    return None if free is None else not free


def _file(path: Path) -> Path:
    return path / "checkpoint" / "lock"


def _lock(file: IO[bytes], shared: bool) -> bool | None:
    """Lock a file until it is closed: whether that could be done now; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system does not support locks
        return None
    return True
