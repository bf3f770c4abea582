"""One run, from its description to its folder."""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from flwr.serverapp import Grid

from fedlora.callbacks.base import Callback, Callbacks, RunHandle
from fedlora.callbacks.early_stopping import stopped_before
from fedlora.core.messages import State, Task
from fedlora.engines.client_runtime import ClientRuntime
from fedlora.errors import FedLoraError
from fedlora.privacy import DPSGD, ClientLevel, Ledger
from fedlora.privacy.client_level import ClientLevelMechanism
from fedlora.rounds.aggregation.choice import aggregation_for
from fedlora.rounds.loop import ServerLoop
from fedlora.rounds.registry import ClientRegistry
from fedlora.storage.run_folder import RunFolder
from fedlora.storage.update_log import UpdateLog
from fedlora.training.generation import scores

from . import privacy_checks, privacy_report
from .assemble import Assembly, assemble
from .input_digests import check_inputs
from .notices import notices
from .results import ANSWERS, finish, opening, write_holdings
from .spec import RunSpec
from .task_file import TaskFile


@dataclass(frozen=True)
class Sites:
    """What a run over sites needs beside its description.

    Args:
        invitation: what a node is told of the run before it takes part.
        names: of the sites, by their nodes.
    """

    invitation: Mapping[str, Any]
    names: Mapping[int, str]


