"""How fast simulated clients are and when they are absent: a distribution, or a trace from a file."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError
from fedlora.ranges import check_number
from fedlora.seeds import generator

COLUMNS = ("client", "seconds", "absent_from", "absent_until")  # of a trace


@dataclass(frozen=True)
class Pace:
    """One client in virtual time.

    Args:
        seconds: what a step, or a round, takes it.
        absences: when it is away, each from and until, in order; for a client of a trace.
        share: the share of the periods in which it is away, for a client of a distribution.
        period: seconds of a period.
        seed: of the run.
        client: its id.
    """

    seconds: float
    absences: Sequence[tuple[float, float]] = ()
    share: float = 0.0
    period: float = 1.0
    seed: int = 0
    client: int = 0

    def back(self, when: float) -> float:
        """The first instant from this one on at which the client is there."""
        for start, end in self.absences:
            if start <= when < end:
                when = end
        first = at = math.floor(when / self.period)
        while self.share and self._away(at):  # periods are counted: k · p / p may be below k
            at += 1
        return when if at == first else at * self.period

    def _away(self, period: int) -> bool:
        return bool(generator(self.seed, "absence", self.client, period).random() < self.share)


@dataclass(frozen=True)
class Speeds:
    """The speeds of all clients, by a distribution or by a trace.

    A client of a distribution takes seconds · exp(lognormal · z) for a step, with one standard normal z a
    client, drawn by the run's seed. Time is cut into periods; in each of them a client is away with the
    probability `absent`, drawn likewise. A client that is away is sent nothing, and what it has finished
    meanwhile arrives when it is back.

    Args:
        seconds: what a step takes the median client, in virtual seconds.
        lognormal: the standard deviation of the logarithm of a client's seconds; 0 makes all alike.
        per: whether `seconds` are those of a local "step", or of a whole "round" of local training.
        absent: the share of the periods in which a client is away, below 1.
        period: virtual seconds of a period.
        trace: a CSV file with the columns client, seconds, absent_from and absent_until, in the place of the
            distribution. The last two may be missing or empty; a client with several absences has several
            rows, of which the first has its seconds.

    Raises:
        ConfigError: a field is out of its range, or the trace cannot be read; says where.
    """

    seconds: float = 1.0
    lognormal: float = 0.0
    per: str = "step"
    absent: float = 0.0
    period: float = 100.0
    trace: str | None = None
    _traced: Mapping[int, Pace] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("seconds", "period"):
            check_number(f"engine.speeds.{name}", getattr(self, name), above=0)
        check_number("engine.speeds.lognormal", self.lognormal, least=0)
        check_number("engine.speeds.absent", self.absent, least=0, below=1, what="share")
        if self.per not in ("step", "round"):
            raise ConfigError(f"engine.speeds.per: expected step or round, got '{self.per}'")
        if self.trace is not None:
            object.__setattr__(self, "_traced", _read(Path(self.trace)))

    @classmethod
    def of(cls, setting: Any) -> "Speeds":
        """The speeds that a setting names: a mapping of fields, or the path of a trace.

        Raises:
            ConfigError: it is neither.
        """
        known = [f.name for f in fields(cls) if f.init]
        if isinstance(setting, str | Path):
            return cls(trace=str(setting))
        if not isinstance(setting, Mapping) or (unknown := sorted(map(str, setting.keys() - {*known}))):
            got = f"'{unknown[0]}'" if isinstance(setting, Mapping) else f"{setting!r:.40}"
            raise ConfigError(
                f"engine.speeds: expected a CSV file, or some of {', '.join(known)}, such as "
                f"{{lognormal: 1}}; got {got}"
            )
        return cls(**setting)

    def pace(self, client: int, seed: int) -> Pace:
        """One client's speed and absences.

        Raises:
            ConfigError: there is a trace, and the client is not in it.
        """
        if self.trace is not None:
            if client not in self._traced:
                raise ConfigError(f"engine.speeds: '{self.trace}' has no row of client {client}")
            return self._traced[client]
        z = generator(seed, "speed", client).standard_normal()
        seconds = self.seconds * math.exp(self.lognormal * z)
        return Pace(seconds, share=self.absent, period=self.period, seed=seed, client=client)


def _read(path: Path) -> dict[int, Pace]:
    """The clients of a trace."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            header, found = rows.fieldnames or [], list(rows)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"engine.speeds: cannot read '{path}': {error}") from error
    if {"client", "seconds"} - {*header} or (more := {*header} - {*COLUMNS}):
        got = ", ".join(sorted(more)) if not {"client", "seconds"} - {*header} else ", ".join(header)
        raise ConfigError(f"engine.speeds: '{path}' needs the columns {', '.join(COLUMNS)}; got {got}")
    seconds: dict[int, float] = {}
    absences: dict[int, list[tuple[float, float]]] = {}
    for line, row in enumerate(found, 2):
        try:
            client = int(row["client"])
            if row["seconds"] or client not in seconds:
                seconds[client] = float(row["seconds"])
            if start := row.get("absent_from"):
                absences.setdefault(client, []).append((float(start), float(row.get("absent_until") or "")))
            good = 0 < seconds[client] < math.inf and all(
                a < b < math.inf for a, b in absences.get(client, ())
            )
        except (TypeError, ValueError):
            good = False
        if not good:
            raise ConfigError(
                f"engine.speeds: '{path}', line {line}: expected a client's number, its seconds above 0, and "
                f"where it is absent from when until when; got {', '.join(map(str, row.values()))}"
            )
    return {client: Pace(own, sorted(absences.get(client, ()))) for client, own in seconds.items()}
