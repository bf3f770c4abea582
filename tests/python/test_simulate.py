"""Runs from Python: the same as from the command line, of whatever a caller has in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

import fedlora as fl
from fedlora.cli.main import main
from fedlora.core.strategy import mean_adapter
from fedlora.errors import ConfigError, DataError
from fedlora.models import load
from fedlora.models.packaged import tiny

pytestmark = pytest.mark.slow  # whole runs

WORDS = {"animal": ["cat", "dog", "horse", "goose"], "tool": ["hammer", "saw", "drill", "file"]}
ROWS = [
    {"text": f"the {word} number {n}", "label": kind}
    for kind, words in WORDS.items()
    for word in words
    for n in range(6)
]


@dataclass(frozen=True)
class Mean(fl.Strategy):
    """A strategy of the user's own: FedIT, in a class that no configuration can name."""

    mixed_ranks = False
    linear = True
    exact = False

    def aggregate(self, state: fl.State, updates: Sequence[fl.Update], rng: np.random.Generator) -> fl.State:
        sent, weights = self.admit(state, updates)
        return fl.State(mean_adapter(state, sent, weights), state.round + 1, seed=state.seed)


def small(**more: Any) -> fl.Run:
    return fl.simulate("tiny", "tiny", **{"clients": 3, "rounds": 1, "progress": False} | more)


def sha(run: fl.Run) -> str:
    return str(run.summary["adapter_sha256"])


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["strategy=flexlora", "ranks=[2,4]"], {"strategy": "flexlora", "ranks": [2, 4]}),
        (["strategy=ffalora", "ranks=4"], {"strategy": fl.strategies.FFALoRA(), "ranks": 4}),
        pytest.param(
            ["strategy=ffalora", "privacy=dp_sgd", "privacy.insecure_test_seed=1", "client.batch_size=4"],
            {
                "strategy": "ffalora",
                "privacy": fl.privacy.DPSGD(insecure_test_seed=1),
                "client": fl.clients.LocalTraining(lr=0.05, batch_size=4),
            },
            marks=pytest.mark.slow,
        ),
        (["robust=median"], {"robust": fl.robust.Median()}),
        (
            ["strategy=ffalora", "compression=topk", "compression.error_feedback=true"],
            {"strategy": "ffalora", "compression": fl.compression.TopK(error_feedback=True)},
        ),
        (["strategy=fedms"], {"strategy": "fedms"}),
    ],
)
def test_python_and_the_command_line_give_one_adapter(
    words: list[str], settings: Mapping[str, Any], tmp_path: Path
) -> None:
    rest = ["model=tiny", "data=tiny", "clients=3", "rounds=2"]
    main(["run", *rest, *words, f"out={tmp_path / 'command'}"])
    command, made = fl.open(tmp_path / "command"), small(rounds=2, **settings)
    assert sha(made) == sha(command)
    assert made.state.digest() == command.state.digest()
    assert [line["loss"] for line in made.metrics if "loss" in line] == [
        line["loss"] for line in command.metrics if "loss" in line
    ]


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_command_line_goes_on_with_a_run_from_python(rounds: int, tmp_path: Path) -> None:
    whole = small(rounds=2, strategy="hetlora", ranks=[2, 4])
    small(rounds=rounds, strategy="hetlora", ranks=[2, 4], out=tmp_path / "run")
    if rounds < 2:
        main(["run", f"resume={tmp_path / 'run'}", "rounds=2"])
    assert sha(fl.open(tmp_path / "run")) == sha(whole)


def test_rows_in_memory_of_whatever_kind_are_one_run() -> None:
    frame = pytest.importorskip("pandas").DataFrame(ROWS)
    made = pytest.importorskip("datasets").Dataset.from_list(ROWS)
    runs = [fl.simulate("tiny", rows, clients=2, rounds=1, progress=False) for rows in (ROWS, frame, made)]
    assert len({sha(run) for run in runs}) == 1
    named = [{"question": row["text"], "kind": row["label"]} for row in ROWS]
    other = fl.simulate("tiny", named, text="question", label="kind", clients=2, rounds=1, progress=False)
    assert sha(other) == sha(runs[0])


