"""`fedlora export`: a run's adapter in PEFT's files, or a merged model."""

from pathlib import Path

import click

from .words import run_folder, trusted


@click.command(short_help="The adapter in PEFT's files, or a merged model.")
@click.option("--to", required=True, metavar="DIR", help="A new folder.")
@click.option("--merge", is_flag=True, help="Write the whole model with ΔW added to its weights.")
@click.option(
    "--client", type=int, metavar="N", help="Write the adapter of one client (personal strategies)."
)
@run_folder("the folder of a run.")
def command(run: str, words: tuple[str, ...], to: str, merge: bool, client: int | None) -> None:
    """Write a run's adapter, or a merged model, into a new folder."""
    from fedlora.saved_runs.export import export, export_own

    if client is not None and merge:
        raise click.UsageError("--merge: a client's own model is exported as an adapter; leave --merge out")
    if client is not None:
        print(export_own(Path(run), client, Path(to), trusted(words)))
    else:
        print(export(Path(run), Path(to), merge, trusted(words)))