@dataclass
class Session:
    """A run that is loaded, checked and about to go on, wherever its clients are.

    Args:
        spec: its description.
        assembly: what it needs, loaded and checked.
        folder: where it is written.
        handle: its state, and the callbacks that watch it.
        done: how many rounds were finished before.
        began: when, by time.perf_counter.
        startup: seconds until here.
        held: keeps other processes from this run, until it is closed.
    """

    spec: RunSpec
    assembly: Assembly
    folder: RunFolder
    handle: RunHandle
    done: int
    began: float
    startup: float
    held: ExitStack

    @classmethod
    def begin(cls, spec: RunSpec, path: Path, resumed: bool, callbacks: Sequence[Callback] = ()) -> "Session":
        """Load and check everything, and make the folder, or go on with the one that is there.

        Args:
            spec: the run.
            path: its folder.
            resumed: whether it goes on with what is in the folder.
            callbacks: called before those of the description.

        Raises:
            FedLoraError: something in the description cannot work, or the folder cannot be used.
        """
        began = time.perf_counter()
        if not resumed and (path / "config.yaml").exists():
            RunFolder.create(path, "")  # says what is there, before anything is loaded
        folder = RunFolder(path)
        with ExitStack() as held:
            if resumed:
                held.enter_context(folder.hold())
            made = assemble(spec)
            if resumed:
                if not folder.started:  # killed before its first checkpoint
                    folder.save_state(0, made.start)
                check_inputs(made, folder, resumed)
                done, state = folder.load_state()
                for last in ("summary.json", ANSWERS):
                    (path / last).unlink(missing_ok=True)
                folder.write_config(spec.settings)
            else:
                folder = RunFolder.create(path, spec.settings)
                held.enter_context(folder.hold())
                check_inputs(made, folder, resumed)
                done, state = 0, made.start
                folder.save_state(0, state)
            write_holdings(made, folder)
            TaskFile.of(made).write(folder)
            if not gc.isenabled():  # by the command, until here
                gc.freeze()
                gc.enable()
            startup = time.perf_counter() - began
            handle = RunHandle(
                rounds=spec.rounds,
                state=state,
                done=done,
                metric=made.metric,
                more_is_better=made.dataset.task.more_is_better,
                path=path,
                config=yaml.safe_load(spec.settings) or {},
                strategy=spec.strategy,
                private=spec.privacy is not None,
                sites=spec.engine.sites,
                validation=spec.evaluate.rows == "validation",
                metrics=folder.rounds(),
                callbacks=(*callbacks, *spec.callbacks),
            )
            stopped_before(handle)  # known before the opening, which then announces no rounds
            return cls(spec, made, folder, handle, done, began, startup, held.pop_all())

    @property
    def state(self) -> State:
        """The state after the rounds that are done."""
        assert self.handle.state is not None, "a session has a state"
        return self.handle.state

    def opening(self) -> str:
        """What is about to happen, in two lines or three, and a warning of each setting that seems odd."""
        said = opening(self.assembly, self.folder.path, self.done, self.handle.stopped)
        return "\n".join([said, *(f"warning: {line}" for line in notices(self.assembly))])

    @cached_property
    def runtime(self) -> ClientRuntime:
        """The clients' side in this process."""
        return replace(self.assembly.runtime, memory=self.folder.memory)

    @property
    def nodes(self) -> list[dict[str, int]]:
        """One node config a client."""
        return self.assembly.nodes()

    def enough(self, sampled: int) -> int:
        """How many of so many sampled clients a round waits for."""
        return self.assembly.enough(sampled)

    def advance(self, clients: int) -> None:
        """So many clients have finished."""
        Callbacks(self.handle).client_done(clients)

    def warn(self, text: str) -> None:
        """Something that the user should know."""
        self.handle.warn(text)

    def run(self, grid: Grid, sites: Sites | None = None) -> None:
        """Run the rounds that are left, and write what there is to say.

        Args:
            grid: how clients are reached.
            sites: for clients on other machines.

        Raises:
            FedLoraError: no client sent anything good in any round.
        """
        for _ in self.rounds(grid, sites):
            pass

    def rounds(self, grid: Grid, sites: Sites | None = None) -> Iterator[dict[str, Any]]:
        """The same a round at a time: the line of each round that has finished; files come at the end."""
        callbacks = Callbacks(self.handle)
        try:
            callbacks.run_begin()
            yield from self._rounds(grid, sites)
        finally:
            callbacks.run_end(self.folder.summary())

    def _rounds(self, grid: Grid, sites: Sites | None) -> Iterator[dict[str, Any]]:
        made, folder = self.assembly, self.folder
        initial: dict[str, Any] = scores(made.answers(made.initial()))
        if self.spec.evaluate.every:
            initial |= made.named(*made.evaluate([made.initial()])[0])
        if sites is None:  # else every site checks its own
            privacy_checks.check_ledgers(self.spec.privacy, folder)
        loop = self._loop(sites)
        yield from loop.rounds(grid)
        own = loop.evaluate_clients(grid)
        self._check_anything_came()
        ledgers = self._ledgers(sites is not None, [])
        answers = made.answers(Task(self.handle.result.whole()))
        before = sum(line["seconds"] for line in folder.rounds()[: self.done])
        seconds = {
            "startup_seconds": self.startup,
            "wall_seconds": before + time.perf_counter() - self.began,
        }
        finish(made, folder, self.handle, initial, seconds, own, ledgers, answers)

    def _loop(self, sites: Sites | None) -> ServerLoop:
        made, folder = self.assembly, self.folder
        registry = ClientRegistry(
            made.peer,
            max(made.ranks),
            self.handle.warn,
            sites.invitation if sites else None,
            sites.names if sites else None,
            self.spec.strategy.mixed_ranks,
        )
        robust = [self.spec.robust] if self.spec.robust else []
        central = None
        if isinstance(self.spec.privacy, ClientLevel):
            central = ClientLevelMechanism(self.spec.privacy, made.plans[0], folder.ledger)
        steps = [*robust, *self.spec.steps]
        plain = aggregation_for(made.rules, central, steps, self.spec.compression)
        return ServerLoop(
            self.spec.strategy,
            self.handle,
            registry,
            made.rules,
            made.evaluate,
            made.named,
            folder,
            partial(self._spent, sites is not None),
            self.spec.scheduler.aggregation(plain),
            UpdateLog(folder.path) if self.spec.record_updates else None,
            self.spec.scheduler,
            made.dataset.task.score,
            made.clock(),
            self.spec.compression,
            self.spec.server,
            self.spec.rule if self.spec.rule and self.spec.rule.at_server else None,
        )

    def _check_anything_came(self) -> None:
        rounds, path = self.folder.rounds(), self.folder.path
        if isinstance(self.spec.privacy, ClientLevel):
            if not any(line["epsilon"] for line in rounds):
                raise FedLoraError(
                    f"no round released anything, no sum of updates was known; the reasons are in {path}/"
                    "clients.jsonl and in the warnings above"
                )
        elif not any(line["clients"] for line in rounds):
            raise FedLoraError(
                f"no client sent a good update in any round; the reasons are in {path}/clients.jsonl"
            )

    def _ledgers(self, apart: bool, lines: Sequence[Mapping[str, Any]]) -> dict[int, Ledger]:
        """What was spent; where clients keep their ledgers on machines of their own, by what they tell."""
        privacy = self.spec.privacy
        if apart and isinstance(privacy, DPSGD):
            return privacy_checks.reported_ledgers([*self.folder.clients(), *lines], privacy.accountant)
        return self.folder.ledgers()

    def _spent(self, apart: bool, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What privacy has cost so far, for the line of a round; nothing to say without any."""
        if self.spec.privacy is None:
            return {}
        return privacy_report.spent(self.spec.privacy, self._ledgers(apart, lines).values())
