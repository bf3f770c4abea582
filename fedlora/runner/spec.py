"""The description of a run: plain values and objects, the same from Python and from the command line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.callbacks.base import Callback
from fedlora.compression import Compression
from fedlora.core.strategy import Strategy
from fedlora.core.update_step import UpdateStep
from fedlora.data import Dataset, Row
from fedlora.engines.base import Engine, fans
from fedlora.engines.in_process import InProcess
from fedlora.errors import ConfigError
from fedlora.models import LoRA
from fedlora.models.device import chosen_dtype
from fedlora.models.parametrizations import LORA, DoRA, Parametrization, composed
from fedlora.privacy import DPSGD, Privacy
from fedlora.robust.base import Robust
from fedlora.rounds.round_config import RoundConfig
from fedlora.rounds.scheduling import Scheduler, Synchronous
from fedlora.server_optimizers import ServerOptimizer
from fedlora.tasks import LearningTask
from fedlora.training.client import Client
from fedlora.training.rules import LocalRule

from .spec_checks import check_parts

Partitioner = Callable[[Sequence[Row], int | None, np.random.Generator], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class ModelSpec:
    """Which base model the clients share, and how it is loaded.

    Args:
        path: a folder that transformers reads, or a name on the hub.
        source: makes the folder of a packaged model where there is no path.
        name: what reports call the model.
        dtype: of the frozen weights: float32, bfloat16 or float64; adapters are float32. Of auto it becomes
            the one that suits the device, here and now, so that all of a run has the same.
        device: cpu, cuda, cuda:1 or mps.
        quantize: 4bit or 8bit, on a GPU with bitsandbytes.
        gradient_checkpointing: compute layers once more on the way back, for less memory; None where a row
            does not fit a GPU otherwise.
        attention: transformers' attn_implementation, such as flash_attention_2; None takes fedlora's own.
        allow_pickle: load weights that are not safetensors; only who starts the run can allow it.
        loaded: a transformers model and its tokenizer that are in memory already.
        lora_targets: the modules that get an adapter where the run names none.
        lr: the learning rate that suits the model.
    """

    path: str | None = None
    source: Callable[[], str | Path] | None = None
    name: str = ""
    dtype: str = "float32"
    device: str = "cpu"
    quantize: str | None = None
    gradient_checkpointing: bool | None = None
    attention: str | None = None
    allow_pickle: bool = False
    loaded: tuple[Any, Any] | None = None
    lora_targets: Any = "all-linear"
    lr: float = 5e-4

    def __post_init__(self) -> None:
        if self.loaded is None:  # else it is there, in a dtype of its own
            object.__setattr__(self, "dtype", chosen_dtype(self.dtype, self.device))


@dataclass(frozen=True)
class DataSpec:
    """Which rows there are, and how they become clients.

    Args:
        source: reads the training and test rows.
        name: what reports call the data.
        partition: iid, dirichlet (by label), shards (by label) or natural; or a function from the training
            rows, the number of clients and a seeded generator to the positions of each client's rows.
        alpha: of the Dirichlet proportions; smaller is more skewed.
        shards: how many shards a client gets.
        min_rows: every client has at least so many rows.
        max_rows: and at most so many; None does not cap.
        max_length: tokens of a row; longer rows are cut.
        at_sites: whether the training rows are at other sites, so that here are test rows alone.
        columns: text, label, prompt, response -> the column of that name in a site's file.
        quotes: whether " encloses the cells of a site's table; None: it does in CSV, and is text in TSV.
        file: which file of its folder a site takes.
        client: the column that names a row's client.
        tested: reads the test rows alone, given the labels, where that can be done without the training rows.
        task: what is learnt, where it is no task of fedlora's own; it is the task of what `source` reads.
    """

    source: Callable[[], Dataset]
    name: str = ""
    partition: str | Partitioner = "iid"
    alpha: float = 0.5
    shards: int = 2
    min_rows: int = 1
    max_rows: int | None = None
    max_length: int = 128
    at_sites: bool = False
    columns: Mapping[str, Any] = field(default_factory=dict)
    quotes: bool | None = None
    file: str | None = None
    client: str | None = None
    tested: Callable[[Sequence[str]], Dataset] | None = None
    task: LearningTask | None = None


@dataclass(frozen=True)
class LoRASpec:
    """Which weights get an adapter, and which form it has.

    Args:
        targets: names of modules as PEFT takes them, or all-linear; None takes those that suit the model.
        target_parameters: names of parameters that hold the weights of many experts, as PEFT takes them.
        scale: s in ΔW = s·B·A, the same at every rank.
        alpha: or PEFT's lora_alpha: then s = alpha / rank.
        use_rslora: with alpha: s = alpha / √rank.
        rank_pattern: module -> rank, for every client.
        alpha_pattern: module -> alpha.
        head: the classification head: train (and send, and average), last (its last layer), or freeze.
        init: lora (A random, B = 0), pissa or olora (taken out of the base); None: the strategy's own.
        dora: whether the length of every row of the adapted weights is trained too, by DoRA.
        adapter: a folder that PEFT wrote, to start from.
        parametrization: another way to change the weights than plain LoRA's.
    """

    targets: Any = None
    target_parameters: Any = ()
    scale: float = 2.0
    alpha: float | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    head: str = "train"
    init: str | None = None
    dora: bool = False
    adapter: str | None = None
    parametrization: Parametrization = LORA

    def __post_init__(self) -> None:
        if self.head not in ("train", "last", "freeze"):
            raise ConfigError(f"lora.head: expected train, last or freeze, got '{self.head}'")

    @property
    def form(self) -> Parametrization:
        """How the weights are changed."""
        return composed(self.parametrization, DoRA() if self.dora else LORA)

    @property
    def scaling(self) -> LoRA:
        """The rule from a client's rank to the scales of its modules."""
        return LoRA(self.scale, self.alpha, self.use_rslora, self.rank_pattern, self.alpha_pattern)


