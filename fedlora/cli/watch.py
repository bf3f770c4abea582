"""`fedlora watch`: a run, or the runs of a sweep, followed live from their files."""

import time
from contextlib import ExitStack
from pathlib import Path

import click

LOOK = 1.0  # seconds between two looks at the files
GAP = 60.0  # seconds that a sweep may take to begin its next job


@click.command(short_help="Follow a run, or the runs of a sweep, while it goes on.")
@click.argument("folder", metavar="DIR")
@click.option("--once", is_flag=True, help="Print the present state and end.")
def command(folder: str, once: bool) -> None:
    """Follow what runs in DIR until it has ended: rounds, metric, clients, epsilon, bytes, time left.

    DIR is the folder of a run, of a sweep, or one in which runs lie side by side, such as a server's. Its
    files are read and nothing is written, so that any number of terminals may watch. On a terminal a picture
    is kept up to date; anywhere else a line is printed for every round. The exit code is 1 if a run has died
    or failed.
    """
    from rich.console import Console
    from rich.live import Live

    from fedlora.report.live import ending, picture, round_line, unfinished
    from fedlora.report.progress import read_all

    console, shown, quiet = Console(highlight=False), dict[Path, int](), 0.0
    with ExitStack() as stack:
        live = None
        if console.is_terminal and not once:
            live = stack.enter_context(Live(console=console, refresh_per_second=4))
        while True:
            runs, waiting = read_all(folder)
            if live is not None:
                live.update(picture(runs, waiting))
            for run in runs if live is None and not once else ():
                name = "" if len(runs) == 1 and not waiting else f"{run.path.name}  "
                for line in run.metrics[shown.get(run.path, 0) :]:
                    console.print(f"{name}{round_line(run, line)}", markup=False, soft_wrap=True)
                shown[run.path] = max(shown.get(run.path, 0), len(run.metrics))
            stages = {run.stage for run in runs}
            going = "running" in stages
            # A run that seems to have died may be about to take hold of its folder: look once more.
            patience = GAP if waiting and not once else LOOK if "died" in stages else 0.0
            if (once and going) or (not going and quiet >= patience):
                break
            quiet = 0.0 if going else quiet + LOOK
            time.sleep(LOOK)
    if once:
        console.print(picture(runs, waiting), soft_wrap=True)
    for run in runs:
        console.print(ending(run), markup=False, soft_wrap=True)
    if waiting:
        console.print(unfinished(Path(folder), waiting), markup=False, soft_wrap=True)
    if stages & {"died", "failed"}:
        raise SystemExit(1)
