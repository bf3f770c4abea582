"""Whole runs of the command in this process, on a random model of two layers and made text."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

BASE = (
    "model=tiny",
    "data=tiny",
    "clients=3",
    "rounds=2",
    "ranks=4",
    "client.head_lr=3e-3",
    "+data.source.rows=48",
    "+data.source.test_rows=16",
)


def _strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@dataclass
class Result:
    """A run's folder, read."""

    path: Path

    @property
    def summary(self) -> dict[str, Any]:
        return _strict((self.path / "summary.json").read_text())  # type: ignore[no-any-return]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [_strict(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def clients(self) -> list[dict[str, Any]]:
        return [_strict(line) for line in (self.path / "clients.jsonl").read_text().splitlines()]

    @property
    def sha(self) -> str:
        found = hashlib.sha256((self.path / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
        assert found == self.summary["adapter_sha256"]
        return found


Run = Callable[..., Result]


@pytest.fixture(scope="session", autouse=True)
def _quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of its own, no network, and no pictures."""
    import fedlora.report

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(fedlora.report, "write_report", lambda runs, to, *more: to)
        yield


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`fedlora run` with these overrides on top of a small job, each composed once."""
    from fedlora.cli.run_job import run_job
    from fedlora.config.composition import compose

    composed = lru_cache(compose)

    def go(
        *overrides: str,
        out: Path | None = None,
        base: tuple[str, ...] = BASE,
        console: Console | None = None,
    ) -> Result:
        config = composed((*base, *overrides)).copy()
        config.out = str(out or tmp_path_factory.mktemp("run") / "out")
        return Result(run_job(config, console or Console()))

    return go


@pytest.fixture(scope="session")
def base() -> tuple[str, ...]:
    return BASE


@pytest.fixture(scope="session")
def result() -> type[Result]:
    return Result


@pytest.fixture(scope="session")
def flex(run: Run) -> Result:
    """One FlexLoRA run with mixed ranks that many tests read; none may change it."""
    return run("strategy=flexlora", "ranks=[2,4]", "rounds=3", "client.steps=12")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder of two layers, with the byte tokenizer of model=tiny."""
    import torch
    from tokenizers import decoders
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fedlora.models.packaged import tiny

    folder = tmp_path_factory.mktemp("models") / "tiny llama"
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    tokenizer.eos_token = "[UNK]"
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,  # large enough for a LoRA to have a say
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
