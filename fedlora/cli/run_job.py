"""One run from a configuration, with a display in the terminal."""

from contextlib import AbstractContextManager
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from fedlora.callbacks.console import Display, Progress
from fedlora.config.translate import folder_of, run_spec
from fedlora.runner.run import Run, new_folder
from fedlora.runner.session import Session


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

    def shown(session: Session) -> AbstractContextManager[Display]:
        private = spec.privacy is not None
        return Progress(spec.rounds, session.done, session.assembly.metric, console, private)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    return Run(spec, path, resumed, shown, say, console).go()
