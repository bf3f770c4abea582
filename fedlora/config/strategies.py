"""The choices of `strategy=` that need no YAML: a strategy's own fields and docstring are its settings.

The files are read and not imported. Composing a configuration would otherwise import torch, which takes
longer than all else that some commands do.
"""

import ast
import re
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
    spec = find_spec("fedlora.strategies")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(next(iter(spec.submodule_search_locations)))
    found = {}
    for file in sorted(folder.glob("[a-z]*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any(_is_strategy(base) for base in node.bases):
                found[node.name.lower()] = _choice(node)
    return found


def _is_strategy(base: ast.expr) -> bool:
    return isinstance(base, ast.Name) and base.id == "Strategy"


def _choice(node: ast.ClassDef) -> Choice:
    fields = [line for line in node.body if isinstance(line, ast.AnnAssign) and line.value is not None]
    settings = {
        line.target.id: _plain(ast.literal_eval(line.value))
        for line in fields
        if isinstance(line.target, ast.Name) and line.value is not None
    }
    text = ast.get_docstring(node, clean=False) or ""
    said = {name: " ".join(words.split()).rstrip(".") for name, words in ARGUMENT.findall(text)}
    return Choice(
        f"fedlora.strategies.{node.name}", settings, {name: said.get(name, "") for name in settings}
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
