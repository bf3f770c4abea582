"""Values as named tensors and a form that JSON can hold, and back: how tasks travel and states are kept.

The name of a tensor is its path through the values, such as `adapter/MODULE.A` or `memory/NAME`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.method import MethodPart
from fedlora.core.parametrization import LORA
from fedlora.errors import ConfigError


def pack(values: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Values by name as tensors and one line of JSON.

    Raises:
        ConfigError: a value of a kind that does not travel; `MethodPart` lists those that do.
    """
    tensors: dict[str, Tensor] = {}
    forms = {name: _form(name, value, tensors) for name, value in values.items()}
    return tensors, json.dumps(forms, separators=(",", ":"))


def unpack(tensors: Mapping[str, Tensor], header: str) -> dict[str, Any]:
    """The values that `pack` packed.

    Raises:
        KeyError: a tensor is missing.
        ConfigError: a part of a class that this process has not imported.
    """
    return {name: _value(name, form, tensors) for name, form in json.loads(header).items()}


def _form(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """The form of a value, its tensors put under the name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, frozenset):
        return {"set": sorted(value)}
    if isinstance(value, Tensor):
        tensors[name] = value.contiguous()
        return {"tensor": None}
    if isinstance(value, Pair):
        tensors.update((f"{name}.{factor}", tensor.contiguous()) for factor, tensor in value.factors())
        return {"pair": value.scale}
    if isinstance(value, Adapter):
        scales = {m: _form(f"{name}/{m}", pair, tensors)["pair"] for m, pair in value.pairs.items()}
        tensors.update((f"{name}/{extra}", tensor.contiguous()) for extra, tensor in value.extra.items())
        form = {"form": _form(name, value.parametrization, tensors)} if value.parametrization != LORA else {}
        return {"adapter": {"scales": scales, "extra": list(value.extra), **form}}
    if isinstance(value, tuple):
        return {"tuple": [_form(f"{name}/{i}", item, tensors) for i, item in enumerate(value)]}
    if isinstance(value, Mapping):
        return {"map": {k: _form(f"{name}/{k}", item, tensors) for k, item in sorted(value.items())}}
    if isinstance(value, MethodPart) and is_dataclass(value):
        own = {f.name: _form(f"{name}/{f.name}", getattr(value, f.name), tensors) for f in fields(value)}
        return {"part": [_path(type(value)), own]}
    raise ConfigError(f"'{name}' is a {type(value).__name__}, which does not travel; see fedlora.core.method")


def _value(name: str, form: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value of a form whose tensors have the name."""
    if not isinstance(form, dict):
        return form
    ((kind, content),) = form.items()
    if kind == "set":
        return frozenset(content)
    if kind == "tensor":
        return tensors[name]
    if kind == "pair":
        return Pair(tensors[f"{name}.A"], tensors[f"{name}.B"], content)
    if kind == "adapter":
        pairs = {m: _value(f"{name}/{m}", {"pair": scale}, tensors) for m, scale in content["scales"].items()}
        extra = {own: tensors[f"{name}/{own}"] for own in content["extra"]}
        form = _value(name, content["form"], tensors) if "form" in content else LORA
        return Adapter(pairs, extra, form)
    if kind == "tuple":
        return tuple(_value(f"{name}/{i}", item, tensors) for i, item in enumerate(content))
    if kind == "map":
        return {key: _value(f"{name}/{key}", item, tensors) for key, item in content.items()}
    if kind == "part":
        path, own = content
        return _loaded(path)(**{field: _value(f"{name}/{field}", f, tensors) for field, f in own.items()})
    raise ValueError(f"'{name}' has the form '{kind}', which nobody packs")


def _loaded(path: str) -> type[MethodPart]:
    """The subclass of MethodPart of this name, of those that are there already; nothing is imported for it.

    A name in a message can be anyone's choice, so it is only ever compared with what this process has loaded
    by itself, of one class's subclasses.

    Raises:
        ConfigError: there is none.
    """
    found = {_path(kind): kind for kind in _below(MethodPart) if is_dataclass(kind)}
    if path not in found:
        raise ConfigError(
            f"'{path:.200}', a part of a task or adapter, is not loaded here; if you trust its module, "
            "import it where the client is made"
        )
    return found[path]


def _below(kind: type[MethodPart]) -> Iterator[type[MethodPart]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
