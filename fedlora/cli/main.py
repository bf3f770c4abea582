"""The `fedlora` command. Each verb is a file of this folder, and is imported when it is asked for.

A wrong key, value, file or column ends in one line on standard error and exit code 2; anything unexpected
leaves its traceback in a file, one line that names it, and exit code 1.
"""

import atexit
import errno
import gc
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

# Set before torch and transformers are imported: no telemetry, no parallel tokenizers to warn about, and
# threads that wait asleep, so that two jobs on one machine slow each other by two and not by a hundred.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click

import fedlora
from fedlora.errors import FedLoraError

VERBS = ("demo", "run", "watch", "compare", "report", "export", "verify", "replay", "privacy", "deploy")
# What the operating system says of a path that is not there, or not what it is meant to be.
PATHS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)

# Notices of one library about another are no business of the user's.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


class Verbs(click.Group):
    """The verbs, in the order in which a newcomer needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a verb."""
        if cmd_name not in VERBS:
            raise click.UsageError(
                f"unknown verb '{cmd_name}'; there are {', '.join(VERBS)} (fedlora --help)"
            )
        command: click.Command = import_module(f"fedlora.cli.{cmd_name}").command
        return command


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fedlora.__version__, message="%(version)s")
def cli() -> None:
    """Federated LoRA: fine-tune one language model over text that cannot be pooled."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `fedlora` command."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Modules, weights and tokens stay. Looking for garbage among them takes a fifth of the time until round 1
    # (a session that begins enables it again) and a second at the end.
    gc.disable()
    atexit.register(gc.freeze)
    warnings.formatwarning = _notice
    try:
        _invoke(words or ["--help"])
    except click.exceptions.Exit as done:
        if done.exit_code:
            raise SystemExit(done.exit_code) from None
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help() if error.ctx else "")
    except click.ClickException as error:
        where = getattr(error, "ctx", None)
        hint = f"; see {where.command_path} --help" if where and where.parent else ""
        _fail(f"{error.format_message().rstrip('.')}{hint}", 2)
    except FedLoraError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt as stop:  # a run that has begun says how it goes on
        _fail(str(stop) or "interrupted", 130)
    except PermissionError as error:
        _fail(f"'{error.filename}': {error.strerror}; name another folder, or let yourself write there", 2)
    except Exception as error:
        _unexpected(error)
    finally:
        gc.enable()


def _invoke(words: list[str]) -> None:
    """Run a verb; click's own `main` would print a usage text and swallow an interrupt's words."""
    with cli.make_context("fedlora", words) as context:
        cli.invoke(context)


def _unexpected(error: Exception) -> None:
    """End with one line for what nobody has foreseen, the traceback in a file."""
    if isinstance(error, PATHS) and error.filename is not None:
        _fail(f"'{error.filename}': {error.strerror}; check the path", 2)
    if _disk_is_full(error):
        _fail(
            "the disk is full; make room and say it again; a run goes on by fedlora run resume=DIR",
            1,
        )
    log = Path("fedlora-error.log").absolute()
    text = "".join(traceback.format_exception(error))
    try:
        log.write_text(text, encoding="utf-8")
    except OSError:
        log = Path(tempfile.mkdtemp(prefix="fedlora-")) / log.name
        log.write_text(text, encoding="utf-8")
    _fail(f"unexpected {type(error).__name__}: {error}; the traceback is in {log}", 1)


def _disk_is_full(error: Exception) -> bool:
    """Whether this is an operating system's refusal for want of room; safetensors tells it in words."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"(os error {code})" in str(error) for code in full)


def _notice(message: Warning | str, *where: Any, **more: Any) -> str:
    """A warning as a line for the user, without the line of source that raised it."""
    return f"fedlora: {message}\n"


def _fail(message: str, code: int) -> None:
    print(f"fedlora: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