def test_a_mapping_names_the_clients_and_a_function_deals_rows() -> None:
    run = fl.simulate("tiny", {"ward": ROWS[::2], "lab": ROWS[1::2]}, rounds=1, progress=False)
    assert [line["client"] for line in run.clients] == [0, 1]
    halves = fl.simulate(
        "tiny",
        ROWS,
        test=ROWS[:4],
        partition=lambda rows, clients, rng: [range(10), range(10, len(rows))],
        clients=2,
        rounds=1,
        progress=False,
    )
    assert [line["examples"] for line in halves.clients] == [10, len(ROWS) - 10]


def test_a_loaded_model_is_the_same_as_its_folder(tmp_path: Path) -> None:
    base = load(tiny(), "classification", ("animal", "tool"))
    base.model.save_pretrained(tmp_path / "whole")
    base.tokenizer.save_pretrained(tmp_path / "whole")
    settings: dict[str, Any] = {"lora": {"targets": ["query", "value"]}, "clients": 2, "rounds": 1}
    settings["client"] = fl.clients.LocalTraining(lr=1e-2)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    given = fl.simulate((model, base.tokenizer), ROWS, progress=False, **settings)
    named = fl.simulate(tmp_path / "whole", ROWS, progress=False, **settings)
    assert sha(given) == sha(named)


def test_a_strategy_from_the_script_runs_and_is_named_when_it_is_missing(tmp_path: Path) -> None:
    own = small(strategy=Mean(), ranks=4, out=tmp_path / "own")
    assert sha(own) == sha(small(strategy="fedit", ranks=4))
    with pytest.raises(SystemExit):
        main(["run", f"resume={tmp_path / 'own'}", "rounds=2"])
    with pytest.raises(ConfigError, match=r"strategy.*resume\(strategy=\.\.\.\)"):
        fl.open(tmp_path / "own").resume(rounds=2)
    more = fl.open(tmp_path / "own").resume(rounds=2, strategy=Mean(), progress=False)
    assert sha(more) == sha(small(strategy="fedit", ranks=4, rounds=2))


@dataclass(frozen=True)
class OwnPrivacy(fl.privacy.DPSGD):
    """Privacy of the user's own, which no configuration can name."""


def test_a_run_that_goes_on_keeps_the_parts_that_it_named(tmp_path: Path) -> None:
    small(ranks=4, privacy=fl.privacy.DPSGD(epsilon=4, insecure_test_seed=1), out=tmp_path / "run")
    weaker = fl.privacy.DPSGD(epsilon=999, insecure_test_seed=1)
    found = fl.open(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"resume: expected only .* \(callbacks\), got privacy"):
        found.resume(rounds=2, privacy=weaker)
    with pytest.raises(ConfigError, match=r"open: expected only .* got client, privacy"):
        fl.open(tmp_path / "run", privacy=weaker, client=fl.clients.LocalTraining(lr=0.1))
    with pytest.raises(ConfigError, match=r"resume: expected only .* got privcy"):
        found.resume(privcy=weaker)
    assert len(found.metrics) == 1


def test_more_rounds_than_the_noise_is_for_are_refused_whoever_names_the_privacy(tmp_path: Path) -> None:
    own = OwnPrivacy(epsilon=4, insecure_test_seed=1)
    small(ranks=4, privacy=own, out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"resume\(privacy=\.\.\.\)"):
        fl.open(tmp_path / "run").resume(rounds=2)
    with pytest.raises(ConfigError, match="the noise of this run is for 1 rounds"):
        fl.open(tmp_path / "run").resume(rounds=2, privacy=own)


def test_a_session_goes_round_by_round_to_the_same_end(tmp_path: Path) -> None:
    session = fl.Session("tiny", "tiny", clients=3, rounds=2, out=tmp_path / "run")
    seen = [(line["round"], session.state.round) for line in session]
    assert seen == [(1, 1), (2, 2)]
    assert sha(session.run) == sha(small(rounds=2))


