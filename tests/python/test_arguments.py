"""What callers give: a wrong thing is one line, and what is theirs stays as it was."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import fedlora as fl
from fedlora.errors import CheckpointError, ConfigError, DataError, FedLoraError
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


def run(data: Any = ROWS, model: Any = "tiny", **more: Any) -> fl.Run:
    return fl.simulate(model, data, **{"clients": 2, "rounds": 1, "ranks": 4, "progress": False} | more)


@dataclass(frozen=True)
class Silent(fl.Strategy):
    """A strategy that says nothing of itself."""

    def aggregate(self, state: fl.State, updates: Sequence[fl.Update], rng: np.random.Generator) -> fl.State:
        return state


class Watcher:
    """No Callback, though it is called like one."""


LOCAL = fl.clients.LocalTraining(lr=0.1)
# What is given, and the words that the message must have.
WRONG: list[tuple[Mapping[str, Any], tuple[str, ...]]] = [
    ({"privacy": fl.privacy.DPSGD}, ("privacy", "got the class DPSGD; write DPSGD(...)")),
    ({"privacy": fl.privacy.ClientLevel}, ("privacy", "got the class ClientLevel; write ClientLevel(...)")),
    ({"privacy": "dpsgd"}, ("privacy", "Privacy", "'dpsgd'")),
    ({"privacy": {"epsilon": 4}}, ("privacy", "Privacy", "{'epsilon': 4}")),
    ({"client": "local"}, ("client", "Client", "'local'")),
    ({"client": fl.clients.LocalTraining}, ("client", "the class LocalTraining; write")),
    ({"robust": "median"}, ("robust", "Robust")),
    ({"robust": fl.robust.Median}, ("robust", "the class Median; write")),
    ({"rule": LOCAL}, ("rule", "LocalRule")),
    ({"engine": "in_process"}, ("engine", "Engine")),
    ({"scheduler": "buffered"}, ("scheduler", "Scheduler")),
    ({"compression": "gzip"}, ("compression", "topk", "'gzip'")),
    ({"compression": fl.compression.TopK}, ("compression", "the class TopK; write")),
    ({"steps": [fl.callbacks.EarlyStopping(2)]}, ("steps[0]", "UpdateStep")),
    ({"callbacks": fl.callbacks.EarlyStopping(2)}, ("callbacks", "put it into a list")),
    ({"callbacks": [fl.callbacks.EarlyStopping]}, ("callbacks[0]", "the class EarlyStopping; write")),
    ({"callbacks": ["x"]}, ("callbacks[0]", "Callback", "'x'")),
    ({"callbacks": [Watcher()]}, ("callbacks[0]", "Callback")),
    ({"strategy": Silent()}, ("strategy", "Silent", "no mixed_ranks, linear, exact")),
    ({"rounds": 2.5}, ("rounds", "whole number", "2.5")),
    ({"rounds": True}, ("rounds", "whole number", "True")),
    ({"clients": 2.5}, ("clients", "whole number", "2.5")),
    ({"clients": "3"}, ("clients", "whole number", "'3'")),
    ({"clients": 0}, ("clients", "at least 1")),
    ({"seed": "a"}, ("seed", "whole number", "'a'")),
    ({"seed": -1}, ("seed", "at least 0")),
    ({"clients_per_round": 1.5}, ("clients_per_round", "whole number")),
    ({"min_updates": "1"}, ("min_updates", "whole number")),
    ({"data_options": {"maxlen": 4}}, ("data_options", "max_length", "got maxlen")),
    ({"lr": 0.1}, ("'lr'", "client=fedlora.clients.LocalTraining(lr=...)")),
    ({"stop": 3}, ("'stop'", "callbacks=[...]")),
    ({"max_length": 9}, ("'max_length'", "data_options")),
]


@pytest.mark.parametrize(("given", "words"), WRONG, ids=lambda x: str(x)[:40])
def test_a_wrong_argument_is_one_line_that_names_it(given: Mapping[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(FedLoraError) as caught:
        run(**given)
    text = str(caught.value)
    assert "\n" not in text
    assert not [word for word in words if word not in text], text


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model and its tokenizer in the caller's memory."""
    base = load(tiny(), "classification", ("animal", "tool"))
    folder = tmp_path_factory.mktemp("model")
    base.model.save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder), base.tokenizer


def test_the_callers_own_model_is_as_it_was_whatever_is_done_with_the_run(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = loaded
    before = deepcopy(model.state_dict())
    settings = {"lora": {"targets": ["query", "value"]}, "client": fl.clients.LocalTraining(lr=0.05)}
    made = run(model=loaded, rounds=2, **settings)
    texts = [row["text"] for row in ROWS[::5]]
    said = made.predict(texts)
    for number in range(2):
        made.save(tmp_path / f"merged-{number}", merge=True)
        assert "logits" in made.verify()
        assert type(made.model()).__name__.startswith("PeftModel")
        assert made.predict(texts) == said
    found = model.state_dict()
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in before)
    first, second = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / f"merged-{number}").state_dict()
        for number in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert run(model=loaded, rounds=2, **settings).summary["adapter_sha256"] == made.summary["adapter_sha256"]
    with pytest.raises(ConfigError, match="expected \\(model, tokenizer\\), in this order"):
        run(model=(tokenizer, model))


