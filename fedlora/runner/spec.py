"""The description of a run: plain values and objects, the same from Python and from the command line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora.callbacks.base import Callback
from fedlora.compression import Compression
from fedlora.core.strategy import Strategy
from fedlora.core.update_step import UpdateStep
from fedlora.engines.base import Engine, fans
from fedlora.engines.in_process import InProcess
from fedlora.privacy import DPSGD, Privacy
from fedlora.robust.base import Robust
from fedlora.rounds.round_config import RoundConfig
from fedlora.rounds.scheduling import Scheduler, Synchronous
from fedlora.server_optimizers import ServerOptimizer
from fedlora.training.client import Client
from fedlora.training.rules import LocalRule

from .spec_checks import check_parts
from .spec_parts import DataSpec, EvaluationSpec, LoRASpec, ModelSpec


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
