"""From a composed configuration to the objects of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig

from fedlora.config.instantiate import make, named
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Peer, State, Task
from fedlora.core.strategy import Strategy
from fedlora.data import Dataset, Example, Part
from fedlora.engines.client_runtime import ClientRuntime
from fedlora.errors import ConfigError
from fedlora.models import Base, LoRA, load, targets
from fedlora.privacy import DPSGD, ClientLevel, Plan, Privacy
from fedlora.robust.base import Robust
from fedlora.rounds.round_config import RoundConfig
from fedlora.runner import privacy_checks
from fedlora.runner.assign_ranks import assign_ranks, plain
from fedlora.runner.initial_state import initial_state
from fedlora.runner.load_data import encode_rows, load_dataset, metrics, partition_rows
from fedlora.runner.load_models import heads_of, load_base, lora_of, model_choices, shared
from fedlora.training.client import Client
from fedlora.training.evaluation import evaluate
from fedlora.training.generation import Answer, answer, chosen


@dataclass(frozen=True)
class Assembly:
    """Everything that a run needs, loaded and checked.

    Args:
        dataset: training and test rows.
        base: the frozen model.
        parts: the clients' rows.
        ranks: the clients' ranks.
        test: the encoded test rows.
        site: the clients' side.
        strategy: the algorithm.
        start: the state before round 1.
        lora: the rule from rank to scales.
        rules: sampling, weights, evaluation.
        privacy: that of the clients' records, or of the clients, if any.
        robust: the rule between the updates and the strategy, if any.
        asked: the numbers of the test rows that are answered word for word.
    """

    dataset: Dataset
    base: Base
    parts: Sequence[Part]
    ranks: Sequence[int]
    test: Sequence[Example]
    site: ClientRuntime
    strategy: Strategy
    start: State
    lora: LoRA
    rules: RoundConfig
    privacy: Privacy | None = None
    robust: Robust | None = None
    asked: Sequence[int] = ()

    @property
    def plans(self) -> list[Plan]:
        """How privately each client trains, or the one plan of the server; empty without privacy."""
        if isinstance(self.privacy, ClientLevel):
            clients = self.rules.clients
            sampled = self.rules.clients_per_round or clients
            return [self.privacy.plan(clients, sampled, self.rules.secure_sum)]
        sizes = [len(part.rows) for part in self.parts]
        return [plan for size in sizes if (plan := self.site.client.plan(size)) is not None]

    @property
    def counts_public(self) -> bool:
        """Whether anybody may know how many rows a client has."""
        hidden = isinstance(self.privacy, ClientLevel) or (
            self.privacy is not None and self.privacy.hides_counts
        )
        return not hidden and not self.rules.secure_sum

    @property
    def metric(self) -> str:
        """The headline metric."""
        return "accuracy" if self.dataset.kind == "classification" else "perplexity"

    def enough(self, sampled: int) -> int:
        """How many of a round's clients it waits for.

        Of a Poisson sample all: if it were cut at a number, whoever joins it would push another out, and a
        client would move the sum by more than epsilon counts.
        """
        return sampled if isinstance(self.privacy, ClientLevel) else self.rules.enough(sampled)

    def peer(self, client: int, rank: int) -> Peer:
        """What the server knows of a client."""
        return self.lora.peer(client, rank, self.start.adapter.pairs)

    def nodes(self) -> list[dict[str, int]]:
        """One node config a client."""
        return [{"client": client, "rank": rank} for client, rank in enumerate(self.ranks)]

    def evaluate(self, tasks: Sequence[Task]) -> list[tuple[float, float]]:
        """Loss and share of right answers of each task's adapter, as it is, on the test rows."""
        return evaluate(self.base, tasks, [self.test] * len(tasks), self.site.client.micro_tokens)

    def answers(self, task: Task) -> list[Answer]:
        """What a task's adapter, as it is, says to the test rows that are to be answered."""
        said = answer(self.base, task, [self.test[i] for i in self.asked], self.site.client.micro_tokens)
        return [Answer.to(self.dataset.test[i], i, text) for i, text in zip(self.asked, said, strict=True)]

    def named(self, loss: float, right: float) -> dict[str, float]:
        """Loss and share of right answers as the metrics of what is trained for."""
        return metrics(self.dataset.kind, loss, right)

    def initial(self) -> Task:
        """The model before round 1; the bare one where the adapter is no part of it."""
        modules = {name for name, _ in self.base.model.named_modules()}
        if self.start.adapter.pairs.keys() <= modules:
            return Task(self.start.adapter, fold=self.start.fold)
        return Task(Adapter({}))

    def majority(self) -> float | None:
        """The accuracy of always saying the most frequent training label, where those are known here."""
        if self.dataset.kind != "classification" or not self.dataset.train:
            return None
        said = [row.target for row in self.dataset.train]
        label = max(sorted(set(said)), key=said.count)
        return sum(row.target == label for row in self.dataset.test) / len(self.dataset.test)


