import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fedlora as fl
from fedlora.cli.main import main
from fedlora.storage.run_folder import RunFolder
from fedlora.storage.update_log import UpdateLog

pytestmark = pytest.mark.slow

JOB = ("model=tiny", "data=tiny", "clients=3", "rounds=3", "+data.source.rows=48", "record_updates=true")
JOB += ("client.steps=4", "clients_per_round=2")


def recorded(folder: Path, *words: str) -> Path:
    main(["run", *JOB, *words, f"out={folder}"])
    return folder


@pytest.fixture(scope="module")
def flex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("flex") / "run", "strategy=flexlora", "ranks=[2,4]")


@pytest.fixture(scope="module")
def fedit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("fedit") / "run", "strategy=fedit", "ranks=4")


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an optimizer of the server's, whose momentum is in the recorded states."""
    words = ("strategy=flexlora", "ranks=[2,4]", "server=fedavgm")
    return recorded(tmp_path_factory.mktemp("stepped") / "run", *words)


def replayed(run: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((run / f"replay-{name}.json").read_text())["rounds"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["flex", "fedit", "stepped"])
def test_the_same_strategy_gives_the_run_s_own_states_to_the_bit(name: str, request: Any) -> None:
    run = request.getfixturevalue(name)
    main(["replay", str(run)])
    rounds = replayed(run, "fedit" if name == "fedit" else "flexlora")
    before = [UpdateLog(run).read(round)[0].digest() for round in (2, 3)]
    last = RunFolder(run).read_state()[1].digest()
    assert [line["state"] for line in rounds] == [*before, last]
    for line in rounds:
        assert line["recorded"]["delta_norm"] == line["replayed"]["delta_norm"]
        assert line["recorded"]["accuracy"] == line["replayed"]["accuracy"]
        for key, value in line["recorded"].items():
            assert line["replayed"][key] == pytest.approx(value, rel=1e-6, abs=1e-12), key


@dataclass(frozen=True)
class EveryTwo(fl.Scheduler):
    """Aggregates two updates at a time; the other clients go on with what they were sent."""

    def rounds(self, server: Any, grid: Any) -> Iterator[dict[str, Any]]:
        out: list[str] = []
        while not server.finished:
            round = server.begin_round(grid)
            out += grid.push_messages(server.messages(round))
            replies, out = grid.pull_messages(out[:2]), out[2:]
            yield server.finish_round(round, replies, keep_waiting=True)


def test_an_update_of_an_earlier_state_is_held_against_what_its_client_was_asked(
    tmp_path: Path, capsys: Any
) -> None:
    """FedEx-LoRA changes the base in every round, so that an update means nothing without its own state."""
    settings = {"clients": 4, "rounds": 3, "ranks": 2, "scheduler": EveryTwo(), "record_updates": True}
    client = fl.clients.LocalTraining(lr=0.05, steps=4)
    run = tmp_path / "run"
    fl.simulate("tiny", "tiny", strategy="fedexlora", client=client, **settings, out=run, progress=False)
    main(["replay", str(run)])
    rounds = replayed(run, "fedexlora")
    assert [line["staleness"] for line in rounds] == [0, 1, 1]
    assert [line["state"] for line in rounds][-1] == RunFolder(run).read_state()[1].digest()
    for line in rounds:
        assert line["recorded"]["aggregation_error"] == line["replayed"]["aggregation_error"]
    assert "staleness" in capsys.readouterr().out
    main(["replay", str(run), "strategy=flora"])
    assert all(line["replayed"]["aggregation_error"] > 0 for line in replayed(run, "flora"))


@pytest.mark.parametrize("other", ["flexlora", "flora", "fedexlora", "raflora"])
def test_an_exact_strategy_makes_an_exact_mean_of_what_fedit_s_clients_sent(fedit: Path, other: str) -> None:
    main(["replay", str(fedit), f"strategy={other}"])
    for line in replayed(fedit, other):
        assert line["recorded"]["aggregation_error"] > 1e-4
        if other != "raflora":
            assert line["replayed"]["aggregation_error"] < 1e-5
        assert {"loss", "accuracy", "effective_rank"} <= line["replayed"].keys()


def test_a_momentum_of_one_space_steps_no_strategy_of_another(
    stepped: Path, refused: Callable[..., str]
) -> None:
    main(["replay", str(stepped), "strategy=raflora"])
    assert len(replayed(stepped, "raflora")) == 3
    why = refused("replay", str(stepped), "strategy=ffalora")
    assert "FedAvgM remembers is of the space of FlexLoRA (product), and FFALoRA has factors" in why


def test_mixed_ranks_are_replayed(flex: Path, capsys: Any) -> None:
    main(["replay", str(flex), "strategy=hetlora"])
    said = capsys.readouterr().out
    assert "HetLoRA on what clients of FlexLoRA sent" in said
    assert all(line["replayed"]["aggregation_error"] > 1e-4 for line in replayed(flex, "hetlora"))


@pytest.mark.parametrize(
    ("run", "words", "named"),
    [
        ("flex", ["strategy=fedit"], ["FedIT", "rank"]),
        ("fedit", ["strategy=ffalora"], ["FFALoRA", "B trained"]),
        ("fedit", ["strategy=slora"], ["SLoRA", "Sparse"]),
        ("fedit", ["strategy=fedms"], ["FedMS", "no global model"]),
        ("fedit", ["strategy=privatelora"], ["PrivateLoRA", "A+B trained"]),
        ("fedit", ["strategy=flexlor"], ["flexlor"]),
        ("fedit", ["rounds=3"], ["rounds=3"]),
        ("fedit", ["strategy.second=fedit"], ["strategy=NAME"]),
    ],
)
def test_what_makes_no_sense_is_one_line(
    refused: Callable[..., str], request: Any, run: str, words: list[str], named: list[str]
) -> None:
    said = refused("replay", str(request.getfixturevalue(run)), *words)
    assert all(word in said for word in named), said


def test_a_run_without_a_recording_is_one_line(refused: Callable[..., str], finished: Path) -> None:
    assert "record_updates=true" in refused("replay", str(finished), "strategy=flexlora")


def test_a_damaged_recording_is_one_line(refused: Callable[..., str], fedit: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(fedit, run)
    file = run / "updates" / "round-000002.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\x00\x01\x02\x03")
    assert "round-000002" in refused("replay", str(run), "strategy=flexlora")


@pytest.mark.parametrize("words", [["privacy=dp_sgd"], ["secure_sum=true"], ["strategy=fedsalora"]])
def test_updates_that_must_not_be_kept_are_not(no_run: Callable[..., str], words: list[str]) -> None:
    assert "record_updates" in no_run("record_updates=true", *words)


def test_recording_changes_nothing_and_is_off_by_default(fedit: Path, tmp_path: Path) -> None:
    main(["run", *JOB, "record_updates=false", "strategy=fedit", "ranks=4", f"out={tmp_path / 'run'}"])
    sha = [
        json.loads((run / "summary.json").read_text())["adapter_sha256"] for run in (fedit, tmp_path / "run")
    ]
    assert sha[0] == sha[1]
    assert not (tmp_path / "run" / "updates").exists()
