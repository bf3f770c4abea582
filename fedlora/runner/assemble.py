"""From the description of a run to its parts, loaded and checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.clients import LocalTraining
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Peer, State, Task
from fedlora.data import Dataset, Example, Part
from fedlora.engines.client_runtime import ClientRuntime
from fedlora.models import Base, expert_targets, lacking, load, targets
from fedlora.privacy import DPSGD, ClientLevel, Plan
from fedlora.rounds.round_config import RoundConfig
from fedlora.rounds.speeds import Speeds
from fedlora.rounds.virtual_clock import VirtualClock
from fedlora.storage.client_state import ClientStore, DownloadCache
from fedlora.training.evaluation import evaluate
from fedlora.training.generation import Answer, answer, chosen

from . import compatibility, privacy_checks
from .assign_ranks import assign_ranks
from .dealt import Dealt
from .initial_state import initial_state
from .load_data import encode_rows, load_dataset, partition_rows
from .load_models import load_base, shared, trained_heads
from .spec import RunSpec


@dataclass(frozen=True)
class Assembly:
    """Everything that a run needs, loaded and checked.

    Args:
        spec: the description of the run.
        dataset: training and test rows.
        base: the frozen model.
        parts: the clients' rows.
        ranks: the clients' ranks.
        test: the encoded test rows.
        runtime: the clients' side.
        start: the state before round 1.
        rules: sampling, weights, evaluation.
        asked: the numbers of the test rows that are answered word for word.
    """

    spec: RunSpec
    dataset: Dataset
    base: Base
    parts: Sequence[Part]
    ranks: Sequence[int]
    test: Sequence[Example]
    runtime: ClientRuntime
    start: State
    rules: RoundConfig
    asked: Sequence[int] = ()

    @property
    def plans(self) -> list[Plan]:
        """How privately each client trains, or the one plan of the server; empty without privacy."""
        privacy = self.spec.privacy
        if isinstance(privacy, ClientLevel):
            clients = self.rules.clients
            sampled = self.rules.clients_per_round or clients
            return [privacy.plan(clients, sampled, self.rules.secure_sum)]
        sizes = [len(part.rows) for part in self.parts]
        return [plan for size in sizes if (plan := self.runtime.client.plan(size)) is not None]

    @property
    def counts_public(self) -> bool:
        """Whether anybody may know how many rows a client has."""
        privacy = self.spec.privacy
        hidden = isinstance(privacy, ClientLevel) or (privacy is not None and privacy.hides_counts)
        return not hidden and not self.rules.secure_sum

    @property
    def metric(self) -> str:
        """The headline metric."""
        return self.dataset.task.headline

    def enough(self, sampled: int) -> int:
        """How many of a round's clients it waits for.

        Of a Poisson sample all: if it were cut at a number, whoever joins it would push another out, and a
        client would move the sum by more than epsilon counts.
        """
        return sampled if isinstance(self.spec.privacy, ClientLevel) else self.rules.enough(sampled)

    def clock(self) -> VirtualClock | None:
        """The virtual time of the run; None on real sites, and where nothing asks for it."""
        engine = self.spec.engine
        if engine.sites or (engine.speeds is None and not self.spec.scheduler.mixes_versions):
            return None
        speeds = Speeds() if engine.speeds is None else Speeds.of(engine.speeds)
        clock = VirtualClock(speeds, self.spec.seed, self._steps, self.enough)
        for client in range(self.rules.clients):
            clock.pace(client)  # so that a client that a trace lacks is known now
        return clock

    def _steps(self, client: int) -> int:
        """The local steps of a client's round; 1 where their number would tell of its rows."""
        trains = self.runtime.client
        if not isinstance(trains, LocalTraining) or (trains.steps is None and not self.counts_public):
            return 1
        return int(trains.count_steps(len(self.parts[client].rows)))

    def peer(self, client: int, rank: int) -> Peer:
        """What the server knows of a client."""
        return self.spec.lora.scaling.peer(client, rank, self.start.adapter.pairs)

    def nodes(self) -> list[dict[str, int]]:
        """One node config a client."""
        return [{"client": client, "rank": rank} for client, rank in enumerate(self.ranks)]

    def evaluate(self, tasks: Sequence[Task]) -> list[tuple[float, float]]:
        """Loss and share of right answers of each task's adapter, as it is, on the test rows."""
        return evaluate(self.base, tasks, [self.test] * len(tasks), self.runtime.client.micro_tokens)

    def answers(self, task: Task) -> list[Answer]:
        """What a task's adapter, as it is, says to the test rows that are to be answered."""
        rows = [self.test[i] for i in self.asked]
        said = answer(self.base, task, rows, self.runtime.client.micro_tokens)
        return [Answer.to(self.dataset.test[i], i, text) for i, text in zip(self.asked, said, strict=True)]

    def named(self, loss: float, right: float) -> dict[str, float]:
        """Loss and share of right answers as the metrics of what is trained for."""
        return self.dataset.task.metrics(loss, right)

    def initial(self) -> Task:
        """The model before round 1; the bare one where the adapter is no part of it."""
        if not lacking(self.base.model, self.start.adapter.pairs):
            return Task(self.start.adapter, base_delta=self.start.base_delta)
        return Task(Adapter({}))

    def baseline(self) -> dict[str, float | None]:
        """The headline metric of an answer that reads no row, by the answer's name, such as "majority"."""
        return self.dataset.task.baseline(self.dataset.train, self.dataset.test)


