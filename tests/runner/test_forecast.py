"""`fedlora privacy`: plans before anything is spent, ledgers after, one line where there is nothing."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.cli.main import main
from fedlora.config.composition import compose
from fedlora.config.translate import run_spec
from fedlora.core.adapter import Adapter, Pair
from fedlora.errors import CheckpointError, ConfigError
from fedlora.privacy import DPSGD, ClientLevel, Entry, Ledger
from fedlora.runner import audit as audit_module
from fedlora.runner.assemble import assemble
from fedlora.runner.forecast import _moved
from fedlora.runner.forecast import plan as plan_of
from fedlora.saved_runs.ledgers import ledgers
from fedlora.storage.client_state import ClientStore

pytestmark = pytest.mark.slow

TINY = (
    "model=tiny",
    "data=tiny",
    "clients=3",
    "rounds=2",
    "ranks=4",
    "client.batch_size=4",
    "client.steps=4",
)
TINY += ("privacy.accountant=rdp", "privacy=dp_sgd", "strategy=ffalora")


def plan(words: list[str], records: int | None = None) -> list[Any]:
    """The tables of a plan for the words of the command line."""
    if not any(word.startswith("privacy=") for word in words):
        words = [*words, "privacy=dp_sgd"]
    rest = [word for word in words if not word.startswith("strategy")]
    asked = next((word.partition("=")[2] for word in words if word.startswith("strategy=")), "")

    def other(name: str) -> Any:
        return run_spec(compose([*rest, f"strategy={name}"]))

    return plan_of(run_spec(compose(words)), other, records, asked)


def cells(table: Any, column: str) -> list[str]:
    at = next(i for i, name in enumerate(table.header) if name.startswith(column))
    return [row[at] for row in table.rows]


@pytest.fixture(scope="module")
def planned() -> Any:
    return plan([*TINY, "privacy.epsilon=5"], records=400)


def test_a_plan_is_the_one_that_training_follows(planned: Any) -> None:
    own = DPSGD(epsilon=5, participations=2, accountant="rdp").plan(400, 4, 4)
    [row] = planned[0].rows
    assert row[:2] == ["400", "3"]
    assert cells(planned[0], "sigma") == [f"{own.sigma:.3f}"]
    assert cells(planned[0], "steps") == ["8"]
    assert 4.5 < float(cells(planned[0], "epsilon")[0]) <= 5


def test_signal_over_noise_is_that_of_the_best_case(planned: Any) -> None:
    own = DPSGD(epsilon=5, participations=2, accountant="rdp").plan(400, 4, 4)
    names = cells(planned[1], "strategy")
    assert names == ["ffalora", "fedit", "fedsvd", "flexlora"]
    for trained, signal in zip(cells(planned[1], "trained"), cells(planned[1], "signal"), strict=True):
        d = int(trained.replace(",", ""))
        assert float(signal) == pytest.approx(4 * math.sqrt(8 * 3) / (own.sigma * math.sqrt(d)), abs=0.01)
    d = [int(x.replace(",", "")) for x in cells(planned[1], "trained")]
    assert d[0] == d[2] < d[1] == d[3]


def test_more_epsilon_is_less_noise_in_the_weights(planned: Any) -> None:
    """With SGD, whose steps are as long as its noise; Adam's are not."""
    sgd = [*TINY, "client.optimizer._target_=torch.optim.SGD"]
    noise = [float(cells(plan([*sgd, f"privacy.epsilon={e}"], records=400)[1], "noise")[0]) for e in (1, 30)]
    assert noise[0] > 1.5 * noise[1] > 0


def test_a_plan_of_clients_has_one_ledger_and_the_server_s_noise() -> None:
    found = plan(["model=tiny", "data=tiny", "clients=6", "clients_per_round=3", "rounds=2", "ranks=4",
                  "privacy=client_level", "privacy.accountant=rdp"])  # fmt: skip
    assert cells(found[0], "clients") == ["6"]
    assert cells(found[0], "q") == ["0.5000"]
    assert set(cells(found[1], "outlook")) == {"hopeless"}
    assert "fedit" in cells(found[1], "strategy")
    sigma = ClientLevel(rounds=2, accountant="rdp").plan(6, 3).sigma
    for trained, signal in zip(cells(found[1], "trained"), cells(found[1], "signal"), strict=True):
        d = int(trained.replace(",", ""))
        assert float(signal) == pytest.approx(3 * math.sqrt(2) / (sigma * math.sqrt(d)), abs=0.01)


