"""A site's own word: what it is, and what it allows."""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedlora.data import Row
from fedlora.data.fields import ColumnError
from fedlora.data.files import rows_of
from fedlora.deploy.limits import LOCK, PROMISED, Limits
from fedlora.errors import ConfigError
from fedlora.runner.load_data import load_dataset, partition_rows
from fedlora.runner.spec import RunSpec

RUN = "run"  # in the place of a file: rows dealt by the run itself, for trials
OWN = ("worker", "worker.log", PROMISED, LOCK)  # what stands beside the runs in a site's folder
COLUMNS = ("text", "label", "prompt", "response")


@dataclass(frozen=True)
class Invitation:
    """What the server tells a node before it takes part.

    Args:
        experiment: under which the node keeps what belongs to the run.
        task: the name of what is learnt.
        labels: the names of the model's outputs, in their order.
        model: the fingerprint of the base; empty where the server asks about all but the model.
    """

    experiment: str
    task: str
    labels: tuple[str, ...]
    model: str

    def record(self) -> dict[str, str]:
        """As values that a message takes."""
        return {"plan": json.dumps({**vars(self), "labels": list(self.labels)})}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Invitation":
        """The plan that `record` wrote.

        Raises:
            ConfigError: it is none, or its experiment's name could lead out of the node's folder.
        """
        try:
            found = json.loads(str(record["plan"]))
            name = str(found["experiment"])
            labels = tuple(map(str, found["labels"]))
            plan = cls(name, str(found["task"]), labels, str(found["model"]))
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
    if name in OWN:
        raise ConfigError(f"engine.experiment: a site keeps something else under '{name}'; take another name")


@dataclass(frozen=True)
class SiteConfig:
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
        delta: the largest of a run, beside epsilon; None takes min(1e-5, a tenth of 1 / rows).
        max_rounds: the most trainings of a run that it answers; one that is asked for again counts again.
        secure: whether it sends updates under the masks of a secure sum alone.
        labels: all labels of its rows, by commas; a run that names others is refused without a look at the
            rows, so that a refusal tells nothing of them. Empty: whether its rows fit a run's labels is told.
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
    delta: float | None = None
    max_rounds: int | None = None
    secure: bool = False
    labels: str = ""
    allow: str = ""
    warm: bool = True

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "SiteConfig":
        """The node that these words describe.

        Raises:
            ConfigError: a word that does not exist, or that cannot be; a typo must not switch a limit off.
        """
        given = {key.replace("-", "_"): value for key, value in config.items()}
        if len(given) < len(config):
            twice = next(key for key in config if "-" in key and key.replace("-", "_") in config)
            raise ConfigError(f"--node-config: {twice}: is said twice, with - and with _; say it once")
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
        for key, top in (("epsilon", math.inf), ("delta", 1.0)):
            if key in given and not (type(given[key]) in (int, float) and 0 < given[key] < top):
                wanted = "a number above 0" if top == math.inf else "a number between 0 and 1"
                raise ConfigError(f"--node-config: {key}: expected {wanted}, got {given[key]!r}")
        for key in ("secure", "warm"):
            if key in given and type(given[key]) is not bool:
                raise ConfigError(f"--node-config: {key}: expected true or false, got {given[key]!r}")
        if "delta" in given and "epsilon" not in given:
            raise ConfigError(
                "--node-config: delta: is read beside epsilon, which is missing; say epsilon=..."
            )
        return cls(**given)

    @property
    def home(self) -> Path:
        """Its folder."""
        return Path(self.state).expanduser().absolute()

    def keeps(self, experiment: str) -> Path:
        """The folder of one run."""
        return self.home / experiment

    def check(self, config: DictConfig, plan: Invitation) -> None:
        """Refuse a run that this site's own words do not allow.

        Raises:
            ConfigError: another plan's run, more rounds than agreed, or updates in the clear.
        """
        if plan.experiment != str(config.engine.experiment):
            raise ConfigError(f"the plan is of '{plan.experiment}', the run of '{config.engine.experiment}'")
        if self.max_rounds is not None and config.rounds > self.max_rounds:
            raise ConfigError(
                f"this site takes part in at most {self.max_rounds} rounds (max-rounds), the run has "
                f"{config.rounds}"
            )
        own = {name.strip() for name in self.labels.split(",") if name.strip()}
        if own and {*plan.labels} != own:
            raise ConfigError(
                f"this site's rows have the labels {', '.join(sorted(own))} (labels), the run names "
                f"{', '.join(plan.labels) or 'none'}; say data.labels=[{','.join(sorted(own))}]"
            )
        if self.secure and config.get("secure_sum") is not True:
            raise ConfigError(
                "this site sends updates under masks alone (secure); say secure_sum=true, with a strategy "
                "that it suits"
            )

    @property
    def limits(self) -> Limits | None:
        """Those of its privacy; None where it has none."""
        return None if self.epsilon is None else Limits(self.home, self.epsilon, self.delta, self.client)

    def rows(self, spec: RunSpec, labels: Sequence[str]) -> list[Row]:
        """Its rows for a run.

        Raises:
            FedLoraError: the run asks for a file outside the site's folder, or the file cannot be used.
        """
        own, data = Path(self.data).expanduser(), spec.data
        if self.data == RUN:
            dataset = load_dataset(spec)
            parts = partition_rows(data, dataset, spec.clients, spec.seed)
            if self.client >= len(parts):
                raise ConfigError(f"this site is client {self.client}, the run has only {len(parts)}")
            return [dataset.train[i] for i in parts[self.client].rows]
        if not data.at_sites:
            raise ConfigError(
                f"this site trains on its own file alone (data), the run brings data={data.name}; say "
                "data=sites"
            )
        if own.is_dir():
            if data.file is None:
                raise ConfigError("this site has a folder of files; say which with data.file=NAME")
            path = (own / str(data.file)).resolve()
            if not path.is_relative_to(own.resolve()):
                raise ConfigError(f"data.file: '{data.file}' leads out of this site's folder")
            own = path
        elif data.file is not None and Path(str(data.file)).name != own.name:
            raise ConfigError(f"data.file: this site has one file for runs, which is not '{data.file}'")
        columns = {name: getattr(self, name) or data.columns[name] for name in COLUMNS}
        try:
            return rows_of(own, **columns, labels=labels, quotes=data.quotes)
        except ColumnError as error:
            raise error.at_a_site() from None
