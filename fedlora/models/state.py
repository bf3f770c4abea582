"""What a model writes into its own modules during a pass, found and put back.

Some models of transformers keep something in their modules: recurrent states (RecurrentGemma), frequencies
that follow the longest row (dynamic and longrope RoPE), another kind of attention for short rows (BigBird).
Then a pass depends on those before it, and two threads disturb each other. Within `put_back` a pass begins
from the model as it was loaded, and leaves it so.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

# What every module has, and no pass changes: hooks, the mode. Parameters are frozen.
ORDINARY = frozenset(vars(nn.Module())) - {"_buffers", "_modules"}
Entries = list[tuple[nn.Module, dict[str, Any]]]


class Kept:
    """A model's modules as they were when this was made: their attributes, buffers and submodules.

    While it is in force, buffers and tensors that are attributes are copies, so that what writes into them in
    place leaves the originals alone. Parameters are not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before: Entries = [(module, _attributes(module)) for module in model.modules()]
        self._copies: dict[int, tuple[Tensor, Tensor, int]] = {}
        for module, _ in self._before:
            for held in (vars(module), module._buffers):
                for name, value in list(held.items()):
                    if isinstance(value, Tensor):
                        held[name] = self._copy(value)
        self._during: Entries = [(module, _attributes(module)) for module, _ in self._before]

    @property
    def changed(self) -> bool:
        """Whether anything is not what it was."""
        if any(copy._version != version for _, copy, version in self._copies.values()):
            return True
        return any(not _same(module, attributes) for module, attributes in self._during)

    def restore(self) -> None:
        """Put everything back."""
        for module, attributes in self._before:
            held = vars(module)
            for name in [name for name in held if name not in attributes and name not in ORDINARY]:
                del held[name]
            for name, (value, inner) in attributes.items():
                held[name] = value
                if isinstance(value, dict):
                    value.clear()
                    value.update(inner)
                elif isinstance(value, list):
                    value[:] = inner

    def _copy(self, value: Tensor) -> Tensor:
        if id(value) not in self._copies:
            copy = value.clone()
            self._copies[id(value)] = (value, copy, copy._version)
        return self._copies[id(value)][1]


@contextmanager
def put_back(model: nn.Module) -> Iterator[Kept]:
    """Within it the model may write into its modules; afterwards they are what they were. For one thread."""
    kept = Kept(model)
    try:
        yield kept
    finally:
        kept.restore()


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Name -> the value, and what it holds if it is a dictionary or a list."""
    return {
        name: (value, value.copy() if isinstance(value, dict | list) else None)
        for name, value in vars(module).items()
        if name not in ORDINARY
    }


def _same(module: nn.Module, attributes: dict[str, Any]) -> bool:
    held = vars(module)
    if sum(name not in ORDINARY for name in held) != len(attributes):
        return False
    for name, (value, inner) in attributes.items():
        found = held.get(name, held)
        if found is not value:
            if not (isinstance(value, int | float | str) and found == value):
                return False
        elif isinstance(value, dict):
            if value.keys() != inner.keys() or any(value[key] is not inner[key] for key in inner):
                return False
        elif isinstance(value, list) and list(map(id, value)) != list(map(id, inner)):
            return False
    return True