def test_a_session_that_is_left_can_be_resumed(tmp_path: Path) -> None:
    session = fl.Session("tiny", "tiny", clients=3, rounds=2, out=tmp_path / "run")
    next(session)
    session.close()
    assert "1 of 2 rounds" in repr(session.run)
    assert sha(fl.open(tmp_path / "run").resume(progress=False)) == sha(small(rounds=2))


def test_the_result_predicts_and_gives_plain_peft() -> None:
    run = fl.simulate("tiny", ROWS, clients=2, rounds=3, ranks=8, progress=False)
    texts = [row["text"] for row in ROWS[:5]]
    model, base = run.model(), run.base()
    batch = base.tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    predicted = [run.task.labels[i] for i in model(**batch).logits.argmax(-1).tolist()]
    assert run.predict(texts) == predicted
    assert "<table>" in run._repr_html_()
    assert "image/png" in run._repr_html_()


def test_nothing_stays_on_disk_without_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = small()
    place = run.path
    assert place.is_dir()
    del run
    assert not place.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_has_a_run_a_combination_and_goes_on(tmp_path: Path) -> None:
    words: dict[str, Any] = {"clients": 3, "rounds": 1, "ranks": fl.each(4, [2, 4]), "progress": False}
    swept = fl.sweep("tiny", "tiny", strategy=["flexlora", "hetlora"], out=tmp_path, **words)
    assert len(swept) == 4
    assert sha(swept["strategy=flexlora,ranks=4"]) == sha(small(strategy="flexlora", ranks=4))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    fl.sweep("tiny", "tiny", strategy=["flexlora", "hetlora"], out=tmp_path, **words)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")} == before


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"stratgy": "fedit"}, ConfigError, "did you mean strategy"),
        ({"strategy": "fedti"}, ConfigError, "fedit"),
        ({"data": [{"words": "x", "label": "a"}]}, DataError, "text and label"),
        ({"data": []}, DataError, "one row or more"),
        ({"data": 3}, DataError, "list of dicts"),
        ({"data": "nowhere.jsonl"}, ConfigError, "preset"),
        ({"model": 3}, ConfigError, "hub name"),
        ({"lora": {"rank": 3}}, ConfigError, "targets"),
        ({"strategy": "fedit", "ranks": [2, 4]}, ConfigError, "one rank only"),
        ({"partition": lambda rows, clients, rng: [[0], [0]]}, DataError, "one part at most"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(settings: dict[str, Any], error: type, said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        fl.simulate(**{"model": "tiny", "data": "tiny", "clients": 2, "rounds": 1} | settings)
    assert "\n" not in str(caught.value)


def test_python_s_defaults_are_those_of_the_command_line() -> None:
    """What YAML says of a class is what the class says of itself."""
    import inspect

    from hydra.utils import get_object
    from omegaconf import OmegaConf

    from fedlora.config.composition import choices, compose

    seen = 0
    for group in ("strategy", "client", "privacy", "robust", "engine"):
        for name in choices()[group]:
            words = ["engine.superlink=x"] if name == "deploy" else []
            part: Any = OmegaConf.to_container(compose([f"{group}={name}", *words])[group])
            if "_target_" not in part or part["_target_"].endswith(".of"):
                continue
            for key, parameter in inspect.signature(get_object(part["_target_"])).parameters.items():
                default = parameter.default
                if key in part and isinstance(default, bool | int | float | str | None):
                    assert part[key] == default or default is None, (group, name, key)
                    seen += 1
    assert seen > 40


def test_help_and_signatures_name_every_argument() -> None:
    import inspect

    for function in (fl.simulate, fl.sweep, fl.compare, fl.Session):
        assert {"strategy", "ranks", "privacy", "data_options"} <= {*inspect.signature(function).parameters}
    assert "one rank; or a list, in turn over the clients" in (fl.simulate.__doc__ or "")


def test_the_rate_of_a_strategy_is_written_in_its_class_alone() -> None:
    from fedlora.config.composition import compose

    for name in fl.strategies.__all__:
        config = compose([f"strategy={name.lower()}"])
        factor = getattr(fl.strategies, name).lr_factor
        assert config.client.lr == pytest.approx(config.model.lr * factor), name
