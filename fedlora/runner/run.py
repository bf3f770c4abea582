"""One run from a configuration to its folder, in one of three engines."""

import datetime
import gc
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid
from omegaconf import DictConfig
from rich.console import Console

from fedlora.callbacks.console import Display, Progress
from fedlora.config.instantiate import Trust, kept, read
from fedlora.core.messages import State, Task
from fedlora.deploy.known_sites import registered
from fedlora.engines.in_process import InProcessGrid
from fedlora.errors import CheckpointError, ConfigError, FedLoraError
from fedlora.privacy import DPSGD, ClientLevel, Ledger
from fedlora.privacy.client_level import ClientLevelMechanism
from fedlora.rounds.loop import ServerLoop
from fedlora.rounds.registry import ClientRegistry
from fedlora.runner import privacy_checks, privacy_report
from fedlora.runner.assemble import Assembly, assemble, fuse_of
from fedlora.runner.input_digests import check_inputs
from fedlora.runner.load_data import at_sites
from fedlora.runner.notices import notices
from fedlora.runner.results import ANSWERS, finish, opening, strategy_name, write_holdings
from fedlora.runner.task_file import TaskFile
from fedlora.runner.tracking import check, tracked
from fedlora.storage.run_folder import RunFolder
from fedlora.storage.update_log import UpdateLog
from fedlora.training.generation import scores


