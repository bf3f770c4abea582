import math
from collections.abc import Sequence
from io import StringIO
from typing import Any

import pytest
from flwr.app import Message, MetricRecord
from rich.console import Console

from fedlora.rounds.codec import size
from fedlora.rounds.totals import totals
from fedlora.strategies import FedIT, FFALoRA, FlexLoRA

METRICS = {
    "round",
    "loss",
    "accuracy",
    "train_loss",
    "bytes_down",
    "bytes_up",
    "seconds",
    "clients",
    "dropped",
    "epsilon",
}


@pytest.mark.parametrize("strategy", [FlexLoRA(), FFALoRA(), FedIT()], ids=lambda s: type(s).__name__)
def test_the_certificate_says_who_is_exact(lab: Any, strategy: Any) -> None:
    ran = lab.run(strategy, rounds=3)
    errors = [m["aggregation_error"] for m in ran.lines("metrics.jsonl")]
    assert len(errors) == 3
    if strategy.exact:
        assert max(errors) < 1e-6
    else:
        assert min(errors) > 1e-3
    assert all(m["delta_norm"] > 0 and m["effective_rank"] > 1 for m in ran.lines("metrics.jsonl"))


@pytest.mark.parametrize("strategy", [FlexLoRA(), FFALoRA()], ids=lambda s: type(s).__name__)
def test_the_certificate_holds_for_mixed_ranks_and_scales(lab: Any, strategy: Any) -> None:
    ran = lab.run(strategy, [2, 4, 6], rounds=3, scales={0: 0.5, 1: 3.0})
    assert max(m["aggregation_error"] for m in ran.lines("metrics.jsonl")) < 1e-6


def test_one_client_makes_fedit_exact(lab: Any) -> None:
    assert lab.run(FedIT(), [4]).lines("metrics.jsonl")[0]["aggregation_error"] < 1e-6


