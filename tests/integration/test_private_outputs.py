"""Every output of a private run is declared here: noised, public, or said not to be covered by epsilon."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from fedlora.errors import ConfigError

pytestmark = pytest.mark.slow  # whole runs

SIMPLE = ("privacy.accountant=rdp", "track=csv", "privacy.epsilon=6")
RUNS = {
    "records": ("privacy=dp_sgd", "client.batch_size=4", "track.clients=true"),
    "hidden counts": ("privacy=dp_sgd", "client.batch_size=4", "privacy.public_counts=false"),
    "open metrics": ("privacy=dp_sgd", "client.batch_size=4", "privacy.public_metrics=true"),
    "clients": ("privacy=client_level",),
    "clients under masks": ("privacy=client_level", "secure_sum=true"),
}
# Why an output may be there. A sentence is one of the run's own `not_covered`, or a part of it.
NOISED = "computed from noised updates alone"
SETTING = "a setting of the run"
PUBLIC = "the test rows"
TIME = "how long the run and its rounds take"
COUNTS = "how many records a client has"
LOSSES = "training losses"
FAILED = "that a client failed"
WHO = "who took part, with losses, numbers of rows"
MANY = "how many took part, and the bytes they sent"
LEDGERS = "the clients' own ledgers"

FILES = {
    "config.yaml": SETTING,
    "metrics.jsonl": "by field",
    "clients.jsonl": "by field",
    "summary.json": "by field",
    "tracking/metrics.csv": "by field",
    "adapter/adapter_config.json": SETTING,
    "adapter/base/config.json": SETTING,  # the base's own, with the labels that the user named
    "adapter/tokenizer.json": SETTING,
    "adapter/tokenizer_config.json": SETTING,
    "adapter/adapter_model.safetensors": NOISED,
    "checkpoint/lock": SETTING,
    "checkpoint/clients/client-N/ledger.json.lock": SETTING,
    "checkpoint/clients/lock-N": SETTING,
    "task.json": SETTING,  # what is learnt, with the labels that the user named
    "checkpoint/inputs.json": "digests of the rows",
    "checkpoint/round-N.safetensors": NOISED,
}
OF_RECORDS = FILES | {"checkpoint/clients/client-N/ledger.json": COUNTS}
OF_CLIENTS = FILES | {"checkpoint/ledger.json": SETTING, "checkpoint/ledger.json.lock": SETTING}
METRICS = {
    **dict.fromkeys(("round", "delta", "sigma", "clip", "epsilon", "epsilon_valid"), SETTING),
    **dict.fromkeys(("delta_norm", "effective_rank", "aggregation_error"), NOISED),
    **dict.fromkeys(("loss", "accuracy"), PUBLIC),
    "seconds": TIME,
}
SUMMARY = {
    **dict.fromkeys(
        ("strategy", "model", "dtype", "data", "metric", "rounds", "clients", "ranks", "seed"), SETTING
    ),
    **dict.fromkeys(("versions", "epsilon", "delta", "epsilon_valid", "ledger"), SETTING),
    **dict.fromkeys(("initial", "loss", "accuracy"), PUBLIC),
    **dict.fromkeys(("adapter_sha256", "aggregation_error"), NOISED),
    **dict.fromkeys(("startup_seconds", "wall_seconds", "peak_memory_mb"), TIME),
}
LINE = dict.fromkeys(("round", "client", "rank", "delta", "epsilon_valid"), SETTING)
TRAFFIC = ("bytes_down", "bytes_up", "clients", "dropped")
DECLARED: dict[str, dict[str, dict[str, str]]] = {
    "records": {
        "files": OF_RECORDS,
        "metrics": METRICS | dict.fromkeys(TRAFFIC, FAILED),
        "clients": LINE
        | dict.fromkeys(("epsilon", "sigma", "q", "steps", "examples"), COUNTS)
        | dict.fromkeys(("bytes_down", "bytes_up", "status"), FAILED),
    },
    "hidden counts": {
        "files": OF_RECORDS | {"checkpoint/clients/client-N/ledger.json": LEDGERS},
        "metrics": METRICS | dict.fromkeys(TRAFFIC, FAILED),
        "clients": LINE
        | dict.fromkeys(("epsilon", "examples"), SETTING)  # the budget, and 1
        | dict.fromkeys(("bytes_down", "bytes_up", "status"), FAILED),
    },
    "clients": {
        "files": OF_CLIENTS,
        "metrics": METRICS | dict.fromkeys(TRAFFIC, MANY),
        "clients": LINE
        | dict.fromkeys(("loss", "steps", "examples", "status", "bytes_down", "bytes_up"), WHO),
    },
}
DECLARED["open metrics"] = DECLARED["records"] | {
    "metrics": DECLARED["records"]["metrics"] | dict.fromkeys(("train_loss", "clipped"), LOSSES),
    "clients": DECLARED["records"]["clients"] | dict.fromkeys(("loss", "clipped"), LOSSES),
}
DECLARED["clients under masks"] = DECLARED["clients"]


@pytest.fixture(scope="module", params=RUNS)
def private(request: pytest.FixtureRequest, run: Any) -> tuple[str, Any, str]:
    """The name of a run, the run, and what it printed."""
    screen = io.StringIO()
    done = run(*SIMPLE, *RUNS[request.param], console=Console(file=screen, width=250))
    return request.param, done, screen.getvalue()


def declared(fields: dict[str, str], found: set[str], covered_not: list[str]) -> None:
    """All that was found is declared, and what is not covered is said by the run."""
    assert found <= fields.keys(), f"not declared: {sorted(found - fields.keys())}"
    for name in found:
        if (why := fields[name]) not in (NOISED, SETTING, "by field"):
            assert any(why in said for said in covered_not), f"{name}: the run does not say '{why}'"


def test_every_file_and_field_is_declared_and_what_is_not_covered_is_said(
    private: tuple[str, Any, str],
) -> None:
    name, done, _ = private
    fields, said = DECLARED[name], done.summary["ledger"]["not_covered"]
    files = {str(p.relative_to(done.path)) for p in done.path.rglob("*") if p.is_file()}
    declared(fields["files"], {re.sub(r"-\d+", "-N", file) for file in files}, said)
    for line in done.metrics:
        declared(fields["metrics"], {key for key, value in line.items() if value is not None}, said)
    for line in done.clients:
        declared(fields["clients"], {*line}, said)
    traffic = {key: fields["metrics"][key] for key in ("bytes_down", "bytes_up", "dropped")}
    declared(SUMMARY | traffic, {*done.summary}, said)
    with (done.path / "tracking" / "metrics.csv").open() as file:
        header = {*next(csv.reader(file))}
    of_clients = {key for key in header if key.startswith("client/")}
    assert bool(of_clients) == (name == "records")
    declared(fields["metrics"], header - of_clients, said)
    declared(fields["clients"], {key.split("/")[2] for key in of_clients}, said)


def test_the_screen_tells_no_more_than_the_files(private: tuple[str, Any, str]) -> None:
    name, _, screen = private
    hides = name not in ("records", "open metrics")
    assert bool(re.search(r"of \d+ to \d+ rows", screen)) != hides
    assert ("sigma" in screen) == (name != "hidden counts")
    [head, *lines] = [line for line in screen.splitlines() if line.startswith("round ")]
    words = {
        "round",
        "loss",
        "accuracy",
        "train",
        "down",
        "up",
        "MB",
        "clients",
        "dropped",
        "seconds",
        "left",
    }
    for line in (head, *lines):
        assert {*re.findall(r"[a-z_A-Z]+", line)} <= words | {"epsilon"}
    if name != "open metrics":
        assert "train loss -" in head


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    rows = [(f"i saw the {'cat' if i % 2 else 'saw'} {i}", "animal" if i % 2 else "tool") for i in range(40)]
    return {
        "train": f"data.train={write(tmp_path / 'train.jsonl', rows)}",
        "more": f"data.train={write(tmp_path / 'more.jsonl', [*rows, ('my test came back', 'rare')])}",
        "test": f"data.test={write(tmp_path / 'test.jsonl', rows[:6])}",
    }


BASE = ("model=tiny", "data=files", "data.text=text", "data.label=label", "clients=3", "rounds=1", "ranks=4")
LEVELS = [("privacy=dp_sgd", "client.batch_size=4"), ("privacy=client_level",)]


@pytest.mark.parametrize("level", LEVELS, ids=["dp_sgd", "client_level"])
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("train",), "cut from the private training rows"),
        (("train", "test", "evaluate.rows=validation"), "cut from the private training rows"),
        (("more", "test"), "name all of them with data.labels"),
    ],
    ids=["no test rows", "validation", "a label of one record"],
)
def test_what_private_rows_would_decide_in_the_open_is_refused(
    run: Any, files: dict[str, str], level: tuple[str, ...], words: tuple[str, ...], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        run(*level, *(files.get(word, word) for word in words), base=BASE)


def test_one_record_changes_no_shape_and_nothing_before_the_first_round(
    run: Any, files: dict[str, str]
) -> None:
    labels = "data.labels=[animal,tool,rare]"
    runs = [
        run(*SIMPLE, *LEVELS[0], files[which], files["test"], labels, base=BASE)
        for which in ("train", "more")
    ]
    shapes = [
        {n: t.shape for n, t in load_file(r.path / "adapter" / "adapter_model.safetensors").items()}
        for r in runs
    ]
    assert shapes[0] == shapes[1]
    assert runs[0].summary["initial"] == runs[1].summary["initial"]


def test_without_privacy_labels_and_test_rows_are_taken_as_before(run: Any, files: dict[str, str]) -> None:
    done = run(files["more"], base=BASE)
    weights = load_file(done.path / "adapter" / "adapter_model.safetensors")
    assert {len(t) for n, t in weights.items() if "classifier" in n or "score" in n} == {3}
    assert done.summary["majority"] is not None


def test_clients_own_numbers_go_to_no_tracker_under_client_level_privacy(run: Any) -> None:
    with pytest.raises(ConfigError, match=r"track\.clients"):
        run("privacy=client_level", "track=csv", "track.clients=true")