def test_noise_in_the_weights_is_measured_against_them() -> None:
    """‖ΔW_now − ΔW_start‖ / ‖W‖ over all adapted modules, by plain dense matrices."""
    job = assemble(run_spec(compose(["model=tiny", "data=tiny", "clients=3", "ranks=4"])))
    rng = np.random.default_rng(5)
    pairs = {
        m: Pair(*(torch.from_numpy(rng.normal(size=tuple(t.shape))).float() for t in (p.A, p.B)), p.scale)
        for m, p in job.start.adapter.pairs.items()
    }
    now = replace(job.start, adapter=Adapter(pairs, job.start.adapter.extra))
    modules = dict(job.base.model.named_modules())
    gap = sum(float((now.delta(m) - job.start.delta(m)).double().square().sum()) for m in pairs)
    weights = sum(float(modules[m].weight.double().square().sum()) for m in pairs)
    assert _moved(job, now) == pytest.approx(math.sqrt(gap / weights), rel=1e-5)
    moved = replace(job, start=now)
    assert _moved(moved, job.start) == pytest.approx(_moved(job, now), rel=1e-5)
    assert _moved(moved, now) < 1e-6


def test_a_strategy_that_would_be_refused_is_left_out_of_the_comparison() -> None:
    mixed = [*TINY[:-1], "strategy=ffalora", "ranks=[2,4]"]
    assert cells(plan(mixed, records=400)[1], "strategy") == ["ffalora", "fedsvd", "flexlora"]


def test_a_plan_is_of_records_unless_it_says_otherwise_and_knows_presets() -> None:
    words = [word for word in TINY if not word.startswith(("privacy=", "strategy="))]
    found = plan([*words, "strategy=dplora", "privacy.epsilon=3"], records=400)
    assert cells(found[1], "strategy")[:2] == ["dplora", "fedit"]
    assert "epsilon 3" in found[0].title


def test_there_is_nothing_to_plan_without_privacy() -> None:
    with pytest.raises(ConfigError, match="nothing to plan"):
        plan(["model=tiny", "data=tiny", "privacy=none"])


def test_show_has_every_client_and_the_kinds_of_its_steps(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "seed: 1\nengine: {_target_: fedlora.engines.in_process.InProcess}\n"
    )
    with pytest.raises(CheckpointError, match="it ran without privacy"):
        ledgers(tmp_path)
    memory = ClientStore(tmp_path / "checkpoint" / "clients")
    first = Ledger(1e-5, accountant="rdp").plus(Entry(1.5, 0.1, 20))
    memory.spend(0, None, first)
    memory.spend(3, None, first.plus(Entry(2.0, 0.1, 5)))
    table = ledgers(tmp_path)
    assert cells(table, "client") == ["0", "3", "3"]
    assert cells(table, "steps") == ["20", "20", "5"]
    assert cells(table, "epsilon") == [f"{first.epsilon:.3f}", f"{memory.ledger(3).epsilon:.3f}", ""]  # type: ignore[union-attr]
    assert "adding or removing one record" in table.note
    with pytest.raises(CheckpointError, match="has no config"):
        ledgers(tmp_path / "nowhere")


def test_the_command_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    main(["privacy"])
    assert {"plan", "show", "audit"} <= {*capsys.readouterr().out.split()}
    for words, why in (
        (["privacy", "spend"], "spend"),
        (["privacy", "show", "/nowhere"], "has no config.yaml"),
        (["privacy", "plan", "privacy=none"], "nothing to plan"),
        (["privacy", "plan", "clientz=3"], "unknown key 'clientz'"),
    ):
        with pytest.raises(SystemExit) as code:
            main(words)
        assert code.value.code == 2
        assert why in capsys.readouterr().err


def test_an_audit_that_fails_ends_in_an_error(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    good = audit_module.Reading(1.0, 0.0)
    found = audit_module.Audit(1.0, 1e-5, True, 50, 50, 4.0, 390, 400, 4000, good, good)
    monkeypatch.setattr(audit_module, "audit", lambda *a, **k: found)
    with pytest.raises(SystemExit) as code:
        main(["privacy", "audit"])
    assert code.value.code == 2
    printed = capsys.readouterr()
    assert "FAIL" in printed.out
    assert "not as private as it claims" in printed.err
