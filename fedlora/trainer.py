"""The K-client trainer: several clients learn in one pass over one frozen base, each as if it were alone.

A step takes the next batch of every client that still has one. Their rows are pooled, sorted by length and
cut into micro-batches, which removes most padding and changes no client's step: a row's loss is divided by
its own client's batch, and a gradient reaches its own client's factors only. Each client has its own
optimizer, schedule and gradient clipping, and stops after its own last batch.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.adapter import Adapter
from fedlora.batches import Micro, micro_batches
from fedlora.data import Example, collate
from fedlora.errors import ConfigError, ModelError
from fedlora.models import Bank, Base
from fedlora.privacy import Mechanism
from fedlora.protocol import Tail, Task
from fedlora.workers import Workers


@dataclass(frozen=True)
class Job:
    """One client's work: where it starts and what it trains, and its batches in order.

    With a mechanism a step is the noised mean of the clipped gradients of its rows; a batch may be empty.
    """

    task: Task
    batches: Sequence[Sequence[Example]]
    mechanism: Mechanism | None = None


@dataclass(frozen=True)
class Fitted:
    """One client's result.

    Args:
        adapter: what was trained.
        loss: the mean over its steps.
        steps: their number.
        clipped: the share of the rows whose gradient was longer than the mechanism's clip; None without one.
    """

    adapter: Adapter
    loss: float
    steps: int
    clipped: float | None = None


Gradients = list[tuple[nn.Parameter, Tensor | None]]
Parameters = dict[str, list[nn.Parameter]]
MakeOptimizer = Callable[[Parameters], torch.optim.Optimizer]
Schedule = Callable[[int, int], float]


def fit(
    base: Base,
    jobs: Sequence[Job],
    make_optimizer: MakeOptimizer,
    schedule: Schedule | None = None,
    clip: float | None = None,
    tokens: int = 512,
) -> list[Fitted]:
    """Train every job's adapter; the result of each is what it would be alone, up to rounding.

    Args:
        base: the frozen model.
        jobs: one a client; all with a mechanism, or none.
        make_optimizer: from a client's parameters, grouped as "A", "B" and "head", to its optimizer.
        schedule: (step, steps) -> factor of the learning rate, step counting from 0; None keeps it constant.
        clip: the largest norm of a client's gradient over all it trains; None does not clip. Not for jobs
            with a mechanism, which has its own.
        tokens: padded tokens a micro-batch holds at most; a longer row makes one of its own.

    A client that diverges ends in non-finite tensors of its own; the others do not notice.
    """
    steps = [len(job.batches) for job in jobs]
    losses = [0.0] * len(jobs)
    mechanisms = [job.mechanism for job in jobs if job.mechanism is not None]
    if mechanisms and (clip is not None or len(mechanisms) < len(jobs)):
        raise ConfigError("private and other clients cannot train in one pass, nor with a second clip")
    with (
        Bank(base, [job.task for job in jobs], train=True, per_row=bool(mechanisms)) as bank,
        Workers(base) as workers,
    ):
        factors = [bank.factors(slot) for slot in range(len(jobs))]
        optimizers = [make_optimizer(own) for own in factors]
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        leaves = [[p for found in own.values() for p in found] for own in factors]
        private = [m.wrap(optimizer) for m, optimizer in zip(mechanisms, optimizers, strict=False)]

        def backward(micro: Micro) -> tuple[Gradients, list[tuple[int, float]]]:
            each, _ = _forward(base, bank, micro, len(jobs))
            counts = [share[slot] for slot, _ in micro]
            weighted = each * torch.tensor(counts, dtype=each.dtype, device=each.device)
            present = [p for slot in sorted({slot for slot, _ in micro}) for p in leaves[slot]]
            loss = each.sum() if private else weighted.sum()
            grads = torch.autograd.grad(loss, bank.leaves(present), allow_unused=True)
            told = [(slot, x) for (slot, _), x in zip(micro, weighted.tolist(), strict=True)]
            return list(zip(present, grads, strict=True)), told

        for step in range(max(steps)):
            live = {slot: job.batches[step] for slot, job in enumerate(jobs) if step < steps[slot]}
            share = {slot: 1 / max(1, len(batch)) for slot, batch in live.items()}
            rows = [(slot, row) for slot, batch in live.items() for row in batch]
            for grads, told in workers.map(backward, micro_batches(rows, tokens)):
                (_collect if private else _accumulate)(grads)
                for slot, loss in told:
                    losses[slot] += loss
            if private:
                workers.map(lambda item: private[item[0]].release(len(item[1])), list(live.items()))
            if step == 0:
                _all_called([p for slot in live for p in leaves[slot]])
            for slot in live:
                if (tail := jobs[slot].task.tail) is not None:
                    _press(factors[slot], tail)
                _step(optimizers[slot], clip, rates[slot], schedule, step, steps[slot])
        return [
            Fitted(
                bank.adapter(slot),
                losses[slot] / max(1, steps[slot]),
                steps[slot],
                private[slot].clipped / max(1, private[slot].seen) if private else None,
            )
            for slot in range(len(jobs))
        ]


def descend(
    base: Base,
    parameters: Parameters,
    losses: Callable[[list[Example]], Tensor],
    batches: Sequence[Sequence[Example]],
    make_optimizer: MakeOptimizer,
    schedule: Schedule | None = None,
    clip: float | None = None,
    tokens: int = 512,
) -> tuple[float, int]:
    """One client's steps on a loss of its own, in place; the mean loss over them, and their number.

    Args:
        base: the frozen model, for its device.
        parameters: what is trained, in groups that `make_optimizer` knows; the loss need not reach all of it.
        losses: one loss a row of a micro-batch, (rows,); called from several threads.
        batches: in order, a step each.
        make_optimizer: as for `fit`.
        schedule: as for `fit`.
        clip: as for `fit`.
        tokens: as for `fit`.
    """
    leaves = [p for found in parameters.values() for p in found]
    optimizer, total = make_optimizer(parameters), 0.0
    rates = [group["lr"] for group in optimizer.param_groups]

    def backward(item: tuple[Micro, int]) -> tuple[Gradients, float]:
        micro, size = item
        loss = losses([row for _, row in micro]).sum() / size
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return list(zip(leaves, grads, strict=True)), loss.item()

    with Workers(base) as workers:
        for step, batch in enumerate(batches):
            micros = micro_batches([(0, row) for row in batch], tokens)
            for grads, loss in workers.map(backward, [(micro, len(batch)) for micro in micros]):
                _accumulate(grads)
                total += loss
            _step(optimizer, clip, rates, schedule, step, len(batches))
    return total / max(1, len(batches)), len(batches)


def measure(
    base: Base,
    scores: Callable[[list[Example]], tuple[Tensor, Tensor]],
    rows: Sequence[Example],
    tokens: int = 1024,
) -> tuple[float, float]:
    """The means of two numbers a row, such as its loss and its share of right answers; (nan, nan) of none.

    Args:
        base: the frozen model, for its device.
        scores: the numbers of a micro-batch's rows, both (rows,); called from several threads.
        rows: all rows.
        tokens: padded tokens a micro-batch holds at most.
    """

    @torch.no_grad()
    def sums(micro: Micro) -> list[float]:
        return [float(found.double().sum()) for found in scores([row for _, row in micro])]

    with Workers(base) as workers:
        found = list(workers.map(sums, micro_batches([(0, row) for row in rows], tokens)))
    if not rows:
        return math.nan, math.nan
    return math.fsum(f[0] for f in found) / len(rows), math.fsum(f[1] for f in found) / len(rows)


def _accumulate(grads: Gradients) -> None:
    """Add gradients, in the order of micro-batches whichever was done first."""
    for parameter, grad in grads:
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)


def _collect(grads: Gradients) -> None:
    """Keep the rows' gradients of a micro-batch with their parameters, for the mechanism."""
    for parameter, rows in grads:
        if rows is not None:
            held = getattr(parameter, "grad_sample", None)
            parameter.grad_sample = [rows] if held is None else [*held, rows]  # type: ignore[attr-defined]


