"""What the classes that a configuration names say of their settings: fields, defaults and docstrings.

A default is written once, in its class: a strategy needs no YAML file, and in a YAML file a key without a
value has the default of its class. The files of the classes are read and not imported. Composing a
configuration would otherwise import torch, which takes longer than all else that some commands do.
"""

import ast
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ARGUMENT = re.compile(r"^ {8}(\w+): (.*?)(?=^ {8}\w+: |^ {0,4}\S|\Z)", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Choice:
    """One strategy as a choice of its group.

    Args:
        target: its class, as a configuration names it.
        settings: its fields and their defaults.
        comments: field -> what its docstring says of it.
    """

    target: str
    settings: dict[str, Any]
    comments: dict[str, str]

    @property
    def node(self) -> dict[str, Any]:
        """The content that a YAML file of this choice would have."""
        return {"_target_": self.target, **self.settings}


@cache
def choices() -> dict[str, Choice]:
    """The packaged strategies whose settings are their own fields alone, by their names in lower case."""
    found = {}
    for name, node in _classes("fedlora.strategies").items():
        if any(isinstance(base, ast.Name) and base.id == "Strategy" for base in node.bases):
            text = ast.get_docstring(node, clean=False) or ""
            said = {name: " ".join(words.split()).rstrip(".") for name, words in ARGUMENT.findall(text)}
            settings = _defaults(node)
            comments = {field: said.get(field, "") for field in settings}
            found[name.lower()] = Choice(f"fedlora.strategies.{name}", settings, comments)
    return found


def filled(node: Any) -> Any:
    """A part of a YAML file in which keys without a value, beside a `_target_` of ours, have its defaults."""
    if isinstance(node, list):
        return [filled(item) for item in node]
    if not isinstance(node, dict):
        return node
    target = str(node.get("_target_"))
    defaults = class_defaults(target) if target.startswith("fedlora.") else {}
    return {key: defaults.get(key) if value is None else filled(value) for key, value in node.items()}


@cache
def class_defaults(target: str) -> dict[str, Any]:
    """The defaults of the fields of a class of fedlora's, those of its parents in the same place included.

    Args:
        target: as a configuration names it: the class in its room or module, or a class method of it.

    Returns:
        Field -> default, where that is written as a plain value; empty where the target is no class.
    """
    place, _, name = target.rpartition(".")
    if name not in _classes(place):
        place, _, name = place.rpartition(".")
    nodes, found = [_classes(place).get(name)], dict[str, Any]()
    for node in nodes:
        if node is not None:
            found = _defaults(node) | found
            nodes += [_classes(place).get(base.id) for base in node.bases if isinstance(base, ast.Name)]
    return found


@cache
def _classes(place: str) -> dict[str, ast.ClassDef]:
    """The classes of a room of fedlora's, or of one module there, by their names."""
    room, *rest = place.split(".")[1:] or [""]
    spec = find_spec(f"fedlora.{room}") if room else None  # to find a module in it would import the room
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(next(iter(spec.submodule_search_locations)), *rest)
    files = sorted(folder.glob("[a-z]*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    nodes = [node for file in files if file.is_file() for node in ast.parse(file.read_text("utf-8")).body]
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def _defaults(node: ast.ClassDef) -> dict[str, Any]:
    """Field -> default, of a class's own fields."""
    found = {}
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
            with suppress(ValueError):  # a default that is computed
                value = ast.literal_eval(line.value)
                found[line.target.id] = list(value) if isinstance(value, tuple) else value
    return found
