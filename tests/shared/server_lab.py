"""A server loop and clients without a model: a client adds seeded noise to the adapter that it receives."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Console

from fedlora.callbacks.base import Callback, Callbacks, RunHandle
from fedlora.callbacks.console import ConsoleProgress
from fedlora.compression import Compression
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, Task
from fedlora.core.strategy import Strategy
from fedlora.engines.client_runtime import ClientRuntime
from fedlora.engines.in_process import InProcessGrid
from fedlora.privacy.client_level import ClientLevelMechanism
from fedlora.rounds.aggregation.base import Aggregation
from fedlora.rounds.aggregation.choice import aggregation_for
from fedlora.rounds.loop import ServerLoop
from fedlora.rounds.registry import ClientRegistry
from fedlora.rounds.round_config import RoundConfig
from fedlora.rounds.scheduling import Scheduler, Synchronous
from fedlora.rounds.virtual_clock import VirtualClock
from fedlora.seeds import generator
from fedlora.server_optimizers import ServerOptimizer
from fedlora.storage.run_folder import RunFolder
from fedlora.tasks import Classification
from fedlora.training.client import Client, TrainRequest, TrainResult

LAYERS = {"a.q": (6, 8), "b.v": (8, 8)}


@dataclass(frozen=True)
class Noise(Client):
    """Adds noise of (seed, client, round) to whatever is trained; raises for the clients in `failing`."""

    failing: frozenset[int] = frozenset()
    still: bool = False
    tokens: int = 100
    groups: list[list[int]] = field(default_factory=list)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def train(self, base: Any, assignments: Sequence[TrainRequest]) -> list[TrainResult]:
        self.groups.append([a.client for a in assignments])
        for a in assignments:
            if a.client in self.failing:
                raise RuntimeError(f"no luck for {a.client}")
        return [self._outcome(a) for a in assignments]

    def evaluate(self, base: Any, assignments: Sequence[TrainRequest]) -> list[tuple[float, float]]:
        """The sum over the start as the loss, so that a test sees which start it was."""
        return [(float(sum(t.double().sum() for _, t in a.start.tensors())), 0.5) for a in assignments]

    def step_tokens(self, rows: Sequence[Any]) -> int:
        return self.tokens

    def _outcome(self, a: TrainRequest) -> TrainResult:
        adapter = self._moved(a)
        own = {name: tensor for name, tensor in adapter.tensors() if name in a.task.own()}
        return TrainResult(adapter, {"loss": 1.0 + a.client, **self.metrics}, own)

    def _moved(self, a: TrainRequest) -> Adapter:
        rng = generator(a.seed, "batches", a.client, a.round)

        trained = {*a.task.shared(), *a.task.own()}

        def move(name: str, t: torch.Tensor) -> torch.Tensor:
            noise = torch.from_numpy(rng.standard_normal(tuple(t.shape))).to(t.dtype)
            return t + noise if name in trained and not self.still else t.clone()

        return a.start.with_tensors({name: move(name, t) for name, t in a.start.tensors()})


class Tampered(InProcessGrid):
    """A grid whose training replies go through `change`, a function from all of a round's to what arrives."""

    change: Callable[[list[Message]], list[Message]]

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        training = [r for r in replies if r.metadata.message_type == "train"]
        return iter(self.change(replies) if training else replies)


@dataclass
class Ran:
    """What a federation left behind."""

    federation: ServerLoop
    folder: RunFolder
    console: StringIO
    client: Noise
    grid: InProcessGrid
    handle: RunHandle

    @property
    def text(self) -> str:
        return self.console.getvalue()

    @property
    def digest(self) -> str:
        return self.federation.state.adapter.digest()

    def lines(self, name: str) -> list[dict[str, Any]]:
        def strict(constant: str) -> None:
            raise AssertionError(f"{name} holds {constant}, which is no JSON")

        text = (self.folder.path / name).read_text()
        return [json.loads(line, parse_constant=strict) for line in text.splitlines()]

    def sampled(self) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for line in self.lines("clients.jsonl"):
            found.setdefault(line["round"], []).append(line["client"])
        return list(found.values())


