"""Gradient accumulation and batches of tokens, from the command line and from Python."""

from typing import Any

import pytest

import fedlora as fl

pytestmark = pytest.mark.slow  # whole runs


def test_accumulated_batches_are_one_large_batch(run: Any) -> None:
    whole, parts = run("client.batch_size=8"), run("client.batch_size=4", "client.accumulate=2")
    assert parts.sha == whole.sha
    assert run("client.batch_size=4").sha != whole.sha


def test_shorter_rows_make_fewer_steps_of_batches_of_tokens(run: Any) -> None:
    def steps(found: Any) -> float:
        return sum(line["steps"] for line in found.clients if line["round"] == 1)

    long = run("client.max_tokens=64", "data.max_length=32")
    client = fl.open(long.path).spec.client
    assert isinstance(client, fl.clients.LocalTraining)
    assert client.max_tokens == 64
    short = fl.simulate(
        "tiny", "tiny", client=client, clients=3, rounds=1, data_options={"max_length": 8}, progress=False
    )
    assert short.config["client"]["max_tokens"] == 64
    assert steps(run("client.max_tokens=64", "data.max_length=8")) < steps(long)
    assert len({line["steps"] for line in short.clients}) > 1  # it goes by a client's rows
