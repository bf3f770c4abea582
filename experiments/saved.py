"""What can be done with a run's folder afterwards: export its adapter or a merged model, and verify it."""

import hashlib
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from fedlora.adapter import Adapter
from fedlora.client import Assignment
from fedlora.data import collate, encode
from fedlora.engine import Memory, RunFolder
from fedlora.errors import CheckpointError, ConfigError, ModelError
from fedlora.evaluation import evaluate
from fedlora.models import Bank, by_peft, checkpoint_dtype, merge, save_adapter
from fedlora.protocol import Task, whole
from fedlora.strategy import Strategy

from .bases import lora_of
from .learnt import Learnt
from .targets import Trust, make, read

NONE = Trust()


def export(run: Path, to: Path, merged: bool, trust: Trust = NONE) -> str:
    """Write a run's adapter in PEFT's form, or the base with it merged, into a new folder.

    Raises:
        CheckpointError: the run has no state.
        ConfigError: the folder is there already, or what the run trained is no LoRA of its model.
    """
    _check_new(to)
    config, learnt = read(run, trust), Learnt.read(run)
    if learnt.personal:
        raise ConfigError(
            f"export: what all clients of {learnt.strategy} share is nobody's model; say --client N, "
            "where a client's own is an adapter"
        )
    _, state = RunFolder(run).read_state()
    dtype = torch.float32
    if merged:
        config, dtype = _in_own_dtype(config, learnt)
    base = learnt.load_base(config)
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
    base.model.to(dtype)
    to.mkdir(parents=True, exist_ok=True)
    base.model.save_pretrained(str(to))
    base.tokenizer.save_pretrained(str(to))
    return f"merged model in {str(dtype).removeprefix('torch.')} -> {to} (transformers' from_pretrained)"


def export_own(run: Path, client: int, to: Path, trust: Trust = NONE) -> str:
    """Write the adapter of one client's own model: what is shared, and the part that it keeps.

    Raises:
        CheckpointError: the run has no state.
        ConfigError: the folder is there already, there is no such client, or it keeps no part of its own.
    """
    _check_new(to)
    config, learnt = read(run, trust), Learnt.read(run)
    if not 0 <= client < len(learnt.ranks):
        raise ConfigError(f"--client: expected 0 to {len(learnt.ranks) - 1}, got {client}")
    round, state = RunFolder(run).read_state()
    strategy: Strategy = make(config, "strategy", Strategy)
    task = strategy.task(state, lora_of(config).peer(client, learnt.ranks[client], state.adapter.pairs))
    if not task.own():
        raise ConfigError(
            f"--client: what a client of {learnt.strategy} keeps is no adapter that PEFT could "
            "load; of a strategy with one global model, leave --client out"
        )
    memory = Memory(run / "checkpoint" / "clients").read(client, round + 1)
    own = Assignment(client, round + 1, config.seed, task, [], memory).start
    save_adapter(whole(own, task.fold), learnt.load_base(config), to)
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
    config, learnt = read(run, trust), Learnt.read(run)
    dataset = learnt.tested(config)
    _, state = RunFolder(run).read_state()
    base = learnt.load_base(config)
    rows = encode(dataset.kind, dataset.test, dataset.labels, base.tokenizer, config.data.max_length)
    batch = collate(rows[:16], base.pad_id)
    with torch.no_grad(), Bank(base, [Task(state.adapter, fold=state.fold)]):
        ours = base.logits(batch)
    plain = by_peft(learnt.load_base(config), run / "adapter")
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


def _in_own_dtype(config: DictConfig, learnt: Learnt) -> tuple[DictConfig, torch.dtype]:
    """The settings that load a base in the precision of its checkpoint, and this precision.

    ΔW is added in float64 and rounded once, and the merged model takes the room of the base. A precision that
    we do not load, such as float16, leaves the settings, and the model is cast when it is merged.
    """
    dtype = checkpoint_dtype(learnt.base) or getattr(torch, config.model.dtype)
    if (name := str(dtype).removeprefix("torch.")) in ("float32", "bfloat16", "float64"):
        config = OmegaConf.merge(config, {"model": {"dtype": name}})  # type: ignore[assignment]
    return config, dtype