@dataclass
class Lab:
    """Makes adapters, sites, grids and whole runs."""

    folder: Path
    seed: int = 7

    def adapter(self, rank: int = 4, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> Adapter:
        rng = generator(self.seed, "start")
        pairs = {
            name: Pair(
                torch.from_numpy(rng.standard_normal((rank, d_in))).to(dtype),
                torch.zeros(d_out, rank, dtype=dtype),
                scale,
            )
            for name, (d_out, d_in) in LAYERS.items()
        }
        extra = {"head.weight": torch.ones(2, 3, dtype=dtype), "head.bias": torch.ones(2, dtype=dtype)}
        return Adapter(pairs, extra)

    def site(
        self, client: Client, rows: Callable[[int], Sequence[Any]] | None = None, **more: Any
    ) -> ClientRuntime:
        base: Any = SimpleNamespace(task=Classification())  # nothing else of it is asked
        return ClientRuntime(base, client, rows or (lambda c: [None] * (10 * (c + 1))), **more)  # type: ignore[arg-type]

    def keep(self, *clients: int) -> Callable[[list[Message]], list[Message]]:
        """A change that lets the replies of these clients alone arrive."""
        return lambda replies: [r for r in replies if r.metadata.src_node_id - 1000 in clients]

    def grid(
        self, client: Client, ranks: Sequence[int], fuse: int | None = None, **more: Any
    ) -> InProcessGrid:
        nodes = [{"client": c, "rank": r} for c, r in enumerate(ranks)]
        site = self.site(client, more.pop("rows", None), **more.pop("site", {}))
        return InProcessGrid([site], nodes, fuse, **more)

    def run(self, strategy: Strategy, *args: Any, **more: Any) -> Ran:
        """A whole run, of what `prepare` makes."""
        ran = self.prepare(strategy, *args, **more)
        callbacks = Callbacks(ran.handle)
        try:
            callbacks.run_begin()
            ran.federation.run(ran.grid)
        finally:
            callbacks.run_end({})
        return ran

    def prepare(
        self,
        strategy: Strategy,
        ranks: Sequence[int] = (4, 4, 4),
        rounds: int = 2,
        client: Noise | None = None,
        fuse: int | None = None,
        change: Callable[[list[Message]], list[Message]] | None = None,
        scales: Mapping[int, float] | None = None,
        console: Console | None = None,
        evaluate: Any = None,
        rows: Any = None,
        site: Mapping[str, Any] | None = None,
        roster: Mapping[str, Any] | None = None,
        central: ClientLevelMechanism | None = None,
        most: int | None = None,
        aggregation: Aggregation | None = None,
        scheduler: Scheduler | None = None,
        callbacks: Sequence[Callback] = (),
        clock: VirtualClock | None = None,
        resumed: RunFolder | None = None,
        compression: Compression | None = None,
        optimizer: ServerOptimizer | None = None,
        **rules: Any,
    ) -> Ran:
        client = client or Noise()
        said = StringIO()
        self.folder.mkdir(exist_ok=True)
        start, done = strategy.init(self.adapter(most or max(ranks))), 0
        if resumed is None:
            folder = RunFolder.create(self.folder / f"run-{len(list(self.folder.iterdir()))}", "seed: 1\n")
            folder.save_state(0, start)
        else:
            folder = RunFolder(resumed.path)
            done, start = folder.load_state()
        shown = ConsoleProgress(console or Console(file=said, width=200))
        handle = RunHandle(
            rounds,
            start,
            done,
            path=folder.path,
            strategy=strategy,
            callbacks=[shown, *callbacks],
        )
        done = Callbacks(handle).client_done
        own = {"compression": compression, **(site or {})}
        grid = self.grid(client, ranks, fuse, rows=rows, site=own, done=done)
        if change is not None:
            grid.__class__ = Tampered
            grid.change = change  # type: ignore[attr-defined]

        def peer(client: int, rank: int) -> Peer:
            own = (scales or {}).get(client)
            return Peer(client, rank, {}, {} if own is None else dict.fromkeys(LAYERS, own))

        def score(tasks: Sequence[Task]) -> list[tuple[float, float]]:
            return [(0.5, float(i)) for i, _ in enumerate(tasks)]

        def named(loss: float, right: float) -> dict[str, float]:
            return {"loss": loss, "accuracy": right}

        config = RoundConfig(rounds=rounds, seed=rules.pop("seed", 0), **rules)
        scheduler = scheduler or Synchronous()
        federation = ServerLoop(
            strategy,
            handle,
            ClientRegistry(
                peer, most or max(ranks), handle.warn, mixed=strategy.mixed_ranks, **(roster or {})
            ),
            config,
            evaluate or score,
            named,
            folder,
            aggregation=scheduler.aggregation(
                aggregation or aggregation_for(config, central, (), compression)
            ),
            scheduler=scheduler,
            clock=clock,
            compression=compression,
            optimizer=optimizer,
        )
        return Ran(federation, folder, said, client, grid, handle)


@pytest.fixture(scope="session", autouse=True)
def identity() -> None:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "runs")


@pytest.fixture(scope="session")
def noise() -> type[Noise]:
    return Noise
