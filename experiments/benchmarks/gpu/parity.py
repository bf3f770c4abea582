"""Parity: device against CPU, clients together against one by one, PEFT's logits, repeated rounds."""

import math
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fedlora.clients import LocalTraining
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.models import Base, MultiAdapterModel, Traits, by_peft, save_adapter
from fedlora.training.client import TrainRequest

from .bench import Bench, way
from .report import Table, shown
from .rows import Batches, questions, round_of, short
from .shapes import SMALL_MODELS, small_base, start

RANKS = (3, 8, 16)  # of the clients; not all are what a GPU's matrix unit likes
STEPS = 10
TIGHT = 1e-4
SPREAD = 0.05  # of B at the start, so that A moves from the first step on
COLUMNS = ["model", "fed as", "device to CPU", "CPU to float64", "fused to alone", "bf16: alone to float32"]
COLUMNS += ["bf16: fused to float32", "bf16: fused to alone", "PEFT's logits", "same hash", "bf16: same hash"]


def parity(bench: Bench) -> None:
    """Section 1: parity on small models of four architectures."""
    title = f"Parity: {len(RANKS)} clients of ranks {RANKS}, {STEPS} SGD steps, largest relative differences"
    table = bench.report.table(title, COLUMNS)
    goals: dict[str, list[bool]] = {}
    try:
        for name in SMALL_MODELS:
            if bench.left <= 0:
                bench.report.note(f"{name}: left out, the time is up")
                continue
            for what, met in _judged(bench, table, name).items():
                goals.setdefault(what, []).append(met)
    finally:  # what was judged before the time was up
        for what, each in goals.items():
            bench.report.goal(4, f"{what} ({sum(each)} of {len(each)} models)", all(each))


def _judged(bench: Bench, table: Table, name: str) -> dict[str, bool]:
    """Try one model, add its row, and return what it says of the goals."""
    base = small_base(name, bench.device, "float32")
    requests, client = _round(base)
    device = _trained(base, requests, client)
    cpu = _trained(small_base(name, "cpu", "float32"), requests, client)
    exact = _trained(small_base(name, "cpu", "float64"), requests, client)
    alone = _alone(base, requests, client)
    plain = small_base(name, bench.device, "float32", plain=True)
    half, wide = (small_base(name, bench.device, dtype, True) for dtype in ("bfloat16", "float32"))
    truth = _trained(wide, requests, client)
    fused16, alone16 = _trained(half, requests, client), _alone(half, requests, client)
    begun = [request.task.adapter for request in requests]
    gaps = {
        "device": gap(device, cpu, begun),
        "exact": gap(cpu, exact, begun),
        "fused": gap(device, alone, begun),
        "alone16": gap(alone16, truth, begun),
        "fused16": gap(fused16, truth, begun),
        "between16": gap(fused16, alone16, begun),
        "peft": _peft(base, plain, requests[-1], device[-1]),
    }
    same = _hashes(device) == _hashes(_trained(base, requests, client))
    same16 = _hashes(fused16) == _hashes(_trained(half, requests, client))
    table.row(name, way(base, requests[0].task.adapter), *gaps.values(), same, same16)
    judged = {
        f"float32 on the device equals the CPU's to {shown(TIGHT)}": gaps["device"] <= TIGHT,
        "clients together equal one by one in float32": gaps["fused"] <= TIGHT,
        "in bfloat16 clients together are as near to float32 as one by one": gaps["fused16"]
        <= 1.25 * gaps["alone16"],
        "plain PEFT gives the exported adapter's logits": gaps["peft"] <= TIGHT,
        "a repeated round has the same hash": same and same16,
    }
    if not (same and same16):
        named = ", ".join(_forbidding(half if same else base, requests, client)) or "torch names none"
        bench.report.note(f"{name}: operations that are not deterministic: {named}")
    return judged


def gap(found: Sequence[Adapter], wanted: Sequence[Adapter], begun: Sequence[Adapter]) -> float:
    """The largest relative difference of a tensor between two results, by how far the second has moved.

    A tensor that has hardly moved, such as of a layer whose gradients cancel, counts as if it had moved by a
    hundredth of what its client has moved in all.
    """
    worst = 0.0
    for one, other, first in zip(found, wanted, begun, strict=True):
        at = dict(first.tensors())
        ends = {name: tensor.double().cpu() for name, tensor in other.tensors()}
        moved = {name: float((end - at[name].double()).norm()) for name, end in ends.items()}
        least = max(1e-12, 0.01 * math.hypot(*moved.values()))
        for name, tensor in one.tensors():
            off = float((tensor.double().cpu() - ends[name]).norm())
            share = off / max(least, moved[name])
            worst = worst if share <= worst else share  # also where it is no number
            if math.isnan(worst):
                return worst
    return worst


def _round(base: Base) -> tuple[list[TrainRequest], LocalTraining]:
    """The clients' work: rows of the model's kind, ranks that differ, plain SGD."""
    batches = Batches("parity", 4, short if base.task.per_token else questions)
    client = LocalTraining(
        lr=0.1,
        head_lr=None,
        batch_size=batches.rows,
        steps=STEPS,
        optimizer=torch.optim.SGD,
        micro_tokens=2048,  # one micro-batch a step, on a CPU as on a GPU
    )
    return round_of(base, [start(base, rank, SPREAD) for rank in RANKS], batches, 2), client


def _trained(base: Base, requests: Sequence[TrainRequest], client: LocalTraining) -> list[Adapter]:
    return [result.adapter for result in client.train(base, requests)]


def _alone(base: Base, requests: Sequence[TrainRequest], client: LocalTraining) -> list[Adapter]:
    return [adapter for request in requests for adapter in _trained(base, [request], client)]


def _hashes(adapters: Sequence[Adapter]) -> list[str]:
    return [adapter.digest() for adapter in adapters]


@torch.no_grad()
def _peft(base: Base, plain: Base, request: TrainRequest, adapter: Adapter) -> float:
    """The largest relative difference between our logits and PEFT's, of the exported adapter."""
    rows = request.rows
    with MultiAdapterModel(base, [Task(adapter)]) as bank:
        bank.route([len(rows)])
        ours = _logits(base, rows)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapter, base, Path(folder))
        theirs = _logits(replace(by_peft(plain, Path(folder)), traits=Traits()), rows)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _logits(base: Base, rows: Sequence[Example]) -> Tensor:
    batch = base.collate(rows)
    found = base.logits(batch)
    return found[batch.inputs["attention_mask"].bool().to(found.device)] if base.task.per_token else found


def _forbidding(base: Base, requests: Sequence[TrainRequest], client: LocalTraining) -> list[str]:
    """The operations that torch warns of when it is asked to be deterministic."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            _trained(base, requests, client)
    finally:
        torch.use_deterministic_algorithms(False)
    words = {str(one.message).split(".")[0] for one in warned if "determin" in str(one.message)}
    return sorted(words)
