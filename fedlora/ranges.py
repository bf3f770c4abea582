"""Checks of numbers in settings: in which range each must be, said in one form wherever it is not."""

import math
from typing import Any

from fedlora.errors import ConfigError


def check_whole(name: str, value: Any, least: int = 1, none: bool = False) -> None:
    """Refuse what is no whole number of at least so much.

    Args:
        name: of the setting, as whoever sets it knows it.
        value: what came.
        least: the smallest number that it may be.
        none: whether it may be None.

    Raises:
        ConfigError: names the setting, what was expected and what came.
    """
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    none: bool = False,
    what: str = "number",
) -> None:
    """Refuse what is no number in a range.

    Args:
        name: of the setting, as whoever sets it knows it.
        value: what came.
        above: it is larger than this.
        least: the smallest number that it may be.
        below: it is smaller than this.
        most: the largest number that it may be; without it and `below`, it is finite.
        none: whether it may be None.
        what: kind of number, such as "share".

    Raises:
        ConfigError: names the setting, what was expected and what came.
    """
    if value is None and none:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    low = (above is None or (number and value > above)) and (least is None or (number and value >= least))
    high = (below is None or (number and value < below)) and (most is None or (number and value <= most))
    if number and low and high and (most is not None or math.isfinite(value)):
        return
    if least is not None and most is not None:
        where = f"from {least:g} to {most:g}"
    else:
        ends = (
            ("above {:g}", above),
            ("of at least {:g}", least),
            ("below {:g}", below),
            ("at most {:g}", most),
        )
        where = " and ".join(words.format(end) for words, end in ends if end is not None)
    raise ConfigError(f"{name}: expected a {what} {where}, got {value!r}")
