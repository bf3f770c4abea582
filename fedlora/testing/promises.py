"""What all checks for authors share: promises are tried in turn, and those that are broken are named."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Tried = TypeVar("Tried")


class Broken(AssertionError):
    """A promise that an author's code does not keep; its words say what was expected, and what came."""


def what_came(error: Exception) -> str:
    """The words of a broken promise, or of whatever else an author's code raises, in one line."""
    if isinstance(error, Broken):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def named(promise: Callable[..., None]) -> str:
    """What messages call a promise."""
    return promise.__name__.replace("_", " ")


def broken_of(promises: Sequence[Callable[[Tried], None]], one: Tried) -> Iterator[tuple[str, str]]:
    """The promises that are broken: the name of each, and what came.

    Args:
        promises: functions that raise `Broken`, or anything, where theirs is broken.
        one: what they are tried on.
    """
    for promise in promises:
        try:
            promise(one)
        except Exception as error:
            yield named(promise), what_came(error)


def report(name: str, broken: Iterable[tuple[str, str]]) -> None:
    """Raise if there is a broken promise.

    Args:
        name: of the class that is checked.
        broken: the name of each broken promise, and what came.

    Raises:
        AssertionError: a line names each of them.
    """
    if found := [f"- {promise}: {why}" for promise, why in broken]:
        many = "promise" if len(found) == 1 else "promises"
        raise AssertionError(f"{name} breaks {len(found)} {many}:\n" + "\n".join(found))
