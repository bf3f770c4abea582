"""What changes from round to round in local training: the learning rate, and how many steps are taken.

Round t of T, with W rounds of warm-up and t' = t − 1 − W, has the rate times

    t / (W + 1)                         in the warm-up, t ≤ W
    f + (1 − f) (1 − t' / (T − W))      linear
    f + (1 − f) (1 + cos(π t' / (T − W))) / 2      cosine
    γ^⌊t' / n⌋                          step
    1                                   constant

These are torch's LinearLR from 1 / (W + 1), followed by LinearLR to f, CosineAnnealingLR with T_max = T − W,
StepLR or nothing, one step of theirs a round. As there, the rate would be f in round T + 1: the last round
still learns where f is 0.

T is the number of rounds of the whole federation and t the round that the server sends, so that all clients
of a round have its rate, whenever they were sampled before.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedlora.errors import ConfigError
from fedlora.ranges import check_number, check_whole


@dataclass(frozen=True)
class RoundSchedule:
    """The learning rate over the rounds of a federation, by a factor that is the same for every client.

    Args:
        schedule: "constant", "linear" or "cosine" decay over all rounds, or "step": shorter by a factor every
            so many rounds.
        warmup: W, the rounds in which the rate rises, before the schedule begins.
        floor: f, the share of the rate at which linear and cosine decay end.
        every: n, rounds between two decays of "step".
        gamma: γ, the factor of each decay of "step".
        steps: round -> the local steps of every client from that round on, in the place of the client's own
            `steps` or `epochs`, which hold before the first of them; None changes nothing.

    Raises:
        ConfigError: a value out of its range.
    """

    schedule: Literal["constant", "linear", "cosine", "step"] = "constant"
    warmup: int = 0
    floor: float = 0.0
    every: int = 1
    gamma: float = 0.5
    steps: Mapping[int, int] | None = None

    def __post_init__(self) -> None:
        name = "client.over_rounds"
        if self.schedule not in ("constant", "linear", "cosine", "step"):
            raise ConfigError(
                f"{name}.schedule: expected constant, linear, cosine or step, got '{self.schedule}'"
            )
        check_whole(f"{name}.warmup", self.warmup, 0)
        check_number(f"{name}.floor", self.floor, least=0, most=1, what="share")
        check_whole(f"{name}.every", self.every)
        check_number(f"{name}.gamma", self.gamma, above=0, most=1)
        if self.steps is not None:
            object.__setattr__(self, "steps", _rounds(self.steps))

    @property
    def rates(self) -> bool:
        """Whether any round has another rate than the client's own."""
        return self.schedule != "constant" or self.warmup > 0

    def factor(self, round: int, rounds: int | None = None) -> float:
        """What the client's rates are multiplied with in a round.

        Args:
            round: t, from 1.
            rounds: T, how many the federation has; None where nobody has said it.

        Raises:
            ConfigError: the schedule needs the number of rounds, and nobody has said it.
        """
        if round <= self.warmup:
            return round / (self.warmup + 1)
        since = round - 1 - self.warmup
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step":
            return float(self.gamma ** (since // self.every))
        if rounds is None:
            raise ConfigError(
                f"client.over_rounds.schedule={self.schedule}: goes over all rounds of the federation, and "
                "this client was not told how many there are; use constant or step"
            )
        done = min(1.0, since / max(1, rounds - self.warmup))
        left = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.floor + (1 - self.floor) * left

    def steps_of(self, round: int) -> int | None:
        """How many local steps a client takes in a round; None leaves that to the client.

        Args:
            round: from 1.
        """
        begun = [first for first in self.steps or {} if first <= round]
        return self.steps[max(begun)] if self.steps and begun else None


def _rounds(given: Mapping[int, int]) -> dict[int, int]:
    """Round -> steps, whose keys a configuration may have as words."""
    found = {}
    for first, steps in given.items() if isinstance(given, Mapping) else [(None, None)]:
        if not (str(first).isdigit() and int(str(first)) >= 1):
            raise ConfigError(
                f"client.over_rounds.steps: expected steps by the round in which they begin, such as "
                f"{{1: 20, 5: 10}}, got {given!r:.60}"
            )
        check_whole(f"client.over_rounds.steps of round {first}", steps)
        found[int(str(first))] = steps
    return dict(sorted(found.items()))