def assemble(config: DictConfig) -> Assembly:
    """Load and check everything before the first round.

    Raises:
        FedLoraError: a setting, a file, a model or a pairing of them cannot work.
    """
    strategy: Strategy = make(config, "strategy", Strategy)
    client: Client = make(config, "client", Client)
    privacy: Privacy | None = named(config, "privacy", Privacy)
    if strategy.client and type(client).__name__ != strategy.client:
        raise ConfigError(
            f"strategy {type(strategy).__name__} needs the client {strategy.client}, which does its part of "
            f"the algorithm, got {type(client).__name__}; leave client=... out, the strategy brings its own"
        )
    lora = lora_of(config)
    rules = RoundConfig(
        config.rounds,
        config.seed,
        config.clients_per_round,
        config.weights,
        config.min_updates,
        config.evaluate.every,
        config.evaluate.updates,
        config.evaluate.clients or strategy.personal,
        config.secure_sum,
        config.engine.get("timeout"),
        *(config.engine.get(name, 0.0) for name in ("over_select", "min_replies", "wait")),
    )
    if rules.evaluate_updates and strategy.personal:
        raise ConfigError(
            f"evaluate.updates: what a client of {type(strategy).__name__} sends is no whole model; leave it "
            "out, its clients evaluate their own models"
        )
    if config.get("record_updates") and (privacy is not None or rules.secure_sum or strategy.personal):
        raise ConfigError(
            "record_updates: private and secret updates must not be kept, and those of personal strategies "
            "are no whole models; leave it out"
        )
    if privacy is not None:
        privacy_checks.check(privacy, strategy, rules, bool(config.lora.get("dora")))
    if isinstance(privacy, ClientLevel) and (config.get("track") or {}).get("clients"):
        raise ConfigError(
            "track.clients: what a client's training measures is not covered by the epsilon of client-level "
            "privacy and must not go to a tracker; leave it out"
        )
    if isinstance(privacy, DPSGD):
        client = client.privately(privacy)
    fuse_of(config.engine.get("fuse", "auto"))
    if config.lora.head not in ("train", "last", "freeze"):
        raise ConfigError(f"lora.head: expected train, last or freeze, got '{config.lora.head}'")
    dataset = load_dataset(config)
    if privacy is not None:
        privacy_checks.check_rows(dataset)
    asked = _asked(config, dataset, strategy)
    parts = partition_rows(config, dataset) if dataset.train else []
    clients = len(parts) if parts else config.clients
    if clients is None:
        raise ConfigError("clients: how many sites take part? say clients=N")
    rules = replace(rules, clients=clients)
    robust: Robust | None = named(config, "robust", Robust)
    if robust is not None:
        robust.check(strategy, rules, privacy)
    if rules.secure_sum:
        privacy_checks.check_sum(privacy, strategy, rules, clients)
    ranks = assign_ranks(config.ranks, clients, config.seed)
    if rules.min_updates > (most := rules.enough(clients)):
        raise ConfigError(
            f"min_updates: expected at most {most}, the clients of a round; got {rules.min_updates}"
        )
    if len(set(ranks)) > 1 and not strategy.mixed_ranks:
        raise ConfigError(
            f"strategy {type(strategy).__name__} combines clients of one rank only, ranks are "
            f"{sorted(set(ranks))}; use strategy=flexlora, or one rank"
        )
    given_head = config.lora.adapter is not None and config.lora.head != "train"
    bases = [load_base(choice, dataset) for choice in model_choices(config)] if config.models else []
    base = bases[0] if bases else load_base(config, dataset, load if given_head else shared)
    apart = client.shared(base)  # what clients share where it is no part of the model
    _check_apart(config, strategy, client, apart is not None)
    if apart is not None:
        modules = dict(apart)
    else:
        modules = targets(base, plain(config.lora.targets)) if config.lora.targets else {}
    heads = heads_of(config, base)
    start = initial_state(config, strategy, base, lora, modules, ranks, heads if apart is None else ())
    used = sorted({i for part in parts for i in part.rows})
    held = [dataset.train[i] for i in used]
    rows = [dict(zip(used, encode_rows(config, dataset, held, b), strict=True)) for b in bases or [base]]
    test = encode_rows(config, dataset, dataset.test, base)
    own = [[rows[k % len(rows)][i] for i in part.rows] for k, part in enumerate(parts)]
    site = ClientRuntime(base, client, own.__getitem__, None, rules.evaluate_clients, bases=bases)
    job = Assembly(
        dataset, base, parts, ranks, test, site, strategy, start, lora, rules, privacy, robust, asked
    )
    if isinstance(privacy, DPSGD):
        tasks = [strategy.task(start, job.peer(0, rank)) for rank in sorted(set(ranks))]
        privacy_checks.try_out(client, base, strategy, tasks, [len(part.rows) for part in parts])
    return job


