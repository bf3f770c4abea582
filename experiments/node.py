"""A site's own word: what it is, what it allows, and the Site that it becomes for a run."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedlora.data import Dataset, Row, encode
from fedlora.data.fields import ColumnError
from fedlora.data.files import rows_of
from fedlora.engine import Memory, Shelf, Site
from fedlora.engine.files import write_whole
from fedlora.errors import CheckpointError, ConfigError
from fedlora.models import Base, load
from fedlora.privacy import DPSGD
from fedlora.strategy import Strategy

from .bases import heads_of, load_base, model_choices
from .ranks import deal_ranks
from .rows import at_sites, dataset_of, deal
from .targets import Trust, make

RUN = "run"  # in the place of a file: rows dealt by the run itself, for trials
PROMISED = "promised.json"
COLUMNS = ("text", "label", "prompt", "response")


@dataclass(frozen=True)
class Plan:
    """What the server tells a node before it takes part.

    Args:
        experiment: under which the node keeps what belongs to the run.
        labels: those of a classification, in the order of the logits.
        model: the fingerprint of the base.
    """

    experiment: str
    labels: tuple[str, ...]
    model: str

    def record(self) -> dict[str, str]:
        """As values that a message takes."""
        return {"plan": json.dumps({**vars(self), "labels": list(self.labels)})}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Plan":
        """The plan that `record` wrote.

        Raises:
            ConfigError: it is none, or its experiment's name could lead out of the node's folder.
        """
        try:
            found = json.loads(str(record["plan"]))
            name = str(found["experiment"])
            plan = cls(name, tuple(map(str, found["labels"])), str(found["model"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"the server sent no plan of a run: {error!r}") from error
        check_name(name)
        return plan


def check_name(name: str) -> None:
    """Raise ConfigError unless an experiment's name is one that a folder may have."""
    if (
        not name
        or name.startswith(".")
        or not name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    ):
        raise ConfigError(f"engine.experiment: expected letters, digits, '-', '_' and '.', got {name!r:.60}")


