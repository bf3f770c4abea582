"""From Python a message names arguments, where the command line would name its keys."""

from typing import Any

import pytest

import fedlora as fl
from fedlora.api.words import translated
from fedlora.errors import FedLoraError

ROWS = [{"text": f"row {n}", "label": "ab"[n % 2]} for n in range(40)]


LONG = [{"text": "a " * 600, "label": row["label"]} for row in ROWS]
SAID = {
    "name all with data.labels": "name all with labels",
    "say data.labels=[a,b 2]; or": "say labels=['a', 'b 2']; or",
    "with data.labels=[...]": "with labels=[...]",
    "did you mean data.label=topic?": "did you mean label='topic'?",
    "set data.label= to the right one": "set label= to the right one",
    "data.max_length: too long": "data_options['max_length']: too long",
    "say data.max_length=512, which": "say data_options={'max_length': 512}, which",
    "evaluate.rows=validation, or keep=last": "evaluate={'rows': 'validation'}, or leave it out of callbacks",
    "evaluate.every: EarlyStopping decides": "evaluate.every: EarlyStopping decides",
    "a strategy with client=local, or privacy=none": "a strategy with client=local, or privacy=None",
    "'/my/data.labels/data.jsonl' is missing": "'/my/data.labels/data.jsonl' is missing",
    "say data.quotes=true if": "say data.quotes=true if",
}


@pytest.mark.parametrize(("said", "wanted"), SAID.items())
def test_keys_become_arguments_and_nothing_else_changes(said: str, wanted: str) -> None:
    assert translated(said) == wanted
    assert translated(wanted) == wanted


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"labels": ["a"]}, "labels"),
        ({"text": "text", "label": "lable"}, "did you mean label='label'?"),
        ({"callbacks": [fl.callbacks.BestCheckpoint()]}, "say evaluate={'rows': 'validation'}, or leave it"),
        ({"data": LONG, "data_options": {"max_length": 600}}, "say data_options={'max_length': "),
    ],
)
def test_simulate_and_session_name_their_arguments(settings: dict[str, Any], wanted: str) -> None:
    given: dict[str, Any] = {"model": "tiny", "data": ROWS, "clients": 2, "rounds": 1, "ranks": 2} | settings
    with pytest.raises(FedLoraError) as refused:
        fl.simulate(**given, progress=False)
    assert wanted in str(refused.value)
    with pytest.raises(FedLoraError) as again:
        list(fl.Session(**given))
    assert str(again.value) == str(refused.value)