@dataclass
class ActiveRun:
    """A run that is about to go on, wherever its clients are.

    Args:
        config: composed, every reference resolved.
        job: what it needs, loaded and checked.
        folder: where it is written.
        state: after the rounds that are done.
        done: how many those are.
        began: when, by time.perf_counter.
        startup: seconds until here.
        held: keeps other processes from this run, until it is closed.
    """

    config: DictConfig
    job: Assembly
    folder: RunFolder
    state: State
    done: int
    began: float
    startup: float
    held: ExitStack

    @classmethod
    def begin(cls, config: DictConfig, path: Path) -> "ActiveRun":
        """Load and check everything, and make the folder, or go on with that of `config.resume`."""
        began, resumed = time.perf_counter(), config.resume is not None
        if not resumed and (path / "config.yaml").exists():
            RunFolder.create(path, "")  # says what is there, before anything is loaded
        folder = RunFolder(path)
        with ExitStack() as held:
            if resumed:
                held.enter_context(folder.hold())
            job = assemble(config)
            if resumed:
                if not folder.started:  # killed before its first checkpoint
                    folder.save_state(0, job.start)
                check_inputs(job, config, folder, resumed)
                done, state = folder.load_state()
                for last in ("summary.json", ANSWERS):
                    (path / last).unlink(missing_ok=True)
                folder.write_config(kept(config))
            else:
                folder = RunFolder.create(path, kept(config))
                held.enter_context(folder.hold())
                check_inputs(job, config, folder, resumed)
                done, state = 0, job.start
                folder.save_state(0, state)
            write_holdings(job, folder)
            TaskFile.of(job).write(folder)
            if not gc.isenabled():  # by the command, until here
                gc.freeze()
                gc.enable()
            startup = time.perf_counter() - began
            return cls(config, job, folder, state, done, began, startup, held.pop_all())

    def opening(self) -> str:
        """What is about to happen, in two lines or three, and a warning of each setting that seems odd."""
        said = opening(self.job, self.config, self.folder.path, self.done)
        return "\n".join([said, *(f"warning: {line}" for line in notices(self.job, self.config))])

    def go(self, grid: Grid, progress: Display, plan: Mapping[str, Any] | None = None) -> None:
        """Run the rounds that are left over the clients behind a grid, and write what there is to say.

        Args:
            grid: how clients are reached.
            progress: what the user sees.
            plan: what nodes on other machines have to know of the run before they take part.

        Raises:
            FedLoraError: no client sent anything good in any round.
        """
        tracker = tracked(self.config, self.folder, progress)
        try:
            self._go(grid, tracker or progress, plan)
        finally:
            if tracker is not None:
                tracker.close(self.folder.summary())

    def _go(self, grid: Grid, progress: Display, plan: Mapping[str, Any] | None) -> None:
        job, folder = self.job, self.folder
        initial: dict[str, Any] = scores(job.answers(job.initial()))
        if self.config.evaluate.every:
            initial |= job.named(*job.evaluate([job.initial()])[0])
        if plan is None:  # else every site checks its own
            privacy_checks.check_ledgers(job.privacy, folder)
        central = _central(job, folder)
        federation = ServerLoop(
            job.strategy,
            self.state,
            ClientRegistry(
                job.peer,
                max(job.ranks),
                progress.warn,
                plan,
                registered() if plan else None,
                job.strategy.mixed_ranks,
            ),
            job.rules,
            job.evaluate,
            job.named,
            folder,
            progress,
            self.done,
            partial(self._spent, plan is not None),
            central,
            job.robust,
            UpdateLog(folder.path) if self.config.get("record_updates") else None,
        )
        federation.run(grid)
        own = federation.last_look(grid)
        rounds = folder.rounds()
        if central and not any(line["epsilon"] for line in rounds):
            raise FedLoraError(
                f"no round released anything, no sum of updates was known; the reasons are in {folder.path}/"
                "clients.jsonl and in the warnings above"
            )
        if not central and not any(line["clients"] for line in rounds):
            raise FedLoraError(
                f"no client sent a good update in any round; the reasons are in {folder.path}/clients.jsonl"
            )
        ledgers = self._ledgers(plan is not None, [])
        answers = job.answers(Task(federation.state.whole()))
        before = sum(line["seconds"] for line in folder.rounds()[: self.done])
        seconds = {
            "startup_seconds": self.startup,
            "wall_seconds": before + time.perf_counter() - self.began,
        }
        finish(job, self.config, folder, federation.state, initial, seconds, own, ledgers, answers)

    def _ledgers(self, apart: bool, lines: Sequence[Mapping[str, Any]]) -> dict[int, Ledger]:
        """What was spent; where clients keep their ledgers on machines of their own, by what they tell."""
        if apart and isinstance(self.job.privacy, DPSGD):
            return privacy_checks.told_ledgers([*self.folder.clients(), *lines], self.job.privacy.accountant)
        return self.folder.ledgers()

    def _spent(self, apart: bool, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What privacy has cost so far, for the line of a round; nothing to say without any."""
        if self.job.privacy is None:
            return {}
        return privacy_report.spent(self.job.privacy, self._ledgers(apart, lines).values())


def run_job(config: DictConfig, console: Console) -> Path:
    """Run a new federation, or what is left of an old one, and write its folder.

    Args:
        config: composed, every reference resolved.
        console: where to show progress.

    Returns:
        The run's folder.
    """
    path = Path(config.resume) if config.resume is not None else _out(config)
    if config.get("pairs"):
        raise ConfigError("pairs: one run cannot have several settings of a kind; say fedlora run -m")
    check(config)
    if config.engine.name == "deploy":
        from fedlora.deploy.submit import deploy

        return deploy(config, path, console)
    if at_sites(config):
        raise ConfigError(
            "data=sites: the rows are at the sites, on other machines; say engine=deploy, or data=files"
        )
    run = ActiveRun.begin(config, path)
    with run.held:
        console.print(run.opening(), soft_wrap=True, highlight=False, markup=False)
        try:
            _on_engine(run, console)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; fedlora run resume={path} goes on from the last whole round"
            ) from None
    return path


def _on_engine(run: ActiveRun, console: Console) -> None:
    """Run what is left of a federation over Ray's actors or in this process."""
    config, job = run.config, run.job
    with Progress(config.rounds, run.done, job.metric, console, job.privacy is not None) as progress:
        if config.engine.name == "ray":
            from fedlora.engines.ray import simulate

            simulate(run, progress)
        else:
            site = replace(job.site, memory=run.folder.memory)
            grid = InProcessGrid(site, job.nodes(), fuse_of(config.engine.fuse), progress.advance)
            run.go(grid, progress)


def continued(path: Path, overrides: list[str]) -> DictConfig:
    """The configuration to resume a run with: its own, with more rounds if `rounds=N` says so.

    Raises:
        CheckpointError: the folder holds no run, or one that is finished.
        ConfigError: an override that would make it another run.
    """
    trust, overrides = Trust.said(overrides)
    config = read(path, trust)
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "resume":
            continue
        if key != "rounds" or not value.isdigit():
            raise ConfigError(f"resume: only rounds=N can change when a run is continued, got '{override}'")
        privacy_checks.more_rounds(config, int(value))
        config.rounds = int(value)
    folder = RunFolder(path)
    last = folder.rounds()[-1:]
    if last and last[0]["round"] > config.rounds:
        raise ConfigError(f"resume: rounds={config.rounds}, but {last[0]['round']} are done")
    if folder.finished and last and last[0]["round"] >= config.rounds:
        raise CheckpointError(
            f"resume: '{path}' has finished its {config.rounds} rounds; say rounds=N to add some"
        )
    config.resume = str(path)
    return config


def _out(config: DictConfig) -> Path:
    if config.out == "":
        raise ConfigError("out: expected a folder, got nothing; leave it out for one of the run's own")
    if config.out is not None:
        return Path(config.out)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    return Path("runs") / f"{strategy_name(config)}-{stamp}"


def _central(job: Assembly, folder: RunFolder) -> ClientLevelMechanism | None:
    """The server's mechanism, where whole clients are protected."""
    if not isinstance(job.privacy, ClientLevel):
        return None
    return ClientLevelMechanism(job.privacy, job.plans[0], folder.ledger)
