"""What can be done with a run's folder afterwards: export its adapter or a merged model, and verify it."""

import hashlib
from pathlib import Path

import torch
from omegaconf import DictConfig

from fedlora.adapter import Adapter
from fedlora.client import Assignment
from fedlora.data import Dataset, collate, encode
from fedlora.engine import Memory, RunFolder
from fedlora.errors import CheckpointError, ConfigError, ModelError
from fedlora.evaluation import evaluate
from fedlora.models import Bank, by_peft, merge, save_adapter
from fedlora.protocol import Task, whole
from fedlora.strategy import Strategy

from .bases import load_base
from .build import build
from .rows import dataset_of
from .targets import Trust, make, read

NONE = Trust()


def export(run: Path, to: Path, merged: bool, trust: Trust = NONE) -> str:
    """Write a run's adapter in PEFT's form, or the base with it merged, into a new folder.

    Raises:
        CheckpointError: the run has no state.
        ConfigError: the folder is there already, or what the run trained is no LoRA of its model.
    """
    _check_new(to)
    config, dataset = _read(run, trust)
    strategy: Strategy = make(config, "strategy", Strategy)
    if strategy.personal:
        raise ConfigError(
            f"export: what all clients of {type(strategy).__name__} share is nobody's model; say --client N, "
            "where a client's own is an adapter"
        )
    _, state = RunFolder(run).read_state()
    base = load_base(config, dataset)
    adapter = state.whole()
    if apart := adapter.pairs.keys() - dict(base.model.named_modules()).keys():
        raise ConfigError(
            f"'{run}' trained an adapter beside the model, {sorted(apart)}, which PEFT cannot load; the "
            "clients' models are their own"
        )
    if not merged:
        save_adapter(adapter, base, to)
        return f"adapter of {len(adapter.pairs)} modules -> {to} (peft.PeftModel.from_pretrained)"
    merge(base, adapter)
    to.mkdir(parents=True, exist_ok=True)
    base.model.save_pretrained(str(to))
    base.tokenizer.save_pretrained(str(to))
    return f"merged model -> {to} (transformers' from_pretrained)"


def export_own(run: Path, client: int, to: Path, trust: Trust = NONE) -> str:
    """Write the adapter of one client's own model: what is shared, and the part that it keeps.

    Raises:
        CheckpointError: the run has no state.
        ConfigError: the folder is there already, there is no such client, or it keeps no part of its own.
    """
    _check_new(to)
    job = build(_read(run, trust)[0])
    if not 0 <= client < len(job.ranks):
        raise ConfigError(f"--client: expected 0 to {len(job.ranks) - 1}, got {client}")
    round, state = RunFolder(run).read_state()
    task = job.strategy.task(state, job.peer(client, job.ranks[client]))
    if not task.own():
        raise ConfigError(
            f"--client: what a client of {type(job.strategy).__name__} keeps is no adapter that PEFT could "
            "load; of a strategy with one global model, leave --client out"
        )
    memory = Memory(run / "checkpoint" / "clients").read(client, round + 1)
    own = Assignment(client, round + 1, job.rules.seed, task, [], memory).start
    save_adapter(whole(own, task.fold), job.base, to)
    return f"adapter of client {client} -> {to} (peft.PeftModel.from_pretrained)"


def verify(run: Path, trust: Trust = NONE) -> str:
    """Check that a run's adapter is what its summary says, through PEFT alone.

    Raises:
        CheckpointError: a hash, a logit or the accuracy differs.
    """
    from fedlora.report import read_run

    summary = read_run(run).summary
    file = run / "adapter" / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(
            f"'{run}' has no adapter/adapter_model.safetensors: a run of the head alone, or of a personal "
            "strategy, leaves none to verify"
        )
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != summary["adapter_sha256"]:
        raise CheckpointError(
            f"'{file}' has SHA-256 {found[:16]}, its summary says {str(summary['adapter_sha256'])[:16]}"
        )
    config, dataset = _read(run, trust)
    _, state = RunFolder(run).read_state()
    base = load_base(config, dataset)
    rows = encode(dataset.kind, dataset.test, dataset.labels, base.tokenizer, config.data.max_length)
    batch = collate(rows[:16], base.pad_id)
    with torch.no_grad(), Bank(base, [Task(state.adapter, fold=state.fold)]):
        ours = base.logits(batch)
    plain = by_peft(load_base(config, dataset), run / "adapter")
    with torch.no_grad():
        gap = float((plain.logits(batch) - ours).abs().max())
    if not gap < 1e-4:
        raise CheckpointError(f"PEFT's logits differ from the run's by {gap:.2e}, expected less than 1e-4")
    loss, right = evaluate(plain, [Task(Adapter({}))], [rows])[0]
    said = summary.get("accuracy", summary.get("token_accuracy"))
    if said is not None and abs(right - said) > 0.005:
        raise CheckpointError(f"PEFT reaches {right:.4f} on the test rows, the summary says {said:.4f}")
    return (
        f"ok: SHA-256 {found[:16]}..., logits of plain PEFT within {gap:.1e}, "
        f"loss {loss:.4f} and share of right answers {right:.4f} on {len(rows)} test rows"
    )


def _check_new(to: Path) -> None:
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to: '{to}' is there already and not empty; name a new folder")


def _read(run: Path, trust: Trust) -> tuple[DictConfig, Dataset]:
    config = read(run, trust)
    return config, dataset_of(config)
