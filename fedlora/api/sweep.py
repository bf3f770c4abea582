"""Many runs from Python: one for each combination of settings."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError
from fedlora.report import read_run, runs_table, seeds_table
from fedlora.storage.run_folder import RunFolder

from .run import Run
from .signature import takes_settings
from .simulate import given_parts, make_spec, simulate

LISTED = ("data", "test", "labels", "ranks")  # arguments whose one value may be a list


@dataclass(frozen=True)
class each:
    """Values of one argument of a sweep, where a list alone would be one value: ranks=each(4, [2, 4, 8])."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)


class Sweep:
    """The runs of a sweep, in the order of its combinations.

    Args:
        runs: name -> run.
    """

    def __init__(self, runs: dict[str, Run]) -> None:
        self.runs = runs

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs.values())

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, name: str) -> Run:
        return self.runs[name]

    def table(self) -> Any:
        """A table of the runs, over seeds where there are several; `.show()` prints it."""
        found = [read_run(run.path) for run in self]
        return seeds_table(found) or runs_table(found)

    def __repr__(self) -> str:
        return "Sweep(" + ", ".join(f"{name}: {run!r}" for name, run in self.runs.items()) + ")"


@takes_settings
def sweep(
    model: Any = "minilm",
    data: Any = "trec",
    *,
    out: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Sweep:
    """Run every combination of the arguments that have several values.

    A list means several values, as in strategy=["fedit", "flexlora"], seed=[0, 1, 2]; for data, test, labels
    and ranks, of which a list is one value, `fedlora.each(...)` does. With `out`, runs that have finished
    there before are not run again, and one that was cut off goes on.

    Args:
        model: as for `simulate`.
        data: as for `simulate`.
        out: a folder for the runs, each in a folder of its own; None keeps nothing on disk.
        progress: whether to show tables of the rounds.
        settings: as for `simulate`.

    Raises:
        FedLoraError: as `simulate`, from the first run that cannot work.
    """
    given = {"model": model, "data": data, **settings}
    several = {name: _values(name, value) for name, value in given.items()}
    swept = {name: values for name, values in several.items() if values is not None}
    if not swept:
        raise ConfigError("sweep: expected an argument with several values, such as seed=[0, 1, 2]; got none")
    runs = {}
    for combination in itertools.product(*swept.values()):
        chosen = dict(zip(swept, combination, strict=True))
        name = _named(chosen)
        one = given | chosen
        place = None if out is None else Path(out) / name
        runs[name] = _run(one, place, progress)
    return Sweep(runs)


def _run(settings: dict[str, Any], place: Path | None, progress: bool) -> Run:
    """One run, or what is left of it."""
    if place is None or not (place / "config.yaml").is_file():
        return simulate(out=place, progress=progress, **settings)
    rest = {name: value for name, value in settings.items() if name not in ("model", "data")}
    spec = make_spec(settings["model"], settings["data"], rest)
    run = Run(place, given=given_parts(spec))
    from fedlora.config.instantiate import differences

    if differ := differences(spec.settings, place, ("out", "resume")):
        raise ConfigError(
            f"sweep: '{place}' holds a run with other settings ({', '.join(differ)}); name another out"
        )
    return run if RunFolder(place).finished else run.resume(progress=progress)


def _values(name: str, value: Any) -> Sequence[Any] | None:
    """The values of an argument that is swept; None for one that is not."""
    if isinstance(value, each):
        return value.values
    return value if isinstance(value, list) and name not in LISTED else None


def _named(chosen: dict[str, Any]) -> str:
    """The folder of a combination."""
    parts = []
    for name, value in chosen.items():
        said = value if isinstance(value, str | int | float | bool) or value is None else _short(value)
        parts.append(f"{name}={said}")
    plain = ",".join(parts).replace("/", "-").replace(" ", "")
    return plain if len(plain) <= 100 else f"{plain[:80]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def _short(value: Any) -> str:
    text = repr(value)
    return (
        text if len(text) <= 40 else f"{type(value).__name__}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    )
