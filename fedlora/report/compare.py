"""The settings in which runs differ, and a short distinct label for each run."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedlora.report.read import Run

ABSENT = "–"
_NOT_SETTINGS = {"out", "resume", "strategy"}  # folders, and the strategy, which every label names anyway


def clean(text: object) -> str:
    """`text` on one line with printable characters only, which is safe in a terminal and in SVG."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(str(text).split()))


def words(key: str) -> str:
    """A metric's key as words: token_accuracy is token accuracy."""
    return clean(key.replace("_", " "))


def plain(value: object) -> str:
    """A setting's value as text, without quotes and brackets."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{clean(key)}: {plain(item)}" for key, item in value.items())
    return clean(value)


def differences(runs: Sequence[Run], also: Sequence[str] = ()) -> dict[str, list[str]]:
    """The settings that differ between runs: dotted key -> the value in each run.

    Args:
        runs: the runs to compare.
        also: keys to include that are left out otherwise, such as `strategy`.
    """
    flat = [_flatten(run.config) for run in runs]
    rows = {key: [settings.get(key, ABSENT) for settings in flat] for key in sorted(set().union(*flat))}
    for key in [key for key in rows if key.startswith("data.source.")]:
        if rows.get(key.replace("source.", "")) == rows[key]:
            rows.pop(key)  # it only repeats the value of its group
    return {
        key: row
        for key, row in rows.items()
        if len(set(row)) > 1 and (key in also or key not in _NOT_SETTINGS)
    }


def labels(runs: Sequence[Run]) -> list[str]:
    """A label for each run: the strategy, and the settings that distinguish runs of the same strategy."""
    names = [clean(run.strategy) for run in runs]
    for name in [name for name, count in Counter(names).items() if count > 1]:
        members = [at for at, other in enumerate(names) if other == name]
        for at, suffix in zip(members, _suffixes([runs[at] for at in members]), strict=True):
            names[at] = name + suffix
    return names


def _suffixes(runs: Sequence[Run]) -> list[str]:
    # Settings of the evaluation do not distinguish what was trained.
    settings = {key: row for key, row in differences(runs).items() if not key.startswith("evaluate.")}
    alone = [key for key, row in settings.items() if len(set(row)) == len(runs)]
    if len(settings) > 3 and len(alone) == 1:  # such as epsilon, beside runs without privacy
        settings = {alone[0]: settings[alone[0]]}
    if 0 < len(settings) <= 3:
        # A key that several groups repeat, such as the seed, is named once.
        once = {(key.rsplit(".", 1)[-1], *row): row for key, row in settings.items()}
        short = [key for key, *_ in once]
        suffixes = [
            "".join(f", {key} {value}" for key, value in zip(short, row, strict=True))
            for row in zip(*once.values(), strict=True)
        ]
        if len(set(suffixes)) == len(suffixes):
            return suffixes
    folders = [run.path.name for run in runs]
    distinct = len(set(folders)) == len(folders)
    return [f" ({clean(run.path.name if distinct else run.path)})" for run in runs]


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys to printed values; `strategy._target_` becomes `strategy`, its value the class name."""
    flat = {}
    for key, value in config.items():
        name = f"{prefix}{clean(key)}"
        if isinstance(value, dict) and value and all(isinstance(inner, str) for inner in value):
            flat.update(_flatten(value, f"{name}."))
        elif key == "_target_" and prefix:
            *_, owner, last = ["", *plain(value).split(".")]
            flat[prefix[:-1]] = f"{owner}.{last}" if owner[:1].isupper() else last  # a class method
        else:
            flat[name] = plain(value)
    return flat
