"""Messages to a site's worker, as Flower would bring them, without a network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from omegaconf import DictConfig, OmegaConf

from fedlora.config.composition import compose
from fedlora.config.translate import run_spec
from fedlora.deploy.site_config import Invitation
from fedlora.deploy.worker import Worker
from fedlora.rounds.codec import write_task
from fedlora.runner.assemble import assemble
from fedlora.runner.load_models import trained_heads

JOB = (
    "engine=deploy",
    "engine.superlink=x",
    "engine.experiment=trial",
    "model=tiny",
    "clients=2",
    "ranks=[2,4]",
    "strategy=flexlora",
)
SITES = ("data=sites", "data.text=text", "data.label=label")


def rows(path: Path, count: int = 24, label: str = "label", extra: str | None = None) -> Path:
    """A file of a site's rows."""
    found = [{"text": f"w{i} w{i + 1} w{i * 7 % 5}", label: "ab"[i % 2]} for i in range(count)]
    if extra is not None:
        found.append({"text": "w1", label: extra})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, found)) + "\n")
    return path


class Asked:
    """A worker, and messages to it as Flower would bring them."""

    def __init__(self, worker: Worker, config: DictConfig, site: dict[str, Any], plan: Invitation) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
        self.worker, self.plan = worker, plan
        run = {"config": OmegaConf.to_yaml(config), "verb": "run"}
        self.context = Context(7, 11, dict(site), RecordDict(), run)  # type: ignore[arg-type]

    def __call__(self, kind: str = "query.profile", content: RecordDict | None = None) -> Message:
        """The reply to a message; by default to the one by which a server meets a site."""
        profile = RecordDict({"plan": ConfigRecord(dict(self.plan.record()))})
        message = Message(profile if content is None else content, 11, kind)
        message.metadata.__dict__["_message_id"] = "m"
        return self.worker.answer(message, self.context)

    def train(self, round: int = 1) -> Message:
        """The reply to a round's training message."""
        return self("train", self.work(round))

    def work(self, round: int = 1) -> RecordDict:
        """What an honest server, which says nothing odd in its configuration, sends for a round."""
        honest = OmegaConf.create(str(self.context.run_config["config"]))
        assert isinstance(honest, DictConfig)
        honest.privacy, honest.secure_sum = {"name": "none"}, False
        job = assemble(run_spec(honest))
        return write_task(job.spec.strategy.task(job.start, job.peer(0, 2)), round, 0)[0]

    def why(self, reply: Message | None = None) -> str:
        """Why a message, or else the server's first, is refused."""
        reply = self() if reply is None else reply
        assert reply.has_error(), reply.content
        assert "\n" not in reply.error.reason
        return reply.error.reason


@pytest.fixture(scope="session")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DictConfig]:
    """The configuration of a run over sites, as a server sends it."""
    test = rows(tmp_path_factory.mktemp("server") / "test.jsonl")
    known: dict[tuple[str, ...], DictConfig] = {}

    def go(*more: str) -> DictConfig:
        if more not in known:
            data = [] if "data=tiny" in more else [*SITES, f"data.test={test}"]
            known[more] = compose([*JOB, *data, *more])
        return known[more].copy()

    return go


@pytest.fixture(scope="session")
def model(composed: Any) -> str:
    """The fingerprint of the server's model."""
    job = assemble(run_spec(composed()))
    return job.base.fingerprint(trained_heads(job.spec.lora, job.base))


@pytest.fixture
def site(tmp_path: Path) -> dict[str, Any]:
    """What a site says in its node.toml."""
    return {"client": 0, "state": str(tmp_path / "state"), "data": str(rows(tmp_path / "own" / "rows.jsonl"))}


@pytest.fixture
def ask(model: str) -> Callable[..., Asked]:
    """A worker of a site's, and messages to it."""

    def make(config: DictConfig, site: dict[str, Any], **plan: Any) -> Asked:
        known = {
            "experiment": "trial",
            "task": "classification",
            "labels": ("a", "b"),
            "model": model,
            **plan,
        }
        return Asked(Worker(), config, site, Invitation(**known))

    return make