def test_a_run_of_objects_goes_on_with_them_as_they_were_first_given(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"lora": {"targets": ["query", "value"]}, "data_options": {"max_length": 16}}
    settings |= {"client": fl.clients.LocalTraining(lr=0.05)}
    whole = run(model=loaded, rounds=2, **settings)
    made = run(model=loaded, out=tmp_path / "run", **settings)
    found = fl.open(tmp_path / "run", model=loaded)
    assert found.predict(["the cat"]) == made.predict(["the cat"])  # which needs none of the rows
    found.save(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"data.*fedlora\.open\(DIR, data=\.\.\.\)"):
        found.verify()
    with pytest.raises(ConfigError, match=r"model.*fedlora\.open\(DIR, model=\.\.\.\)"):
        fl.open(tmp_path / "run").predict(["the cat"])
    with pytest.raises(ConfigError, match=r"give data=\.\.\. as well"):
        fl.open(tmp_path / "run", model=loaded, test=ROWS)
    with pytest.raises(CheckpointError):
        found.resume(rounds=2, data=ROWS[:-8], progress=False)
    again = fl.open(tmp_path / "run", model=loaded, data=ROWS)
    assert "logits" in again.verify()
    more = again.resume(rounds=2, progress=False)
    assert more.summary["adapter_sha256"] == whole.summary["adapter_sha256"]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([[-1], [0]], "each a position from 0 to 39"),
        ([[40], [0]], "each a position from 0 to 39"),
        ([[0], []], "at least one row"),
        ([[0, 1], [1]], "in one part at most"),
        ([[0.5, 1.9], [3]], "whole numbers in each part"),
        ([[True, False], [3]], "whole numbers in each part"),
        ([[[0, 1]], [3]], "whole numbers in each part"),
        ([["a"], [3]], "whole numbers in each part"),
    ],
)
def test_a_part_is_positions_of_rows(parts: Any, said: str) -> None:
    with pytest.raises(DataError, match=f"partition: .*{said}"):
        run(ROWS[:40], test=ROWS[40:], partition=lambda rows, clients, rng: parts)
    good = [np.array([0, 39], dtype=np.int8), range(1, 5)]
    with pytest.warns(UserWarning, match="of 3 clients 2 got a part, so this run has 2"):
        run(ROWS[:40], test=ROWS[40:], clients=3, partition=lambda rows, clients, rng: good)
    made = run(ROWS[:40], test=ROWS[40:], partition=lambda rows, clients, rng: good)
    assert [line["examples"] for line in made.clients] == [2, 4]


def test_texts_to_predict_are_texts(tmp_path: Path) -> None:
    made = run()
    for wrong in ([{"text": "x"}], [3], ["x", None]):
        with pytest.raises(ConfigError, match="predict: expected texts, got"):
            made.predict(wrong)  # type: ignore[arg-type]


def test_a_session_has_no_run_before_its_first_step() -> None:
    session = fl.Session("tiny", "tiny", clients=2, rounds=1)
    with pytest.raises(ConfigError, match=r"no run before the first step; say next\(session\)"):
        _ = session.run


def test_an_array_of_json_is_told_from_rows(tmp_path: Path) -> None:
    for indent in (None, 1):
        (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=indent))
        with pytest.raises(DataError, match=f"got one JSON array of {len(ROWS)}; write each a line"):
            run(str(tmp_path / "rows.json"))
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=1))
    with pytest.raises(DataError, match="got one JSON object over many lines"):
        run(str(tmp_path / "one.json"))


def test_an_empty_cell_of_a_frame_is_an_empty_cell() -> None:
    frame = pytest.importorskip("pandas").DataFrame(ROWS)
    frame.loc[3, "label"] = None
    with pytest.raises(DataError, match=r"data\[3\]: .*got null"):
        run(frame)
    frame.loc[3, "label"] = float("nan")
    with pytest.raises(DataError, match=r"data\[3\]: .*got null"):
        run(frame)


def test_class_numbers_of_the_datasets_library_are_their_names() -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ROWS).class_encode_column("label")
    assert run(made).task.labels == ("animal", "tool")
    assert run(made).summary["adapter_sha256"] == run().summary["adapter_sha256"]
    without = made.map(lambda row, at: {"label": -1 if at == 3 else row["label"]}, with_indices=True)
    with pytest.raises(DataError, match=r"data\[3\]: .*got null"):
        run(without)
