"""Run folders as the engine leaves them, made by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A folder of two rounds and two clients; keyword arguments replace keys of the summary or the config."""

    def make(
        name: str = "run",
        target: str = "fedlora.strategies.FlexLoRA",
        config: dict[str, Any] | None = None,
        metrics: list[dict[str, Any]] | None = None,
        clients: list[dict[str, Any]] | None = None,
        **summary: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        sizes = {"bytes_down": 1_500_000, "bytes_up": 500_000}
        rounds = [
            {
                "round": 1,
                "loss": 0.9,
                "accuracy": 0.7,
                "train_loss": 1.1,
                "dropped": 0,
                "epsilon": None,
                **sizes,
            },
            {
                "round": 2,
                "loss": 0.5,
                "accuracy": 0.9,
                "train_loss": 0.6,
                "dropped": 1,
                "epsilon": None,
                **sizes,
            },
        ]
        for row in rounds:
            row["aggregation_error"] = 0.3
        people = [
            {
                "round": at,
                "client": client,
                "name": f"client-{client}",
                "rank": 4,
                "examples": 240,
                "steps": 15,
                "loss": 1.2,
                "bytes_down": 750_000,
                "bytes_up": 250_000,
                "status": "ok",
            }
            for at in (1, 2)
            for client in (1, 0)
        ]
        final = {
            "strategy": "flexlora",
            "model": "minilm",
            "data": "trec",
            "rounds": 2,
            "clients": 2,
            "ranks": [4],
            "seed": 0,
            "accuracy": 0.9,
            "loss": 0.5,
            "initial": {"loss": 1.8, "accuracy": 0.2},
            "bytes_down": 3_000_000,
            "bytes_up": 1_000_000,
            "startup_seconds": 2.0,
            "wall_seconds": 70.0,
            "peak_memory_mb": 900,
            "adapter_sha256": "ab12" * 16,
            "versions": {"fedlora": "0.1.0", "torch": "2.9.1"},
            "metric": "accuracy",
        }
        settings = {"strategy": {"_target_": target}, "client": {"lr": 0.001}, "seed": 0, "out": str(folder)}
        (folder / "summary.json").write_text(json.dumps(final | summary))
        (folder / "config.yaml").write_text(yaml.safe_dump(settings | (config or {}), sort_keys=False))
        (folder / "metrics.jsonl").write_text(_lines(rounds if metrics is None else metrics))
        (folder / "clients.jsonl").write_text(_lines(people if clients is None else clients))
        return folder

    return make


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
