"""From a composed configuration to the objects of a run."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlora.adapter import Adapter
from fedlora.client import Client
from fedlora.data import Dataset, Example, Part, encode, partition
from fedlora.engine import Rules, Site
from fedlora.errors import ConfigError, FedLoraError
from fedlora.models import Base, LoRA, fresh_adapter, load, load_adapter, merge, targets
from fedlora.protocol import Peer, State
from fedlora.seeds import generator
from fedlora.strategy import Strategy
from fedlora.trainer import evaluate


@dataclass(frozen=True)
class Job:
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
    """

    dataset: Dataset
    base: Base
    parts: Sequence[Part]
    ranks: Sequence[int]
    test: Sequence[Example]
    site: Site
    strategy: Strategy
    start: State
    lora: LoRA
    rules: Rules

    @property
    def metric(self) -> str:
        """The headline metric."""
        return "accuracy" if self.dataset.kind == "classification" else "perplexity"

    def peer(self, client: int, rank: int) -> Peer:
        """What the server knows of a client."""
        return self.lora.peer(client, rank, self.start.adapter.pairs)

    def nodes(self) -> list[dict[str, int]]:
        """One node config a client."""
        return [{"client": client, "rank": rank} for client, rank in enumerate(self.ranks)]

    def evaluate(self, adapters: Sequence[Adapter]) -> list[dict[str, float]]:
        """Loss and the task's metrics of each adapter on the test rows."""
        found = evaluate(self.base, adapters, [self.test] * len(adapters))
        if self.metric == "accuracy":
            return [{"loss": loss, "accuracy": right} for loss, right in found]
        return [
            {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": right}
            for loss, right in found
        ]

    def majority(self) -> float | None:
        """The accuracy of always saying the most frequent training label."""
        if self.dataset.kind != "classification":
            return None
        said = [row.target for row in self.dataset.train]
        label = max(sorted(set(said)), key=said.count)
        return sum(row.target == label for row in self.dataset.test) / len(self.dataset.test)


def build(config: DictConfig) -> Job:
    """Load and check everything before the first round.

    Raises:
        FedLoraError: a setting, a file, a model or a pairing of them cannot work.
    """
    strategy: Strategy = make(config.strategy, "strategy")
    client: Client = make(config.client, "client")
    lora = LoRA(
        config.lora.scale,
        config.lora.alpha,
        config.lora.use_rslora,
        dict(config.lora.rank_pattern),
        dict(config.lora.alpha_pattern),
    )
    rules = Rules(
        config.rounds,
        config.seed,
        config.clients_per_round,
        config.weights,
        config.min_updates,
        config.evaluate.every,
        config.evaluate.updates,
    )
    fuse_of(config.engine.fuse)
    if config.lora.head not in ("train", "freeze"):
        raise ConfigError(f"lora.head: expected train or freeze, got '{config.lora.head}'")
    dataset: Dataset = make(config.data.source, "data")
    d = config.data
    parts = partition(
        dataset.train,
        d.partition,
        config.clients,
        d.alpha,
        d.shards,
        d.min_rows,
        d.max_rows,
        config.seed,
        kind=dataset.kind,
    )
    ranks = deal_ranks(config.ranks, len(parts), config.seed)
    if rules.min_updates > len(parts):
        raise ConfigError(f"min_updates: expected at most {len(parts)}, the clients; got {rules.min_updates}")
    if len(set(ranks)) > 1 and not strategy.mixed_ranks:
        raise ConfigError(
            f"strategy {type(strategy).__name__} combines clients of one rank only, ranks are "
            f"{sorted(set(ranks))}; use strategy=flexlora, or one rank"
        )
    train_head = config.lora.head == "train"
    given_head = config.lora.adapter is not None and not train_head
    base = load_base(config, dataset, load if given_head else _shared)
    modules = targets(base, _plain(config.lora.targets)) if config.lora.targets else {}
    if config.lora.adapter is not None:
        adapter = load_adapter(Path(config.lora.adapter), base)
        if adapter.extra and not train_head:  # the base keeps that head, nobody trains or sends it
            merge(base, Adapter({}, adapter.extra))
            adapter = Adapter(adapter.pairs)
    else:
        largest = lora.peer(0, max(ranks), modules)
        adapter = fresh_adapter(base, modules, largest, train_head, config.seed)
    if not adapter.pairs and not adapter.extra:
        raise ConfigError("lora.targets is empty and no head is trained: there is nothing to train")
    if not adapter.extra and train_head:
        adapter = Adapter(adapter.pairs, base.head_state())
    start = strategy.init(adapter)
    for rank in sorted(set(ranks)):
        strategy.task(start, lora.peer(0, rank, adapter.pairs))  # refuses a rank that cannot be served
    rows = encode(dataset.kind, dataset.train, dataset.labels, base.tokenizer, d.max_length)
    test = encode(dataset.kind, dataset.test, dataset.labels, base.tokenizer, d.max_length)
    own = [[rows[i] for i in part.rows] for part in parts]
    site = Site(base, client, own.__getitem__, config.evaluate.clients)
    return Job(dataset, base, parts, ranks, test, site, strategy, start, lora, rules)


# A base is never written to, so the runs of one process share it.
_shared = functools.lru_cache(maxsize=1)(load)


def load_base(config: DictConfig, dataset: Dataset, loader: Callable[..., Base] = load) -> Base:
    """The base model that the configuration names."""
    if OmegaConf.is_missing(config.model, "path"):
        raise ConfigError("model.path: needs a value, got none; say model.path=FOLDER-OR-NAME")
    path = config.model.path or make(config.model.source, "model")
    where = (config.model.dtype, config.model.device, config.seed)
    return loader(path, dataset.kind, dataset.labels, *where)


def make(config: DictConfig, group: str) -> Any:
    """Make what a group's `_target_` names.

    Raises:
        FedLoraError: what the target itself raises, or a ConfigError in one line for anything else.
    """
    try:
        return hydra.utils.instantiate(config)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, FedLoraError):
            raise cause from None
        raise ConfigError(f"{group}: {' '.join(str(cause or error).split())}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{group}: {' '.join(str(error).split())}") from error


