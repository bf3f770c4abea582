"""One run from a configuration, with a display in the terminal."""

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from fedlora.callbacks.console import ConsoleProgress
from fedlora.config.translate import folder_of, run_spec
from fedlora.runner.run import Run, new_folder


def run_job(config: DictConfig, console: Console) -> Path:
    """Run a new federation, or what is left of an old one, and write its folder.

    Args:
        config: composed, every reference resolved.
        console: where to show progress.

    Returns:
        The run's folder.

    Raises:
        FedLoraError: it cannot run, or nothing came of it.
    """
    spec = run_spec(config)
    resumed = config.resume is not None
    path = Path(config.resume) if resumed else folder_of(config) or new_folder(spec)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    return Run(spec, path, resumed, [ConsoleProgress(console)], say, console).go()