def test_the_certificate_sees_a_wrong_rule(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FlexLoRA.aggregate

    def wrong(self: Any, state: Any, updates: Sequence[Any], rng: Any) -> Any:
        return right(self, state, updates[:1], rng)  # peers.md 1: clients after the first are lost

    monkeypatch.setattr(FlexLoRA, "aggregate", wrong)
    assert lab.run(FlexLoRA()).lines("metrics.jsonl")[0]["aggregation_error"] > 0.1


def test_bytes_are_those_of_the_real_records(lab: Any) -> None:
    up: list[int] = []

    def weigh(replies: list[Message]) -> list[Message]:
        up.extend(size(reply.content) for reply in replies)
        return replies

    ran = lab.run(FlexLoRA(), [2, 4, 6], rounds=1, change=weigh)
    rows = ran.lines("clients.jsonl")
    assert [row["bytes_up"] for row in rows] == up
    assert up[0] < up[1] < up[2]
    (metrics,) = ran.lines("metrics.jsonl")
    assert metrics["bytes_up"] == sum(up)
    assert metrics["bytes_down"] == sum(row["bytes_down"] for row in rows)
    ffa = lab.run(FFALoRA(), [4] * 3, rounds=1).lines("metrics.jsonl")[0]
    both = lab.run(FedIT(), [4] * 3, rounds=1).lines("metrics.jsonl")[0]
    assert (
        abs(ffa["bytes_down"] - both["bytes_down"]) < 50
    )  # A_0 goes down; the words for what is shared differ
    a_side = 3 * 4 * 4 * (8 + 8)  # clients × rank × float32 × d_in of both layers
    assert ffa["bytes_up"] <= both["bytes_up"] - a_side


def test_the_schema_of_the_logs(lab: Any) -> None:
    ran = lab.run(FedIT(), rounds=3)
    metrics = ran.lines("metrics.jsonl")
    assert [m["round"] for m in metrics] == [1, 2, 3]
    for m in metrics:
        assert m.keys() >= METRICS
        assert m["epsilon"] is None
        assert all(isinstance(m[k], int) for k in ("bytes_down", "bytes_up", "clients", "dropped"))
        # Σ n_k loss_k / Σ n_k with 10, 20, 30 rows and losses 1, 2, 3.
        assert m["train_loss"] == pytest.approx((10 + 40 + 90) / 60)
    rows = ran.lines("clients.jsonl")
    assert [(r["round"], r["client"]) for r in rows] == [(t, c) for t in (1, 2, 3) for c in (0, 1, 2)]
    for row in rows:
        assert row.keys() >= {
            "round",
            "client",
            "rank",
            "bytes_down",
            "bytes_up",
            "examples",
            "loss",
            "status",
        }


def test_a_client_cannot_write_over_the_servers_fields(lab: Any, noise: Any) -> None:
    lies = {
        "round": 9,
        "client": 9,
        "rank": 99,
        "bytes_up": 0,
        "bytes_down": 0,
        "examples": 1,
        "status": 1,
        "num-examples": 5,
    }
    ran = lab.run(
        FedIT(), client=noise(metrics={k: v for k, v in lies.items() if k not in ("round", "num-examples")})
    )
    for row in ran.lines("clients.jsonl"):
        assert row["client"] in (0, 1, 2)
        assert row["status"] == "ok"
        assert row["rank"] == 4
        assert row["bytes_up"] > 0
        assert row["examples"] in (10, 20, 30)


def test_a_round_counts_what_dropped_clients_sent_and_tells_own_losses_from_training_losses() -> None:
    own = {"local_accuracy": 0.5, "bytes_down": 10, "bytes_up": 4, "status": "ok"}
    lines = [
        {"loss": 3.0, "local_loss": 1.0, "examples": 1, **own},
        {"loss": 9.0, "local_loss": 2.0, "examples": 2, **own},
        {"loss": 99.0, "examples": 7, "bytes_down": 10, "bytes_up": 5, "status": "dropped"},
    ]
    found = totals(1, lines, {}, 0.0, named=lambda loss, score: {"loss": loss, "accuracy": score})
    wanted = {"train_loss": 7.0, "local_loss": 1.5, "loss": 1.5, "accuracy": 0.5}
    wanted |= {"bytes_up": 13, "bytes_down": 30, "clients": 2, "dropped": 1}
    assert {name: found[name] for name in wanted} == wanted


def test_a_nan_loss_is_no_nan_in_the_logs(lab: Any, noise: Any) -> None:
    ran = lab.run(FedIT(), client=noise(metrics={"loss": math.nan, "local_accuracy": math.nan}))
    assert len(ran.lines("metrics.jsonl")) == 2  # `lines` refuses NaN, which is no JSON
    assert len(ran.lines("clients.jsonl")) == 6


def test_a_client_without_rows_of_its_own_or_diverged_does_not_spoil_the_mean(lab: Any) -> None:
    def change(replies: list[Message]) -> list[Message]:
        for i, reply in enumerate(replies):
            own = [(math.nan, math.nan), (2.0, 0.5), (math.inf, 0.9)][i]
            more = dict(zip(("local_loss", "local_accuracy"), own, strict=True))
            reply.content["metrics"] = MetricRecord(dict(reply.content.metric_records["metrics"]) | more)
        return replies

    (metrics,) = lab.run(FedIT(), rounds=1, change=change).lines("metrics.jsonl")
    # The diverged one counts in neither.
    assert (metrics["local_loss"], metrics["local_accuracy"]) == (2.0, 0.5)


def test_nothing_trained_is_told(lab: Any, noise: Any) -> None:
    assert "the adapter did not move" in lab.run(FedIT(), client=noise(still=True)).text
    assert "did not move" not in lab.run(FedIT()).text


def test_a_terminal_shows_the_run(lab: Any) -> None:
    file = StringIO()
    lab.run(FedIT(), console=Console(file=file, force_terminal=True, width=160))
    shown = file.getvalue()
    for heading in ("round", "loss", "accuracy", "down", "up", "clients", "left"):
        assert heading in shown
    assert "2/2" in shown
    assert "MB" in shown
