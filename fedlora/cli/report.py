"""`fedlora report`: one HTML page about a run or several."""

from pathlib import Path

import click


@click.command(short_help="One HTML page about a run, or several.")
@click.argument("runs", nargs=-1, required=True, metavar="DIR...")
@click.option(
    "--to",
    metavar="FILE",
    help="The page's file; default: report.html in DIR, or in this folder for several.",
)
def command(runs: tuple[str, ...], to: str | None) -> None:
    """Write an HTML page about the finished runs or sweeps in DIR..., and PNG and CSV files beside it."""
    from fedlora.config.defaults import defaults
    from fedlora.report import missing, read_runs, runs_table, seeds_table, write_files, write_report

    for path, jobs in ((path, jobs) for path in runs if (jobs := missing(path))):
        shown = ", ".join(jobs[:3]) + (", ..." if len(jobs) > 3 else "")
        print(f"{len(jobs)} runs of the sweep in {path} are missing: {shown}; fedlora run -m resume={path}")
    found = [*{run.path: run for path in runs for run in read_runs(path)}.values()]
    place = Path(to) if to else Path(runs[0] if len(runs) == 1 else ".")  # a run's page is about that run
    if place.is_dir() or not place.suffix:  # beside the page lies a folder of its name
        place = place / "report.html"
    written = write_report(found, place, defaults())
    beside = write_files(found, written.with_suffix(""))
    (seeds_table(found) or runs_table(found)).show()
    print(f"{written}\npictures and numbers: {beside}")
