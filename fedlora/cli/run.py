"""`fedlora run`: one federation, or with -m many."""

from pathlib import Path

import click

from .words import Raw


@click.command(cls=Raw, add_help_option=False, short_help="One federation; -m sweeps over values.")
def command(words: tuple[str, ...]) -> None:
    """Compose the configuration and run it; Hydra itself takes over for its own flags, such as -m."""
    from fedlora.config import composition

    if {"-h", "--help"}.intersection(words):
        from fedlora.config.explain import explained

        print(explained([word for word in words if not word.startswith("-")]), end="")
        return
    resume = next((composition.path_said(word) for word in words if word.startswith("resume=")), None)
    many = {"-m", "--multirun"}.intersection(words)
    if many or (resume and _of_sweep(Path(resume))):
        from fedlora.cli.sweep import sweep

        sweep(words if many else ["-m", *words])
        return
    if any(word.startswith("-") for word in words):
        from fedlora.cli.sweep import hydra_s_own

        hydra_s_own(words)
        return
    from rich.console import Console

    from fedlora.cli.run_job import run_job
    from fedlora.config.resume import continued
    from fedlora.runner.results import closing

    config = continued(Path(resume), words) if resume else composition.compose(words)
    print(closing(run_job(config, Console())))


def _of_sweep(folder: Path) -> bool:
    from fedlora.report.read import SWEEP  # imports matplotlib, half a second that few commands need

    return (folder / SWEEP).is_file()
