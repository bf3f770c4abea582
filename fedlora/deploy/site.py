"""The client runtime that a site is for one run: what the server sent, as far as the site allows it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from omegaconf import DictConfig

from fedlora.config.instantiate import Trust
from fedlora.config.translate import plain, run_spec
from fedlora.data import Dataset, Example, Row
from fedlora.deploy.site_config import Invitation, SiteConfig
from fedlora.engines.client_runtime import ClientRuntime
from fedlora.errors import CheckpointError, ConfigError, DataError
from fedlora.models import Base
from fedlora.privacy import DPSGD
from fedlora.runner.assemble import client_runtime
from fedlora.runner.assign_ranks import assign_ranks
from fedlora.runner.load_models import load_base, trained_heads
from fedlora.runner.spec import RunSpec
from fedlora.storage.client_state import ClientStore, DownloadCache
from fedlora.tasks import learning_task
from fedlora.training.client import Client

OF_SERVER = (
    "scheduler",
    "server",
    "engine",
    "robust",
    "callbacks",
)  # nothing of a site's


@dataclass(frozen=True)
class SiteParts:
    """What a site brings to a run beside the model.

    Args:
        spec: the run's description, made with what this site trusts.
        client: how the site trains, privately where the run is private.
        rows: the site's own.
    """

    spec: RunSpec
    client: Client
    rows: Sequence[Row]


def site_parts(config: DictConfig, node: SiteConfig, invitation: Invitation) -> SiteParts:
    """What a node brings to one run, looked at without its model.

    Args:
        config: the run's.
        node: this site's own settings.
        invitation: what the server told.

    Raises:
        FedLoraError: the site cannot, or does not want to, take part.
    """
    config = Trust(tuple(node.allow.replace(",", " ").split())).into(config)  # whatever the server granted it
    node.check(config, invitation)
    spec = run_spec(config, dict.fromkeys(OF_SERVER))
    limits = node.limits
    if limits is not None:
        limits.accept(spec.privacy)
    rows, client = node.rows(spec, invitation.labels), spec.local_client
    if isinstance(spec.privacy, DPSGD):
        noise = client.plan(len(rows))
        if not client.private or noise is None or noise.privacy is not spec.privacy:
            raise ConfigError(f"client {type(client).__name__} does not train by the privacy of the run")
    if limits is not None:
        limits.check(invitation.experiment, client.plan(len(rows)), len(rows))
    return SiteParts(spec, client, rows)


def make_runtime(config: DictConfig, node: SiteConfig, invitation: Invitation) -> tuple[ClientRuntime, int]:
    """The runtime that a node is for one run, and the number of its rows.

    Args:
        config: the run's.
        node: this site's own settings.
        invitation: what the server told.

    Raises:
        FedLoraError: the site cannot, or does not want to, take part.
    """
    parts = site_parts(config, node, invitation)
    base = _base(parts.spec, node, invitation)
    encoded = _encoded(parts.spec, base, parts.rows, invitation)
    folder = node.keeps(invitation.experiment) / "clients"
    runtime = client_runtime(
        parts.spec,
        base,
        lambda _: encoded,
        ClientStore(folder),
        DownloadCache(folder),
        most=node.max_rounds,
        masked=node.secure,
    )
    return runtime, len(parts.rows)


def _encoded(spec: RunSpec, base: Base, rows: Sequence[Row], invitation: Invitation) -> list[Example]:
    """The site's rows in tokens.

    Raises:
        ConfigError: rows may be longer than the model's positions; whether one is, is not told.
        DataError: a row cannot be used; its words stay at the site.
    """
    length = spec.data.max_length
    if base.room is not None and length > base.room:
        raise ConfigError(
            f"data.max_length: the model has positions for {base.room} tokens, and this site does not tell "
            f"whether a row of its own is longer; say data.max_length={base.room} at most"
        )
    try:
        encoded = base.task.encode(rows, invitation.labels, base.tokenizer, length)
        base.check_lengths(encoded)
    except ConfigError as error:
        raise DataError(str(error)) from error
    return encoded


def rank_of(config: DictConfig, node: SiteConfig) -> int:
    """The site's rank: its own word, or what the run deals it."""
    if node.rank is not None:
        return node.rank
    ranks = plain(config.ranks)
    return assign_ranks(ranks, max(config.clients or 0, node.client + 1), config.seed)[node.client]


def _base(spec: RunSpec, node: SiteConfig, invitation: Invitation) -> Base:
    """The base model at this site, which must be the server's."""
    empty = Dataset(spec.data.name, learning_task(invitation.task), (), (), invitation.labels)
    choices = spec.models or (spec.model,)
    wanted = choices[node.client % len(choices)]
    wanted = replace(wanted, device=node.device or wanted.device, path=node.model or wanted.path)
    base = load_base(wanted, empty, spec.seed)
    found = base.fingerprint(trained_heads(spec.lora, base))
    if len(choices) == 1 and found != invitation.model:
        raise CheckpointError(
            f"this site's model {base.path} is another than the server's: fingerprint {found[:16]}, expected "
            f"{invitation.model[:16]}; copy the server's files, or check model.dtype and the head's seed"
        )
    return base
