"""The Site that a node is for one run: what the server sent, as far as the site's own word allows it."""

from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from fedlora.config.instantiate import Trust, make, named
from fedlora.core.strategy import Strategy
from fedlora.data import Dataset, Example, Row, encode
from fedlora.deploy.site_config import Invitation, SiteConfig
from fedlora.engines.client_runtime import ClientRuntime
from fedlora.errors import CheckpointError, ConfigError, DataError
from fedlora.models import Base, load
from fedlora.privacy import DPSGD, Privacy
from fedlora.runner.assign_ranks import assign_ranks
from fedlora.runner.load_models import heads_of, load_base, model_choices
from fedlora.storage.client_state import ClientStore, DownloadCache
from fedlora.training.client import Client


@dataclass(frozen=True)
class SiteParts:
    """What a site brings to a run beside the model.

    Args:
        config: the run's, with what this site trusts.
        strategy: the run's algorithm.
        client: how the site trains, privately where the run is private.
        rows: the site's own.
    """

    config: DictConfig
    strategy: Strategy
    client: Client
    rows: Sequence[Row]


def site_parts(config: DictConfig, node: SiteConfig, plan: Invitation) -> SiteParts:
    """What a node brings to one run, looked at without its model.

    Args:
        config: the run's.
        node: this site's own word.
        plan: what the server told.

    Raises:
        FedLoraError: the site cannot, or does not want to, take part.
    """
    config = Trust(tuple(node.allow.replace(",", " ").split())).into(config)  # whatever the server granted it
    node.check(config, plan)
    strategy: Strategy = make(config, "strategy", Strategy)
    client: Client = make(config, "client", Client)
    privacy: Privacy | None = named(config, "privacy", Privacy)
    limits = node.limits
    if limits is not None:
        limits.accept(privacy)
    rows = node.rows(config, plan.labels)
    if isinstance(privacy, DPSGD):
        client = client.privately(privacy)
        noise = client.plan(len(rows))
        if not client.private or noise is None or noise.privacy is not privacy:
            raise ConfigError(f"client {type(client).__name__} does not train by the privacy of the run")
    if limits is not None:
        limits.check(plan.experiment, client.plan(len(rows)), len(rows))
    return SiteParts(config, strategy, client, rows)


def make_runtime(config: DictConfig, node: SiteConfig, plan: Invitation) -> tuple[ClientRuntime, int]:
    """The Site that a node is for one run, and the number of its rows.

    Args:
        config: the run's.
        node: this site's own word.
        plan: what the server told.

    Raises:
        FedLoraError: the site cannot, or does not want to, take part.
    """
    held = site_parts(config, node, plan)
    config = held.config
    base = _base(config, node, plan)
    encoded = _encoded(config, base, held.rows, plan)
    keeps = node.keeps(plan.experiment) / "clients"
    held_out = bool(config.evaluate.clients or held.strategy.personal)
    site = ClientRuntime(
        base,
        held.client,
        lambda _: encoded,
        ClientStore(keeps),
        held_out,
        DownloadCache(keeps),
        most=node.max_rounds,
        masked=node.secure,
    )
    return site, len(held.rows)


def _encoded(config: DictConfig, base: Base, rows: Sequence[Row], plan: Invitation) -> list[Example]:
    """The site's rows in tokens.

    Raises:
        ConfigError: rows may be longer than the model's positions; whether one is, is not told.
        DataError: a row cannot be used; its words stay at the site.
    """
    length = config.data.max_length
    if base.room is not None and length > base.room:
        raise ConfigError(
            f"data.max_length: the model has positions for {base.room} tokens, and this site does not tell "
            f"whether a row of its own is longer; say data.max_length={base.room} at most"
        )
    try:
        encoded = encode(base.kind, rows, plan.labels, base.tokenizer, length)
        base.check_lengths(encoded)
    except ConfigError as error:
        raise DataError(str(error)) from error
    return encoded


def rank_of(config: DictConfig, node: SiteConfig) -> int:
    """The site's rank: its own word, or what the run deals it."""
    if node.rank is not None:
        return node.rank
    return assign_ranks(config.ranks, max(config.clients or 0, node.client + 1), config.seed)[node.client]


def _base(config: DictConfig, node: SiteConfig, plan: Invitation) -> Base:
    """The base model at this site, which must be the server's."""
    kind = "classification" if plan.labels else "instruction"
    empty = Dataset(str(config.data.name), kind, (), (), plan.labels)  # type: ignore[arg-type]
    choices = model_choices(config)
    wanted = choices[node.client % len(choices)].copy()
    if node.device is not None:
        wanted.model.device = node.device
    if node.model is not None:
        wanted.model.path = node.model
    base = load_base(wanted, empty, load)
    if len(choices) == 1 and (found := base.fingerprint(heads_of(config, base))) != plan.model:
        raise CheckpointError(
            f"this site's model {base.path} is another than the server's: fingerprint {found[:16]}, expected "
            f"{plan.model[:16]}; copy the server's files, or check model.dtype and the head's seed"
        )
    return base