@dataclass(frozen=True)
class EvaluationSpec:
    """When and on what the run evaluates.

    Args:
        rows: test rows, or validation: a fifth of the training rows at most, which nobody then trains on.
        every: rounds between evaluations on the test rows; 0 never evaluates.
        clients: each client also keeps a tenth of its rows and evaluates what it is sent on them.
        updates: each client's update is also evaluated by itself on the test rows.
        answers: so many test rows are answered word for word, by the base and by what is trained.
    """

    rows: str = "test"
    every: int = 1
    clients: bool = False
    updates: bool = False
    answers: int = 0

    def __post_init__(self) -> None:
        if self.rows not in ("test", "validation"):
            raise ConfigError(f"evaluate.rows: expected test or validation, got '{self.rows}'")
        if self.answers < 0:
            raise ConfigError(
                f"evaluate.answers: expected a number of test rows, or 0 for none; got {self.answers}"
            )


@dataclass(frozen=True)
class RunSpec:
    """One run.

    Args:
        strategy: how updates become the next state.
        client: how a client trains.
        model: the base model.
        data: the rows.
        models: other models than `model`, in turn over the clients, for strategies that allow it.
        lora: the adapter's form.
        evaluate: when and on what to evaluate.
        privacy: differential privacy of records or of clients; None without.
        robust: a rule against poisoned updates; None without.
        rule: what bends local training, beside the rules of the strategy; None without.
        steps: what changes an update on its way from the training to the strategy: in this order at the
            clients, in the reverse order at the server, and there before the robust rule.
        compression: how the numbers of messages travel; None as they are.
        server: the server's optimizer, in the place of the plain change of a round; None without.
        scheduler: when clients are sent tasks, and when their updates are aggregated.
        engine: where the clients run.
        callbacks: what watches the run, in the order in which they are called.
        clients: how many there are; None takes all that the rows name.
        clients_per_round: how many a round samples; None takes all.
        rounds: how many rounds the federation has.
        ranks: one rank; or a list, in turn over the clients; or rank -> share of the clients.
        weights: what a client counts: examples or uniform.
        min_updates: with fewer good updates a round leaves the state as it was.
        secure_sum: clients send under masks that cancel in their sum, so that the server sees no more.
        record_updates: keep the clients' updates of every round, for `fedlora replay`.
        seed: of partition, sampling, starts and training; the noise of privacy follows from no seed.
        settings: the whole run as the YAML that its config.yaml keeps.
        defaults: gives the settings of a run that says none, for reports to show what is different.
    """

    strategy: Strategy
    client: Client
    model: ModelSpec
    data: DataSpec
    models: Sequence[ModelSpec] = ()
    lora: LoRASpec = field(default_factory=LoRASpec)
    evaluate: EvaluationSpec = field(default_factory=EvaluationSpec)
    privacy: Privacy | None = None
    robust: Robust | None = None
    rule: LocalRule | None = None
    steps: Sequence[UpdateStep] = ()
    compression: Compression | None = None
    server: ServerOptimizer | None = None
    scheduler: Scheduler = field(default_factory=Synchronous)
    engine: Engine = field(default_factory=InProcess)
    callbacks: Sequence[Callback] = ()
    clients: int | None = 8
    clients_per_round: int | None = None
    rounds: int = 5
    ranks: Any = 8
    weights: str = "examples"
    min_updates: int = 1
    secure_sum: bool = False
    record_updates: bool = False
    seed: int = 0
    settings: str = ""
    defaults: Callable[[], Mapping[str, Any]] = dict

    def __post_init__(self) -> None:
        check_parts(self)

    @property
    def strategy_name(self) -> str:
        """The strategy's name as a run's files have it."""
        return type(self.strategy).__name__.lower()

    @property
    def strategy_class(self) -> str:
        """The strategy's name as messages have it, such as FlexLoRA."""
        return type(self.strategy).__name__

    @property
    def model_name(self) -> str:
        """The name of the model, or those of several."""
        return ", ".join(model.name for model in self.models) or self.model.name

    @property
    def local_client(self) -> Client:
        """The client with the run's rule, unless that comes with its tasks, and with privacy of records.

        Raises:
            ConfigError: the client follows no rules or is not private, or the rule must not be.
        """
        client = self.client
        if self.rule is not None and not self.rule.at_server:
            client = client.with_rules((self.rule,))
        return client.privately(self.privacy) if isinstance(self.privacy, DPSGD) else client

    @property
    def held_out(self) -> bool:
        """Whether each client keeps rows back, to evaluate its own model on them."""
        return self.evaluate.clients or self.strategy.personal

    def round_config(self, clients: int = 1) -> RoundConfig:
        """How the rounds go, with so many clients.

        Raises:
            ConfigError: a number that cannot be.
        """
        return RoundConfig(
            rounds=self.rounds,
            seed=self.seed,
            clients_per_round=self.clients_per_round,
            weights=self.weights,  # type: ignore[arg-type]  # RoundConfig checks it
            min_updates=self.min_updates,
            evaluate_every=self.evaluate.every,
            evaluate_updates=self.evaluate.updates,
            evaluate_clients=self.held_out,
            secure_sum=self.secure_sum,
            timeout=self.engine.timeout,
            over_select=self.engine.over_select,
            min_replies=self.engine.min_replies,
            wait=self.engine.wait,
            clients=clients,
            tree=fans(self.engine.tree),
        )