@dataclass(frozen=True)
class Node:
    """What `--node-config` says of a site; all that it does not say is up to the run.

    Args:
        client: its number in the federation, from 0.
        data: its file, or a folder in which a run may name one; "run" lets the run deal it rows.
        rank: its LoRA rank.
        text: its own names of the columns; so for label, prompt and response.
        device: where it trains, such as cuda:0.
        model: its own folder of the base model, which must be the run's to the bit.
        state: a folder on its disk, for ledgers and what it keeps of a run.
        epsilon: the most that it spends over all runs; a run must then be private.
        max_rounds: the most rounds of a run.
        allow: modules of its own that configurations may name.
        warm: whether the model stays loaded between messages.
    """

    client: int
    data: str
    state: str
    rank: int | None = None
    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    response: str | None = None
    device: str | None = None
    model: str | None = None
    epsilon: float | None = None
    max_rounds: int | None = None
    allow: str = ""
    warm: bool = True

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Node":
        """The node that these words describe.

        Raises:
            ConfigError: a word that does not exist, or that cannot be; a typo must not switch a limit off.
        """
        given = {key.replace("-", "_"): value for key, value in config.items()}
        known = {field.name: field for field in fields(cls)}
        for key in given.keys() - known.keys():
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0].replace('_', '-')}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"--node-config: unknown key '{key.replace('_', '-')}'; {hint}")
        for key in ("client", "data", "state"):
            if key not in given:
                raise ConfigError(f"--node-config: {key} is missing; say {key}=...")
        whole = {"client": 0, "rank": 1, "max_rounds": 1}
        for key, low in whole.items():
            if key in given and not (type(given[key]) is int and given[key] >= low):
                raise ConfigError(
                    f"--node-config: {key}: expected a whole number from {low}, got {given[key]!r}"
                )
        if "epsilon" in given and not (type(given["epsilon"]) in (int, float) and given["epsilon"] > 0):
            raise ConfigError(f"--node-config: epsilon: expected a number above 0, got {given['epsilon']!r}")
        return cls(**given)

    @property
    def home(self) -> Path:
        """Its folder."""
        return Path(self.state).expanduser().absolute()

    def keeps(self, experiment: str) -> Path:
        """The folder of one run."""
        return self.home / experiment

    def check(self, config: DictConfig, plan: Plan) -> None:
        """Refuse a run that this site's own words do not allow.

        Raises:
            ConfigError: more rounds than agreed, no privacy where it is required, or no budget left.
        """
        if plan.experiment != str(config.engine.experiment):
            raise ConfigError(f"the plan is of '{plan.experiment}', the run of '{config.engine.experiment}'")
        if self.max_rounds is not None and config.rounds > self.max_rounds:
            raise ConfigError(
                f"this site takes part in at most {self.max_rounds} rounds (max-rounds), the run has "
                f"{config.rounds}"
            )
        if self.epsilon is None:
            return
        privacy: Any = config.get("privacy") or {}
        if not str(privacy.get("_target_", "")).endswith(".DPSGD"):
            raise ConfigError("this site takes part in private runs alone (epsilon); say privacy=dp_sgd")
        for key in ("insecure_test_seed", "public_metrics"):
            if privacy.get(key) not in (None, False):
                raise ConfigError(f"this site's epsilon would not hold: leave privacy.{key} out")
        others = sum(epsilon for name, epsilon in self._promised().items() if name != plan.experiment)
        if others + privacy.epsilon > self.epsilon * (1 + 1e-9):
            raise ConfigError(
                f"this site spends epsilon {self.epsilon:g} at most over all runs; {others:g} are promised "
                f"to others, this one asks {privacy.epsilon:g}"
            )

    def promise(self, config: DictConfig, plan: Plan) -> None:
        """Write down what a run may spend here, before it spends any of it.

        Raises:
            ConfigError: as `check` does; other runs may have come between.
        """
        self.check(config, plan)
        if self.epsilon is None:
            return
        known, epsilon = self._promised(), float(config.privacy.epsilon)
        if known.get(plan.experiment, 0.0) < epsilon:
            text = json.dumps(known | {plan.experiment: epsilon}, indent=2) + "\n"
            write_whole(self.home / PROMISED, lambda file: file.write_text(text, "utf-8"))

    def _promised(self) -> dict[str, float]:
        """Epsilon by experiment, of all runs that this site has trained for."""
        path = self.home / PROMISED
        try:
            return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}
        except ValueError as error:
            raise CheckpointError(f"'{path}', what this site has promised, is damaged: {error}") from error

    def rows(self, config: DictConfig, labels: Sequence[str]) -> list[Row]:
        """Its rows for a run.

        Raises:
            FedLoraError: the run asks for a file outside the site's folder, or the file cannot be used.
        """
        own = Path(self.data).expanduser()
        if self.data == RUN:
            dataset = dataset_of(config)
            parts = deal(config, dataset)
            if self.client >= len(parts):
                raise ConfigError(f"this site is client {self.client}, the run has only {len(parts)}")
            return [dataset.train[i] for i in parts[self.client].rows]
        if not at_sites(config):
            raise ConfigError(
                f"this site trains on its own file alone (data), the run brings data={config.data.name}; say "
                "data=sites"
            )
        asked = config.data.file
        if own.is_dir():
            if asked is None:
                raise ConfigError("this site has a folder of files; say which with data.file=NAME")
            path = (own / str(asked)).resolve()
            if not path.is_relative_to(own.resolve()):
                raise ConfigError(f"data.file: '{asked}' leads out of this site's folder")
            own = path
        elif asked is not None and Path(str(asked)).name != own.name:
            raise ConfigError(f"data.file: this site has one file for runs, which is not '{asked}'")
        columns = {name: getattr(self, name) or config.data[name] for name in COLUMNS}
        try:
            return rows_of(own, **columns, labels=labels, quotes=config.data.quotes)
        except ColumnError as error:
            raise error.at_a_site() from None


def site_of(config: DictConfig, node: Node, plan: Plan) -> tuple[Site, int]:
    """The Site that a node is for one run, and the number of its rows.

    Args:
        config: the run's.
        node: this site's own word.
        plan: what the server told.

    Raises:
        FedLoraError: the site cannot, or does not want to, take part.
    """
    config = Trust(tuple(node.allow.replace(",", " ").split())).into(config)  # whatever the server granted it
    node.check(config, plan)
    strategy: Strategy = make(config, "strategy")
    client = make(config, "client")
    rows = node.rows(config, plan.labels)
    if (config.get("privacy") or {}).get("_target_"):
        privacy = make(config, "privacy")
        if isinstance(privacy, DPSGD):
            client = client.privately(privacy)
            client.plan(len(rows))
    base = _base(config, node, plan)
    encoded = encode(base.kind, rows, plan.labels, base.tokenizer, config.data.max_length)
    base.check_lengths(encoded)
    keeps = node.keeps(plan.experiment) / "clients"
    held_out = bool(config.evaluate.clients or strategy.personal)
    return Site(base, client, lambda _: encoded, Memory(keeps), held_out, Shelf(keeps)), len(rows)


def rank_of(config: DictConfig, node: Node) -> int:
    """The site's rank: its own word, or what the run deals it."""
    if node.rank is not None:
        return node.rank
    return deal_ranks(config.ranks, max(config.clients or 0, node.client + 1), config.seed)[node.client]


def _base(config: DictConfig, node: Node, plan: Plan) -> Base:
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
