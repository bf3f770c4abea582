"""What `fedlora run --help` says: every key with its default and the comment in its YAML file."""

import re
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlora.config import class_fields, composition
from fedlora.errors import ConfigError

from .sources import hydra_here

LINE = re.compile(r"^( *)(\w+):(.*)$")
WIDTH = 44  # columns before a comment


def comments(group: str | None = None, choice: str | None = None) -> dict[str, str]:
    """Key -> comment of a group's files, or of the keys that belong to none.

    A key that several choices have is explained in one of them at least; the choice's own words come first.
    """
    folder = resources.files("fedlora.config.conf")
    files = [folder / "config.yaml"]
    if group is not None:
        files = [file for file in (folder / group).iterdir() if file.name.endswith(".yaml")]
        files.sort(key=lambda file: (file.name != f"{choice}.yaml", file.name))
    found: dict[str, str] = {}
    for file in files:
        text = file.read_text(encoding="utf-8")
        above: list[tuple[int, str]] = [] if group is None or "@package" in text else [(-1, group)]
        for line in text.splitlines():
            if match := LINE.match(line):
                indent = len(match[1])
                above = [*(pair for pair in above if pair[0] < indent), (indent, match[2])]
                said = match[3].partition(" #")[2].strip()
                if said:
                    found.setdefault(".".join(name for _, name in above), said)
    return found


def keys(config: DictConfig) -> Iterator[tuple[str, Any]]:
    """Every key that a user may set, with its value; not how objects are made of them."""

    def walk(node: Any, place: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if str(name).startswith("_") or (place, name) in (("data", "source"), ("model", "source")):
                continue
            key = f"{place}.{name}" if place else str(name)
            if isinstance(value, dict) and value:
                yield from walk(value, key)
            else:
                yield key, value

    yield from walk(OmegaConf.to_container(config, resolve=False), "")


def explained(words: Sequence[str] = ()) -> str:
    """The text of `fedlora run --help`.

    Args:
        words: choices of groups and values, whose keys are then shown.

    Raises:
        ConfigError: an unknown key, group choice or value.
    """
    composition.register()
    try:
        with hydra_here():
            groups = composition.groups()
            whole = hydra.compose("config", list(words), return_hydra_config=True)
            chosen = dict(whole.hydra.runtime.choices)
            config = hydra.compose("config", list(words))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(composition.one_line(error)) from error
    said = comments()
    for group in groups.keys() - {"experiment"}:  # says why a study sets what, and not what a key means
        said |= comments(group, chosen.get(group))
    own = class_fields.choices().get(str(chosen.get("strategy")))
    said |= {f"strategy.{name}": words for name, words in own.comments.items()} if own else {}
    lines = ["fedlora run [GROUP=CHOICE] [KEY=VALUE] ...", "", "Groups:"]
    lines += [f"  {group}={'|'.join(found)}" for group, found in groups.items()]
    lines += ["", "Keys, their defaults with these choices, and what they mean:", ""]
    for key, value in keys(config):
        plain = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        lines.append(f"{f'  {key}={plain}':{WIDTH}}  {said.get(key, '')}".rstrip())
    lines += ["", "fedlora run GROUP=CHOICE --help shows the keys of another choice, such as data=files."]
    lines += ["-m sweeps over comma-separated values: fedlora run -m strategy=fedit,flexlora seed=0,1"]
    return "\n".join(lines) + "\n"
