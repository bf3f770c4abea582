"""Keyword arguments that stand for the fields of `Settings`: shown in notebooks, and named in messages."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar, cast

from .settings import Settings
from .words import in_python

Function = TypeVar("Function", bound=Callable[..., Any])


def takes_settings(function: Function) -> Function:
    """Show the fields of `Settings` in the place of `**settings`, in the signature and in the help text.

    What the function raises names its arguments, where the command line would name keys.
    """

    @wraps(function)
    def called(*given: Any, **settings: Any) -> Any:
        with in_python():
            return function(*given, **settings)

    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    defaults = Settings()
    named = {parameter.name for parameter in own}
    more = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(defaults, field.name),
            annotation=field.type,
        )
        for field in fields(Settings)
        if field.name not in named
    ]
    called.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    _, _, said = (Settings.__doc__ or "").partition("Args:\n")
    called.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nSettings:\n{said.rstrip()}\n"
    return cast(Function, called)