def _press(factors: Parameters, tail: Tail) -> None:
    """Add the gradient of HetLoRA's λ · Σ_m ‖B_m[:, ⌊γr⌋:]‖ · ‖A_m[⌊γr⌋:, :]‖, zero off the tail."""
    pairs = list(zip(factors.get("A", []), factors.get("B", []), strict=True))
    if tail.penalty and pairs:
        norms = [B[:, tail.start(len(A)) :].norm() * A[tail.start(len(A)) :].norm() for A, B in pairs]
        (tail.penalty * torch.stack(norms).sum()).backward()  # type: ignore[no-untyped-call]


def _all_called(parameters: Sequence[nn.Parameter]) -> None:
    """Raise ModelError where a tensor to train gets no gradient: its layer's forward is never called."""
    if silent := sum(parameter.grad is None for parameter in parameters):
        raise ModelError(
            f"{silent} of {len(parameters)} tensors to train got no gradient, since this model never calls "
            "their layers; choose other lora.targets"
        )


def _step(
    optimizer: torch.optim.Optimizer,
    clip: float | None,
    rates: Sequence[float],
    schedule: Schedule | None,
    step: int,
    steps: int,
) -> None:
    """One client's step: clip, set the rate of this step, move, forget the gradient."""
    if clip is not None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    factor = 1.0 if schedule is None else schedule(step, steps)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _forward(base: Base, bank: Bank, micro: Micro, slots: int) -> tuple[Tensor, Tensor]:
    """Losses and shares of right answers of a micro-batch's rows."""
    held = Counter(slot for slot, _ in micro)
    bank.route([held[slot] for slot in range(slots)])
    return base.losses(collate([row for _, row in micro], base.pad_id))


def evaluate(
    base: Base, tasks: Sequence[Task], rows: Sequence[Sequence[Example]], tokens: int = 1024
) -> list[tuple[float, float]]:
    """The mean loss and the mean share of right answers of each task's adapter, as it is, on its own rows.

    Args:
        base: the frozen model.
        tasks: one a slot.
        rows: the rows of each; (nan, nan) where there are none.
        tokens: padded tokens a micro-batch holds at most.
    """
    totals = [[0.0, 0.0] for _ in tasks]
    micros = micro_batches([(slot, row) for slot, own in enumerate(rows) for row in own], tokens)
    with Bank(base, tasks) as bank, Workers(base) as workers:

        @torch.no_grad()
        def measure(micro: Micro) -> tuple[list[float], list[float]]:
            loss, right = _forward(base, bank, micro, len(tasks))
            return loss.tolist(), right.tolist()

        for micro, found in zip(micros, workers.map(measure, micros), strict=True):
            for (slot, _), one, hit in zip(micro, *found, strict=True):
                totals[slot][0] += one
                totals[slot][1] += hit
    return [
        (loss / len(own), right / len(own)) if own else (math.nan, math.nan)
        for (loss, right), own in zip(totals, rows, strict=True)
    ]
