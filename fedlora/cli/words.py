"""Commands that take the words of `fedlora run`, and what the command line grants."""

from collections.abc import Callable
from typing import Any

import click


class Raw(click.Command):
    """A command that is given its words as they are, flags of Hydra's among them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take all words."""
        ctx.params["words"] = tuple(args)
        return []


# Hydra's overrides, after the command's own options.
overrides = click.argument("words", nargs=-1, metavar="[KEY=VALUE]...", type=click.UNPROCESSED)


def run_folder(help: str) -> Callable[[Any], Any]:
    """The argument RUN, and words such as allow=[module] after it."""

    def added(function: Any) -> Any:
        function.__doc__ = f"{function.__doc__}\n\n    RUN is {help}"
        return click.argument("run", metavar="RUN")(overrides(function))

    return added


def trusted(words: tuple[str, ...]) -> Any:
    """What words such as allow=[module] grant; no others may be there.

    Raises:
        UsageError: another word.
    """
    from fedlora.config.instantiate import Trust

    trust, rest = Trust.said(words)
    if rest:
        raise click.UsageError(f"unexpected '{rest[0]}'; say allow=[module] or model.allow_pickle=true here")
    return trust
