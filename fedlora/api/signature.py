"""Keyword arguments that stand for the fields of `Settings`, shown where a notebook looks for them."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from .settings import Settings

Function = TypeVar("Function", bound=Callable[..., Any])


def takes_settings(function: Function) -> Function:
    """Show the fields of `Settings` in the place of `**settings`, in the signature and in the help text."""
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
    function.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    _, _, said = (Settings.__doc__ or "").partition("Args:\n")
    function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nSettings:\n{said.rstrip()}\n"
    return function
