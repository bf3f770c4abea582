"""`fedlora replay`: a run's recorded updates, aggregated by another strategy."""

from pathlib import Path

import click

from .words import run_folder


@click.command(short_help="A run's recorded updates, aggregated by another strategy.")
@run_folder("the folder of a run with record_updates=true; say strategy=NAME and its settings after it.")
def command(run: str, words: tuple[str, ...]) -> None:
    """Aggregate the recorded updates of a run by another strategy."""
    from fedlora.config.instantiate import Trust
    from fedlora.saved_runs.replay import replay

    trust, rest = Trust.said(words)
    replay(Path(run), rest, trust).show()
