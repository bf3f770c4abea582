"""Numbers in settings are refused outside of their range, in one form of words."""

import math
from typing import Any

import pytest

from fedlora.errors import ConfigError
from fedlora.ranges import check_number, check_whole


@pytest.mark.parametrize("value", [0, -3, 1.0, True, "2", None, math.nan])
def test_what_is_no_whole_number_of_at_least_one_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        check_whole("client.steps", value)
    assert str(refused.value) == f"client.steps: expected a whole number of at least 1, got {value!r}"


def test_whole_numbers_of_the_range_pass_and_none_where_it_may() -> None:
    check_whole("x", 1)
    check_whole("x", 0, 0)
    check_whole("x", None, none=True)
    check_number("x", None, above=0, none=True)


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "said"),
    [
        ({"above": 0}, [1e-9, 3], [0, -1, math.inf], "a number above 0"),
        ({"least": 0}, [0, 0.5], [-1e-9, math.inf], "a number of at least 0"),
        ({"least": 0, "most": 1}, [0, 1], [-0.1, 1.1], "a number from 0 to 1"),
        ({"least": 0, "most": math.inf}, [0, math.inf], [-1], "a number from 0 to inf"),
        ({"above": 0, "below": 0.5}, [0.1], [0, 0.5], "a number above 0 and below 0.5"),
        ({"above": 0, "most": 1, "what": "share"}, [1, 0.1], [0, 1.1], "a share above 0 and at most 1"),
    ],
)
def test_numbers_are_held_to_their_range(bounds: Any, good: list[Any], bad: list[Any], said: str) -> None:
    for value in good:
        check_number("x", value, **bounds)
    for value in [*bad, math.nan, True, "1", None]:
        with pytest.raises(ConfigError) as refused:
            check_number("x", value, **bounds)
        assert str(refused.value) == f"x: expected {said}, got {value!r}"