def assemble(spec: RunSpec) -> Assembly:
    """Load and check everything before the first round.

    Raises:
        FedLoraError: a setting, a file, a model or a pairing of them cannot work.
    """
    spec.round_config()
    compatibility.check(compatibility.BEFORE_LOADING, spec)
    dataset = load_dataset(spec)
    parts = partition_rows(spec.data, dataset, spec.clients, spec.seed) if dataset.train else []
    clients = compatibility.number_of_clients(spec, len(parts))
    ranks = assign_ranks(spec.ranks, clients, spec.seed)
    compatibility.check(compatibility.WITH_DATA, Dealt(spec, dataset, clients, ranks))
    bases = [load_base(model, dataset, spec.seed) for model in spec.models]
    given_head = spec.lora.adapter is not None and spec.lora.head != "train"
    base = bases[0] if bases else load_base(spec.model, dataset, spec.seed, load if given_head else shared)
    apart = spec.client.shared(base)  # what clients share where it is no part of the model
    compatibility.check(compatibility.WITH_MODEL, Dealt(spec, dataset, clients, ranks, apart is not None))
    modules = dict(apart) if apart is not None else adapted(spec, base)
    heads = trained_heads(spec.lora, base) if apart is None else ()
    start = initial_state(spec.lora, spec.strategy, base, modules, ranks, heads, spec.seed)
    used = sorted({i for part in parts for i in part.rows})
    held, length = [dataset.train[i] for i in used], spec.data.max_length
    rows = [dict(zip(used, encode_rows(length, dataset, held, b), strict=True)) for b in bases or [base]]
    own = [[rows[k % len(rows)][i] for i in part.rows] for k, part in enumerate(parts)]
    made = Assembly(
        spec=spec,
        dataset=dataset,
        base=base,
        parts=parts,
        ranks=ranks,
        test=encode_rows(length, dataset, dataset.test, base),
        runtime=client_runtime(spec, base, own.__getitem__, bases=bases),
        start=start,
        rules=spec.round_config(clients),
        asked=chosen(dataset.test, spec.evaluate.answers, spec.seed),
    )
    if isinstance(spec.privacy, DPSGD):
        tasks = [spec.strategy.task(start, made.peer(0, rank)) for rank in sorted(set(ranks))]
        sizes = [len(part.rows) for part in parts]
        privacy_checks.try_out(made.runtime.client, base, spec.strategy, tasks, sizes)
    return made


def client_runtime(
    spec: RunSpec,
    base: Base,
    rows: Callable[[int], Sequence[Example]],
    store: ClientStore | None = None,
    cache: DownloadCache | None = None,
    bases: Sequence[Base] = (),
    most: int | None = None,
    masked: bool = False,
) -> ClientRuntime:
    """The clients' side of a run, in a simulation and at a site alike.

    Args:
        spec: the description of the run.
        base: the frozen model.
        rows: from a client's number to its encoded training rows.
        store: where clients keep their own parts and ledgers; None where there are none.
        cache: where clients keep what they were sent; None keeps it in memory.
        bases: other models, dealt in turn to the clients.
        most: trainings of this run that a client answers; None for any number.
        masked: whether a client trains only where its update leaves under the masks of a secure sum.
    """
    return ClientRuntime(
        base,
        spec.local_client,
        rows,
        memory=store,
        held_out=spec.held_out,
        shelf=cache or DownloadCache(),
        bases=bases,
        most=most,
        masked=masked,
        steps=spec.steps,
        compression=spec.compression,
        rounds=spec.rounds,
    )


def adapted(spec: RunSpec, base: Base) -> dict[str, Any]:
    """The modules and experts that get an adapter, name -> (d_out, d_in); by default what suits the model."""
    named = spec.model.lora_targets if spec.lora.targets is None else spec.lora.targets
    experts = expert_targets(base, spec.lora.target_parameters)
    return (targets(base, named, experts) if named else {}) | experts
