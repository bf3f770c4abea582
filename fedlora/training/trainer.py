"""The K-client trainer: several clients learn in one pass over one frozen base, each as if it were alone.

Clients of small batches go in groups. A step of a group takes the next batch of every client that still has
one. Their rows are pooled, sorted by length and cut into micro-batches, which removes most padding and
changes no client's step: a row's loss is divided by its own client's batch, and a gradient reaches its own
client's factors only. Each client has its own optimizer, schedule and gradient clipping, and stops after its
own last batch. No group waits for another, so that they keep every core busy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.core.adapter import Adapter
from fedlora.data import Example
from fedlora.errors import ConfigError
from fedlora.models import Base, MultiAdapterModel
from fedlora.training.batches import MANY, TOGETHER, Micro, groups, micro_batches
from fedlora.training.gradients import Gradients, accumulate, gathering_of
from fedlora.training.passes import Passes
from fedlora.training.steps import (
    FitJob,
    How,
    MakeOptimizer,
    Parameters,
    Schedule,
    move,
)
from fedlora.training.together import steps_of
from fedlora.training.workers import Workers


@dataclass(frozen=True)
class FitResult:
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


def fit(
    base: Base,
    jobs: Sequence[FitJob],
    make_optimizer: MakeOptimizer,
    schedule: Schedule | None = None,
    clip: float | None = None,
    tokens: int | None = None,
) -> list[FitResult]:
    """Train every job's adapter; the result of each is what it would be alone, up to rounding.

    Args:
        base: the frozen model.
        jobs: one a client; all with a mechanism, or none.
        make_optimizer: from a client's parameters, grouped as "A", "B" and "head", to its optimizer.
        schedule: (step, steps) -> factor of the learning rate, step counting from 0; None keeps it constant.
        clip: the largest norm of a client's gradient over all it trains; None does not clip. Not for jobs
            with a mechanism, which has its own.
        tokens: a micro-batch holds at most, padding included where the model needs it, and a step of clients
            that train together; a longer row makes a micro-batch of its own. None chooses by the rows.

    A client that diverges ends in non-finite tensors of its own; the others do not notice.
    """
    mechanisms = [job.mechanism for job in jobs if job.mechanism is not None]
    if mechanisms and (clip is not None or len(mechanisms) < len(jobs)):
        raise ConfigError("private and other clients cannot train in one pass, nor with a second clip")
    tasks = [job.task for job in jobs]
    with (
        MultiAdapterModel(base, tasks, True, per_row=bool(mechanisms), stacked=True) as bank,
        Workers(base) as workers,
    ):
        gathering = gathering_of(bank, mechanisms)
        team = steps_of(jobs, bank, How(make_optimizer, clip, schedule), gathering)
        passes = Passes(base, bank, len(jobs), gathering, workers)
        passes.measure(
            tokens, [(slot, row) for slot, job in enumerate(jobs) for row in next(iter(job.batches), ())]
        )

        def train(slots: Sequence[int]) -> list[tuple[int, float]]:
            """All steps of clients that share micro-batches, and wait for nobody else: their rows' losses."""
            owners: list[int] = []
            told: list[Tensor] = []
            team.begin(slots)
            for step in range(max(len(jobs[slot].batches) for slot in slots)):
                live = {slot: jobs[slot].batches[step] for slot in slots if step < len(jobs[slot].batches)}
                rows = [(slot, row) for slot, batch in live.items() for row in batch]
                shares = {slot: 1 / max(1, len(batch)) for slot, batch in live.items()}
                for micro, losses in passes.gradients(rows, shares, room):
                    owners += [slot for slot, _ in micro]
                    told.append(losses)
                team.step(list(live), step, workers)
            # Looked at here and not before: a GPU would have to be waited for at each step.
            return list(zip(owners, torch.cat(told).tolist() if told else [], strict=True))

        cut = [list(range(len(jobs)))]
        if not team.lockstep:
            cut = groups([job.batches for job in jobs], base.memory.limit(tokens) or TOGETHER)
        # So many groups keep the cores busy by themselves, and need not be cut further for that.
        room = TOGETHER if base.memory.limit(tokens) is None and len(cut) >= MANY else tokens
        totals = [0.0] * len(jobs)
        for slot, loss in (item for found in workers.map(train, cut) for item in found):
            totals[slot] += loss
        return [
            FitResult(
                adapter=team.adapter(slot),
                loss=total / max(1, len(job.batches)),
                steps=len(job.batches),
                clipped=gathering.clipped(slot),
            )
            for slot, (job, total) in enumerate(zip(jobs, totals, strict=True))
        ]


def descend(
    base: Base,
    parameters: Parameters,
    losses: Callable[[list[Example]], Tensor],
    batches: Sequence[Sequence[Example]],
    make_optimizer: MakeOptimizer,
    schedule: Schedule | None = None,
    clip: float | None = None,
    tokens: int | None = None,
    rate: float = 1.0,
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
        rate: what the rates of all steps are multiplied with.
    """
    tokens = base.memory.limit(tokens)
    how, leaves = How(make_optimizer, clip, schedule), [p for found in parameters.values() for p in found]
    optimizer, total = make_optimizer(parameters), 0.0
    rates = [group["lr"] for group in optimizer.param_groups]

    def backward(item: tuple[Micro, int]) -> tuple[Gradients, float]:
        micro, size = item
        loss = losses([row for _, row in micro]).sum() / size
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return list(zip(leaves, grads, strict=True)), loss.item()

    with Workers(base) as workers:
        for step, batch in enumerate(batches):
            micros = micro_batches([(0, row) for row in batch], tokens, base.traits)
            for grads, loss in workers.map(backward, [(micro, len(batch)) for micro in micros]):
                accumulate(grads)
                total += loss
            move(optimizer, clip, rates, how.factor(step, len(batches), rate))
    return total / max(1, len(batches)), len(batches)
