"""Parts of the user's own in a private run: what would break its epsilon is refused before round 1."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import fedlora as fl
from fedlora.core.adapter import Adapter
from fedlora.core.parametrization import Parametrization
from fedlora.errors import CheckpointError, ConfigError, ModelError
from fedlora.privacy import DPSGD, ClientLevel
from fedlora.rounds.scheduling import Synchronous
from fedlora.training.rules import FedProx

pytestmark = pytest.mark.slow  # whole runs

SEEDED = DPSGD(epsilon=6, insecure_test_seed=1)


def run(**more: Any) -> fl.Run:
    settings = {"strategy": "ffalora", "ranks": 4, "clients": 3, "rounds": 1, "progress": False}
    return fl.simulate("tiny", "tiny", **settings | more)


@dataclass(frozen=True)
class Again(Synchronous):
    """A scheduler of the user's own, which could put a client into one release several times."""


@pytest.mark.parametrize("scheduler", [Again(), Synchronous()], ids=lambda s: type(s).__name__)
def test_under_client_level_privacy_only_the_scheduler_of_the_proof_runs(scheduler: fl.Scheduler) -> None:
    settings = {"privacy": ClientLevel(epsilon=8, insecure_test_seed=1), "scheduler": scheduler}
    if type(scheduler) is Synchronous:
        assert run(**settings).summary["epsilon"] <= 8
    else:
        with pytest.raises(ConfigError, match=r"scheduler: .* nothing shows of Again"):
            run(**settings)


@pytest.mark.parametrize("privacy", [None, SEEDED, ClientLevel(epsilon=8)], ids=repr)
def test_privacy_that_the_client_alone_knows_of_is_refused(privacy: Any) -> None:
    with pytest.raises(ConfigError, match=r"client\.privacy: LocalTraining .* say privacy=\.\.\. of the run"):
        run(privacy=privacy, client=fl.clients.LocalTraining(lr=0.1, privacy=SEEDED))


@dataclass(frozen=True)
class OwnForm(Parametrization):
    """LoRA by another name. With `mixing` its row dimension meets a norm, so that records are not apart."""

    factors = ("down", "up")
    pairs = False
    mixing: bool = False

    def start(self, layer: Any, fresh: Any, rng: Any) -> dict[str, Any]:
        return {"down": fresh.A, "up": fresh.B + 0.01}

    def low_rank(self, layer: Any, factors: Any) -> tuple[Any, Any]:
        down = factors["down"]
        return (down / down.norm() if self.mixing else down), factors["up"]


def test_a_parametrization_is_tested_for_itself_whatever_has_passed_before() -> None:
    settings = {"strategy": "fedit", "privacy": SEEDED}
    assert run(**settings, lora={"parametrization": OwnForm()}).summary["epsilon"] <= 6
    with pytest.raises(ModelError, match="depends on the other records"):
        run(**settings, lora={"parametrization": OwnForm(mixing=True)})


@dataclass(frozen=True)
class Leaking(FedProx):
    """A rule that says nothing of its own gradient; what FedProx says is true of FedProx's."""

    strength: float = 1.0

    def gradient(self, adapter: Adapter, start: Adapter) -> dict[str, Any]:  # type: ignore[override]
        return {}


@dataclass(frozen=True)
class Named(FedProx):
    """One that changes neither method."""


def test_what_a_rule_says_of_its_rows_is_not_inherited_by_another_gradient() -> None:
    with pytest.raises(ConfigError, match="the term that Leaking adds"):
        run(privacy=SEEDED, rule=Leaking())
    assert run(privacy=SEEDED, rule=Named(0.5)).summary["epsilon"] <= 6


@dataclass(frozen=True)
class Watching(FedProx):
    """A rule with what must not be published."""

    token: str = field(default="hf_SECRET")
    known: tuple[str, ...] = ("alice has flu",)
    hidden: int = field(default=4711, repr=False)


def test_what_an_object_of_the_users_own_holds_is_not_published(tmp_path: Path) -> None:
    run(rule=Watching(0.25), out=tmp_path / "run")
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert not [word for word in ("SECRET", "alice", "4711") if word in text]
    assert "Watching" in text
    assert "0.25" in text


def test_a_private_run_does_not_go_on_without_privacy(tmp_path: Path) -> None:
    session = fl.Session("tiny", "tiny", clients=3, rounds=2, ranks=4, privacy=SEEDED, out=tmp_path / "run")
    next(session)
    session.close()
    config = OmegaConf.load(tmp_path / "run" / "config.yaml")
    config.privacy = {"name": "none"}
    OmegaConf.save(config, tmp_path / "run" / "config.yaml")
    with pytest.raises(CheckpointError, match="this run was private"):
        fl.open(tmp_path / "run").resume(progress=False)


def test_reading_a_folder_makes_nothing_that_only_a_run_needs(tmp_path: Path) -> None:
    run(out=tmp_path / "run")
    config = OmegaConf.load(tmp_path / "run" / "config.yaml")
    for part in ("engine", "scheduler", "client", "strategy"):
        config[part] = {"_target_": "os.system", "command": "true"}
    OmegaConf.save(config, tmp_path / "run" / "config.yaml")
    found = fl.open(tmp_path / "run")
    assert len(found.predict(["a cat"])) == 1
    assert "logits" in found.verify()
    with pytest.raises(ConfigError, match=r"'os\.system' is outside"):
        found.resume(rounds=2)


def test_the_name_of_a_model_is_never_a_file_to_read(tmp_path: Path) -> None:
    (tmp_path / "ward.yaml").write_text("path: /srv/private/ward-7\nsource: null\n")
    session = fl.Session("tiny", "tiny", clients=2, rounds=1, out=tmp_path / "run")
    next(session)
    session.close()
    config = OmegaConf.load(tmp_path / "run" / "config.yaml")
    config.models = [str(tmp_path / "ward")]
    OmegaConf.save(config, tmp_path / "run" / "config.yaml")
    (model,) = fl.open(tmp_path / "run").spec.models
    assert model.path == str(tmp_path / "ward")
