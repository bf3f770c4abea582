"""`fedlora verify`: does plain PEFT give what the run says?"""

from pathlib import Path

import click

from .words import run_folder, trusted


@click.command(short_help="Load a run's adapter with plain PEFT and compare.")
@run_folder("the folder of a finished run.")
def command(run: str, words: tuple[str, ...]) -> None:
    """Check a run's hash, and that plain PEFT gives its logits and accuracy."""
    from fedlora.saved_runs.export import verify

    print(verify(Path(run), trusted(words)))