def _asked(config: DictConfig, dataset: Dataset, strategy: Strategy) -> list[int]:
    """The test rows to answer by `evaluate.answers`, refused where no one model could answer them."""
    count = config.evaluate.get("answers", 0)
    if count < 0:
        raise ConfigError(f"evaluate.answers: expected a number of test rows, or 0 for none; got {count}")
    if count and dataset.kind == "classification":
        raise ConfigError(
            "evaluate.answers: a classifier gives labels and writes no text, its accuracy says all; leave it "
            "out, or name data.prompt and data.response"
        )
    if count and strategy.personal:
        raise ConfigError(
            f"evaluate.answers: the result of {type(strategy).__name__} is a model for each client, and the "
            "server has none that could answer; leave it out"
        )
    return chosen(dataset.test, count, config.seed)


def _check_apart(config: DictConfig, strategy: Strategy, client: Client, apart: bool) -> None:
    """Refuse what an adapter apart from the model cannot do, and other models where there is none."""
    name = type(client).__name__
    if apart and strategy.client != name:
        raise ConfigError(
            f"client {name} shares an adapter that is no part of the model, strategy "
            f"{type(strategy).__name__} expects the model's own LoRA; use strategy=pfedlora"
        )
    if apart and config.lora.adapter is not None:
        raise ConfigError(f"lora.adapter: client {name} shares no LoRA of the model, leave it out")
    if config.models and not apart:
        raise ConfigError(
            f"models: {type(strategy).__name__} combines LoRA of one model, got models={config.models}; use "
            "model=NAME, or strategy=pfedlora, whose clients may have different ones"
        )


def fuse_of(value: Any) -> int | None:
    """`engine.fuse` as a number of clients; None for auto."""
    if value == "auto":
        return None
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"engine.fuse: expected auto or a whole number of at least 1, got {value!r}")
    return value
