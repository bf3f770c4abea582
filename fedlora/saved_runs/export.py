"""What can be done with a run's folder afterwards: export its adapter or a merged model, and verify it."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fedlora.config.instantiate import Trust, read
from fedlora.config.translate import kept_spec
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task, whole
from fedlora.data import Example
from fedlora.errors import CheckpointError, ConfigError, ModelError
from fedlora.models import (
    Base,
    MultiAdapterModel,
    Traits,
    by_peft,
    checkpoint_dtype,
    lacking,
    load,
    merge,
    save_adapter,
)
from fedlora.runner.spec import RunSpec
from fedlora.runner.spec_parts import ModelSpec
from fedlora.runner.task_file import TaskFile
from fedlora.server_optimizers.advance import without_optimizer
from fedlora.storage.client_state import ClientStore
from fedlora.storage.run_folder import RunFolder
from fedlora.training.batches import micro_batches
from fedlora.training.client import TrainRequest
from fedlora.training.evaluation import evaluate

NONE = Trust()
ROUNDING = 4  # rounding errors of one size differ by less, even where one sends a token to another expert


def export(run: Path, to: Path, merged: bool, trust: Trust = NONE, spec: RunSpec | None = None) -> str:
    """Write a run's adapter in PEFT's form, or the base with it merged, into a new folder.

    Raises:
        CheckpointError: the run has no state.
        ConfigError: the folder is there already, or what the run trained is no LoRA of its model.
    """
    _check_new(to)
    spec, learnt = spec or kept_spec(read(run, trust)), TaskFile.read(run)
    if learnt.personal:
        raise ConfigError(
            f"export: what all clients of {learnt.strategy} share is nobody's model; say --client N, "
            "where a client's own is an adapter"
        )
    _, state = RunFolder(run).result()
    dtype = torch.float32
    if merged:
        spec, dtype = _in_own_dtype(spec, learnt)
    base = learnt.load_base(spec)
    adapter = state.whole()
    if apart := lacking(base.model, adapter.pairs):
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
    spec, learnt = kept_spec(read(run, trust), strategy=True), TaskFile.read(run)
    if not 0 <= client < len(learnt.ranks):
        raise ConfigError(f"--client: expected 0 to {len(learnt.ranks) - 1}, got {client}")
    round, state = RunFolder(run).read_state()
    peer = spec.lora.scaling.peer(client, learnt.ranks[client], state.adapter.pairs)
    task = spec.strategy.task(without_optimizer(state), peer)
    if not task.own():
        raise ConfigError(
            f"--client: what a client of {learnt.strategy} keeps is no adapter that PEFT could "
            "load; of a strategy with one global model, leave --client out"
        )
    memory = ClientStore(run / "checkpoint" / "clients").read(client, round + 1)
    own = TrainRequest(client, round + 1, spec.seed, task, [], memory).start
    save_adapter(whole(own, task.base_delta), learnt.load_base(spec), to)
    return f"adapter of client {client} -> {to} (peft.PeftModel.from_pretrained)"


def verify(run: Path, trust: Trust = NONE, spec: RunSpec | None = None) -> str:
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
    spec, learnt = spec or kept_spec(read(run, trust)), TaskFile.read(run)
    dataset = learnt.tested(spec)
    _, state = RunFolder(run).result()
    base = learnt.load_base(spec)
    rows = dataset.task.encode(dataset.test, dataset.labels, base.tokenizer, spec.data.max_length)
    some = rows[:16]
    with MultiAdapterModel(base, [Task(state.adapter, base_delta=state.base_delta)]):
        ours, exact = _logits(base, some), _logits(_in_float32(base), some)

    def plain(widened: bool = False) -> Base:
        """PEFT's model; widened before PEFT puts the heads in, which it rounds to the base's precision."""
        alone = learnt.load_base(spec, partial(load, plain=True))
        found = by_peft(_in_float32(alone) if widened else alone, run / "adapter")
        # Row by row and without padding, as nothing of ours can be wrong then.
        return replace(found, traits=Traits(limit=0, stateful=base.traits.stateful))

    as_used = plain()
    loss, right = evaluate(as_used, [Task(Adapter({}))], [rows])[0]
    peft = _logits(as_used, some)
    if as_used.model.dtype != torch.float32:
        del as_used
        as_used = plain(widened=True)
    gap = _check_logits(exact, _logits(as_used, some), ours, peft)
    said = summary.get("accuracy", summary.get("token_accuracy"))
    coarse, where = _coarseness(spec.model), f"{spec.evaluate.rows} rows"
    one = 1 / len(rows) if rows and coarse > 1 else 0.0  # rounding may turn a row, of however few
    if said is not None and abs(right - said) > 0.005 * coarse + one:
        raise CheckpointError(f"PEFT reaches {right:.4f} on the {where}, the summary says {said:.4f}")
    expected = summary.get("loss")
    if expected is not None and abs(loss - expected) > 1e-3 * coarse * max(1, loss):
        raise CheckpointError(f"PEFT has loss {loss:.4f} on the {where}, the summary says {expected:.4f}")
    return (
        f"ok: SHA-256 {found[:16]}..., logits of plain PEFT within {gap:.1e}, "
        f"loss {loss:.4f} and share of right answers {right:.4f} on {len(rows)} {where}"
    )


@torch.no_grad()
def _logits(base: Base, rows: Sequence[Example]) -> list[Tensor]:
    """The logits of each row as the base feeds them, in float64: (labels,), or (tokens, vocabulary)."""
    found = {}
    for micro in micro_batches(list(enumerate(rows)), None, base.traits):
        batch = base.collate([row for _, row in micro])
        real = batch.inputs["attention_mask"].bool()
        for (at, _), one, mask in zip(micro, base.logits(batch).double().cpu(), real, strict=True):
            found[at] = one[mask] if base.task.per_token else one
    return [found[at] for at in range(len(rows))]


def _in_float32(base: Base) -> Base:
    """The base with its weights widened, in place; as it is where they are quantised, or wide already."""
    if all(p.dtype in (torch.bfloat16, torch.float16, torch.float32) for p in base.model.parameters()):
        base.model.float()
    return base


def _check_logits(
    exact: Sequence[Tensor], peft_exact: Sequence[Tensor], ours: Sequence[Tensor], peft: Sequence[Tensor]
) -> float:
    """The largest difference of logits in float32 between the run's adapter and PEFT's.

    On the same weights, widened to float32, both must agree to a ten-thousandth of the largest logit. In the
    run's own dtype the run's may be as far from these as PEFT's are, up to a factor, since rounding differs.

    Raises:
        CheckpointError: they differ by more.
    """
    true, size = torch.cat([x.flatten() for x in peft_exact]), max(float(x.abs().max()) for x in peft_exact)
    gap = float((torch.cat([x.flatten() for x in exact]) - true).abs().max())
    if not gap <= 1e-4 * max(1, size):
        raise CheckpointError(
            f"PEFT's logits differ from the run's by {gap:.2e}, expected at most 1e-4 of {max(1, size):.1f}"
        )
    far, usual = (
        float((torch.cat([x.flatten() for x in y]) - true).square().mean().sqrt()) for y in (ours, peft)
    )
    if not far <= 1e-4 * max(1, size) + ROUNDING * usual:
        raise CheckpointError(
            f"the run's logits are {far:.2e} from those in float32, PEFT's {usual:.2e}, expected at most "
            f"{ROUNDING} times that"
        )
    return gap


def _coarseness(model: ModelSpec) -> float:
    """How much farther apart two ways of computing the same may be than in float32."""
    return 20.0 if model.dtype == "bfloat16" or model.quantize else 1.0


def _check_new(to: Path) -> None:
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to: '{to}' is there already and not empty; name a new folder")


def _in_own_dtype(spec: RunSpec, learnt: TaskFile) -> tuple[RunSpec, torch.dtype]:
    """The settings that load a base in the precision of its checkpoint, and this precision.

    ΔW is added in float64 and rounded once, and the merged model takes the room of the base. A precision that
    we do not load, such as float16, leaves the settings, and the model is cast when it is merged.
    """
    dtype = checkpoint_dtype(learnt.base) or getattr(torch, spec.model.dtype)
    if (name := str(dtype).removeprefix("torch.")) in ("float32", "bfloat16", "float64"):
        spec = replace(spec, model=replace(spec.model, dtype=name))
    return spec, dtype