def deal_ranks(ranks: Any, clients: int, seed: int) -> list[int]:
    """Each client's rank.

    Args:
        ranks: a number for all; a list, taken in turn; or rank -> share, whose parts are dealt at random.
        clients: how many.
        seed: of the deal.
    """
    plain = _plain(ranks)
    if isinstance(plain, Mapping):
        try:
            shares = {_rank(rank): float(share) for rank, share in plain.items()}
        except (TypeError, ValueError):
            shares = {}
        total = sum(shares.values())
        if not 0 < total < math.inf or min(shares.values()) < 0:
            raise ConfigError(f"ranks: expected shares above 0, such as {{8: 0.5, 2: 0.5}}, got {plain}")
        ends = [round(sum(list(shares.values())[: i + 1]) / total * clients) for i in range(len(shares))]
        sizes = [stop - start for start, stop in zip([0, *ends], ends, strict=False)]
        dealt = [rank for rank, size in zip(shares, sizes, strict=True) for _ in range(size)]
        return [int(rank) for rank in generator(seed, "ranks").permutation(dealt)]
    turns = [_rank(rank) for rank in (plain if isinstance(plain, list) else [plain])]
    if not turns:
        raise ConfigError("ranks: expected at least one rank, got an empty list")
    return [turns[client % len(turns)] for client in range(clients)]


def _rank(value: Any) -> int:
    try:
        rank = int(value)
    except (TypeError, ValueError, OverflowError):
        rank = 0
    if rank < 1 or rank != float(value):
        raise ConfigError(f"ranks: expected whole numbers of at least 1, got {value!r}")
    return rank


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def fuse_of(value: Any) -> int | None:
    """`engine.fuse` as a number of clients; None for auto."""
    if value == "auto":
        return None
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"engine.fuse: expected auto or a whole number of at least 1, got {value!r}")
    return value
