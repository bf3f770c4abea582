"""From the arguments of `fedlora.simulate` to the description of a run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedlora.callbacks.base import Callback
from fedlora.compression import Compression
from fedlora.config.defaults import defaults
from fedlora.config.describe import describe
from fedlora.config.presets import data_preset, files_preset, presets
from fedlora.core.strategy import Strategy
from fedlora.core.update_step import UpdateStep
from fedlora.data.files import load
from fedlora.data.records import columns_of
from fedlora.engines.base import Engine
from fedlora.engines.in_process import InProcess
from fedlora.errors import ConfigError
from fedlora.privacy import DPSGD, ClientLevel, Privacy
from fedlora.ranges import check_whole
from fedlora.robust.base import Robust
from fedlora.rounds.scheduling import Scheduler, Synchronous
from fedlora.runner.spec import RunSpec
from fedlora.runner.spec_parts import DataSpec, EvaluationSpec, LoRASpec
from fedlora.server_optimizers import ServerOptimizer
from fedlora.tasks import TASKS, LearningTask
from fedlora.training.client import Client
from fedlora.training.rules import LocalRule

from .parts import client_of, compression_of, model_of, server_of, strategy_of
from .rows import Columns, dataset

OPTIONS = {"partition", "alpha", "shards", "min_rows", "max_rows", "max_length"}


@dataclass(frozen=True)
class Settings:
    """What `simulate`, `Session` and `sweep` take, with the defaults of the command line.

    Args:
        model: minilm, smollm2 or tiny; a folder or a hub name; a ModelSpec; or (model, tokenizer), loaded.
        data: trec, vader, tiny, ...; a file or folder; a list of dicts; a set of the datasets library; a
            frame of pandas; or {client: rows}.
        test: the test rows, likewise; None holds a part of the training rows out.
        text: the key or column of the text, and so label, prompt, response; None finds them.
        label: of the label of a text.
        prompt: of the prompt.
        response: of the response.
        client_column: of the name of a row's client, for partition="natural".
        task: what is learnt: an own `LearningTask`, or a name; None takes the task whose columns there are.
        columns: of other roles of an own task, such as {"score": "rating"}.
        labels: all labels that there may be; None takes those of the training rows.
        test_rows: rows that are held out without test rows; a fifth at most.
        partition: iid, dirichlet, shards or natural; or a function (rows, clients, rng) -> positions by
            client; None takes the preset's own, natural for {client: rows}, else iid.
        data_options: other fields of DataSpec, such as {"alpha": 0.1, "max_length": 64}.
        strategy: its name, such as "flexlora", or an object.
        client: how a client trains; None takes LocalTraining at the learning rate that suits the model.
        clients: how many; None takes all that the rows name.
        clients_per_round: how many a round samples; None takes all.
        rounds: of the federation.
        ranks: one rank; or a list, in turn over the clients; or {rank: share}.
        weights: what a client counts: examples or uniform.
        min_updates: with fewer good updates a round leaves the state as it was.
        secure_sum: clients send under masks that cancel in their sum.
        record_updates: keep the clients' updates of every round, for `Run.replay`.
        seed: of all that is random, except the noise of privacy.
        lora: an LoRASpec, or a dict of its fields.
        evaluate: an EvaluationSpec, or a dict of its fields.
        privacy: a DPSGD or a ClientLevel; None without.
        robust: a rule against poisoned updates; None without.
        rule: what bends local training, such as FedProx(mu=0.01); None without.
        steps: UpdateSteps, what changes an update on its way from the training to the strategy: in this order
            at the clients, in the reverse order at the server.
        compression: how messages travel: a name, such as "topk", or an object; None as they are.
        server: the server's optimizer: fedavgm, fedadam, fedyogi or fedadagrad, or an object; None without.
        scheduler: when clients are asked and updates aggregated; None waits for all that a round asks.
        engine: where clients run; None takes this process.
        callbacks: what watches the run, such as [EarlyStopping(patience=3)], or objects of your own classes.
    """

    model: Any = "minilm"
    data: Any = "trec"
    test: Any = None
    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    response: str | None = None
    client_column: str | None = None
    task: LearningTask | str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: Sequence[str] | None = None
    test_rows: int | None = None
    partition: Any = None
    data_options: Mapping[str, Any] = field(default_factory=dict)
    strategy: Strategy | str = "fedit"
    client: Client | None = None
    clients: Any = "default"
    clients_per_round: int | None = RunSpec.clients_per_round
    rounds: int = RunSpec.rounds
    ranks: Any = RunSpec.ranks
    weights: str = RunSpec.weights
    min_updates: int = RunSpec.min_updates
    secure_sum: bool = RunSpec.secure_sum
    record_updates: bool = RunSpec.record_updates
    seed: int = RunSpec.seed
    lora: LoRASpec | Mapping[str, Any] = field(default_factory=LoRASpec)
    evaluate: EvaluationSpec | Mapping[str, Any] = field(default_factory=EvaluationSpec)
    privacy: Privacy | None = None
    robust: Robust | None = None
    rule: LocalRule | None = None
    steps: Sequence[UpdateStep] = ()
    compression: Compression | str | None = None
    server: ServerOptimizer | str | None = None
    scheduler: Scheduler | None = None
    engine: Engine | None = None
    callbacks: Sequence[Callback] = ()

    def spec(self) -> RunSpec:
        """The description of the run; nothing is loaded yet, but rows in memory are read.

        Raises:
            FedLoraError: an argument that cannot be.
        """
        check_whole("seed", self.seed, 0)  # which the rows are dealt by, before the rest is looked at
        check_whole("rounds", self.rounds, 1)
        strategy = strategy_of(self.strategy)
        model, model_words = model_of(self.model)
        data, data_words = self.data_spec()
        lora = _as(LoRASpec, self.lora, "lora")
        if lora.targets is None:
            lora = replace(lora, targets=model.lora_targets)
        client = self.client or client_of(strategy, model, lora)
        clients = self.clients
        if clients == "default":
            clients = None if data.partition == "natural" else RunSpec.clients
        spec = RunSpec(
            strategy=strategy,
            client=client,
            model=model,
            data=data,
            lora=lora,
            evaluate=_as(EvaluationSpec, self.evaluate, "evaluate"),
            privacy=self._privacy(),
            robust=self.robust,
            rule=self.rule,
            steps=_listed(self.steps, "steps"),
            compression=compression_of(self.compression),
            server=server_of(self.server),
            scheduler=self.scheduler or Synchronous(),
            engine=self.engine or InProcess(),
            callbacks=_listed(self.callbacks, "callbacks"),
            clients=clients,
            clients_per_round=self.clients_per_round,
            rounds=self.rounds,
            ranks=self.ranks,
            weights=self.weights,
            min_updates=self.min_updates,
            secure_sum=self.secure_sum,
            record_updates=self.record_updates,
            seed=self.seed,
            defaults=defaults,
        )
        return replace(spec, settings=describe(spec, model_words, data_words)[0])

    def _privacy(self) -> Privacy | None:
        """The privacy, whose noise is made for the rounds of this run where it names no number of its own."""
        if isinstance(self.privacy, DPSGD | ClientLevel):
            return self.privacy.for_rounds(self.rounds)
        return self.privacy

    def data_spec(self) -> tuple[DataSpec, dict[str, Any] | None]:
        """The rows, and their settings in plain values; None for rows in memory."""
        options, partition = dict(self.data_options), self.partition
        if unknown := options.keys() - OPTIONS:
            raise ConfigError(
                f"data_options: expected {', '.join(sorted(OPTIONS))}, got {', '.join(sorted(unknown))}"
            )
        if isinstance(partition, str):
            options["partition"] = partition
        spec, words = self._source(options)
        if partition is not None and not isinstance(partition, str):
            return replace(spec, partition=partition), None  # no configuration can name a function
        return spec, words

    def _source(self, options: dict[str, Any]) -> tuple[DataSpec, dict[str, Any] | None]:
        named = {role: getattr(self, role) for role in ("text", "label", "prompt", "response")}
        columns = Columns(named | dict(self.columns), self.client_column, self.task)
        if isinstance(self.data, str) and self.data in presets("data") and not Path(self.data).exists():
            if self.task is not None:
                raise ConfigError(
                    f"task: the rows of the preset '{self.data}' have one already; leave it out"
                )
            rows = {} if self.test_rows is None else {"test_rows": self.test_rows}
            return data_preset(self.data, self.seed, **options, **rows)
        if isinstance(self.data, str | Path):
            return data_files(self.data, self.test, columns, self.labels, self.test_rows, self.seed, options)
        natural = isinstance(self.data, Mapping) and not hasattr(self.data, "columns")
        if natural or self.client_column is not None:
            options.setdefault("partition", "natural")
        held = 500 if self.test_rows is None else self.test_rows
        made = dataset(self.data, self.test, columns, self.labels, held, self.seed)
        return DataSpec(source=partial(_same, made), name="rows", task=own(made.task), **options), None


def data_files(
    train: str | Path,
    test: str | Path | None,
    columns: Columns,
    labels: Sequence[str] | None,
    test_rows: int | None,
    seed: int,
    options: Mapping[str, Any],
) -> tuple[DataSpec, dict[str, Any] | None]:
    """Rows of files, as data=files of the command line takes them, and their settings.

    The settings are None where the task is the user's own, which no configuration can name.
    """
    path = Path(train)
    if not path.exists():
        names = ", ".join(presets("data"))
        raise ConfigError(f"data: expected a preset ({names}), a file or a folder, got '{train}'")
    where = f"data: '{path}': expected columns named"
    named = columns.task is not None or any(columns.named.values())
    found = columns.fields(() if named else columns_of(path), where)
    given: dict[str, Any] = {
        "train": str(path.absolute()),
        "test": None if test is None else str(Path(test).absolute()),
    }
    rows = {} if test_rows is None else {"test_rows": test_rows}
    given |= {"labels": None if labels is None else list(labels), **rows, **found.columns}
    if (task := own(found.task)) is not None:
        read = partial(load, **given, client=found.client, task=task, seed=seed)
        return DataSpec(source=read, name=str(train), task=task, **options), None
    return files_preset(seed, **given, client=found.client, **options)


def own(task: LearningTask) -> LearningTask | None:
    """A learning task of the user's own; None for one of fedlora's."""
    return None if task in TASKS else task


def _same(made: Any) -> Any:
    """What is given, for a source that must be a function and be pickled."""
    return made


def _listed(given: Any, name: str) -> tuple[Any, ...]:
    """A list of parts, for which one part alone is easily given."""
    if not isinstance(given, Iterable):
        raise ConfigError(f"{name}: expected a list, got {given!r:.60}; put it into a list")
    return tuple(given)


def _as(kind: Any, given: Any, name: str) -> Any:
    """An object of a kind, from a dict of its fields where it is one."""
    if isinstance(given, kind):
        return given
    known = [f.name for f in fields(kind)]
    if isinstance(given, Mapping) and given.keys() <= {*known}:
        return kind(**given)
    raise ConfigError(
        f"{name}: expected an {kind.__name__} or a dict of {', '.join(known)}, got {given!r:.60}"
    )
