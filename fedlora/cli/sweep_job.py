"""One job of a sweep: a run in a folder that is named by what is swept, gone on with where it was left."""

import hashlib
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from fedlora.cli.run_job import run_job
from fedlora.config import composition
from fedlora.config.instantiate import Trust, differences, kept
from fedlora.config.translate import settled
from fedlora.errors import ConfigError, FedLoraError
from fedlora.report.read import ERROR, number, read_run
from fedlora.runner.results import closing
from fedlora.storage.atomic import write_whole
from fedlora.storage.run_folder import RunFolder

LONGEST = 120  # characters of a folder's name


@dataclass(frozen=True)
class Sweep:
    """A sweep, as its jobs have to know it.

    Args:
        folder: of all its runs.
        pairs: settings that change together, a job each; multiplied with what else is swept.
        trust: what the command line grants.
        fixed: keys that are the same in all jobs.
    """

    folder: Path
    pairs: tuple[Mapping[str, Any], ...] = ()
    trust: Trust = field(default_factory=Trust)
    fixed: frozenset[str] = frozenset()

    def name(self, overrides: Sequence[str]) -> str:
        """The folder of a job: what is swept, as far as a file system takes it."""
        settings = []
        for override in overrides:
            key, _, value = override.lstrip("+").partition("=")
            if key == "pair":
                settings += [f"{key}={value}" for key, value in self.pairs[int(value[1:])].items()]
            elif key not in self.fixed:
                settings.append(f"{key}={value}")
        whole = ",".join(settings).replace(" ", "").replace("'", "") or "run"
        safe = re.sub(r"[^\w=.,+\[\]{}:()-]", "-", whole)
        if safe == whole and len(safe) <= LONGEST:
            return safe
        return f"{safe[:LONGEST]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"

    def run(self, config: DictConfig, overrides: Sequence[str]) -> float | None:
        """One job: the headline metric where it has finished, now or before, and None where it failed."""
        path = self.folder / self.name(overrides)
        try:
            composition.resolve(config)
            config = settled(self.trust.into(config))
            config.out, config.pairs = str(path), []
            if (path / "config.yaml").is_file():
                if names := differences(kept(config), path, {"out", "resume"}):
                    raise ConfigError(
                        f"out: '{path}' holds a run with other settings ({', '.join(names)}); name another "
                        "folder"
                    )
                if RunFolder(path).finished:
                    return _headline(path)
                config.resume = str(path)
            print(closing(run_job(config, Console())))
        except Exception as error:  # whatever it is, the other jobs go on
            expected = isinstance(error, FedLoraError | OmegaConfBaseException | HydraException)
            why = " ".join(str(error).split()) if expected else f"unexpected {type(error).__name__}: {error}"
            text = f"{path.name}: {' '.join(why.split())}\n" + ("" if expected else traceback.format_exc())
            write_whole(path / ERROR, lambda file: file.write_text(text, encoding="utf-8"))
            print(f"fedlora: failed: {text.splitlines()[0]}", file=sys.stderr)
            return None
        (path / ERROR).unlink(missing_ok=True)
        return _headline(path)


def _headline(path: Path) -> float | None:
    run = read_run(path)
    return number(run.summary.get(run.metric))
