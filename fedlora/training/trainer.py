"""The K-client trainer: several clients learn in one pass over one frozen base, each as if it were alone.

Clients of small batches go in groups. A step of a group takes the next batch of every client that still has
one. Their rows are pooled, sorted by length and cut into micro-batches, which removes most padding and
changes no client's step: a row's loss is divided by its own client's batch, and a gradient reaches its own
client's factors only. Each client has its own optimizer, schedule and gradient clipping, and stops after its
own last batch. No group waits for another, so that they keep every core busy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ConfigError, ModelError
from fedlora.models import Base, MultiAdapterModel
from fedlora.privacy import Mechanism
from fedlora.training.batches import MANY, TOGETHER, Micro, budget, groups, micro_batches
from fedlora.training.evaluation import losses_of
from fedlora.training.rules.base import LocalRule, rules_of
from fedlora.training.workers import Workers


@dataclass(frozen=True)
class FitJob:
    """One client's work: where it starts and what it trains, and its batches in order.

    The task's local rules add their terms to every step. With a mechanism a step is the noised mean of the
    clipped gradients of its rows, to which the terms are added; a batch may be empty.
    """

    task: Task
    batches: Sequence[Sequence[Example]]
    mechanism: Mechanism | None = None


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


Gradients = list[tuple[nn.Parameter, Tensor | None]]
Parameters = dict[str, list[nn.Parameter]]
MakeOptimizer = Callable[[Parameters], torch.optim.Optimizer]
Schedule = Callable[[int, int], float]


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
    tokens = budget(tokens, base.device.type)
    mechanisms = [job.mechanism for job in jobs if job.mechanism is not None]
    if mechanisms and (clip is not None or len(mechanisms) < len(jobs)):
        raise ConfigError("private and other clients cannot train in one pass, nor with a second clip")
    with (
        MultiAdapterModel(base, [job.task for job in jobs], train=True, per_row=bool(mechanisms)) as bank,
        Workers(base) as workers,
    ):
        learners = [_Learner(job, bank, slot, make_optimizer) for slot, job in enumerate(jobs)]

        def backward(micro: Micro) -> tuple[Gradients, list[tuple[int, float]]]:
            each, _ = losses_of(base, bank, micro, len(jobs))
            shares = [learners[slot].share for slot, _ in micro]
            weighted = each * torch.tensor(shares, dtype=each.dtype, device=each.device)
            present = [p for slot in sorted({slot for slot, _ in micro}) for p in learners[slot].leaves]
            loss = each.sum() if mechanisms else weighted.sum()
            grads = torch.autograd.grad(loss, bank.leaves(present), allow_unused=True)
            told = [(slot, x) for (slot, _), x in zip(micro, weighted.tolist(), strict=True)]
            return list(zip(present, grads, strict=True)), told

        def finish(item: tuple[_Learner, int]) -> None:
            learner, step = item
            learner.step(clip, schedule, step)

        def train(slots: Sequence[int]) -> None:
            """All steps of clients that share micro-batches, and wait for nobody else."""
            for step in range(max(len(jobs[slot].batches) for slot in slots)):
                live = {slot: jobs[slot].batches[step] for slot in slots if step < len(jobs[slot].batches)}
                for slot, batch in live.items():
                    learners[slot].share = 1 / max(1, len(batch))
                rows = [(slot, row) for slot, batch in live.items() for row in batch]
                micros = micro_batches(rows, room, base.traits, not bank.unpadded)
                for grads, told in workers.map(backward, micros):
                    (_collect if mechanisms else _accumulate)(grads)
                    for slot, loss in told:
                        learners[slot].loss += loss
                workers.map(finish, [(learners[slot], step) for slot in live])

        cut = groups([job.batches for job in jobs], tokens or TOGETHER)
        # So many groups keep the cores busy by themselves, and need not be cut further for that.
        room = TOGETHER if tokens is None and len(cut) >= MANY else tokens
        workers.map(train, cut)
        return [learner.fitted(bank.adapter(slot)) for slot, learner in enumerate(learners)]


class _Learner:
    """One client while it trains: its parameters, its optimizer, and what has come of its steps so far."""

    def __init__(
        self, job: FitJob, bank: MultiAdapterModel, slot: int, make_optimizer: MakeOptimizer
    ) -> None:
        self.job, factors = job, bank.factors(slot)
        self.leaves = [p for found in factors.values() for p in found]
        self.rules = rules_of(job.task)
        self.named = {name: p for name, p in bank.parameters(slot).items() if p.requires_grad}
        self.start = {name: p.detach().clone() for name, p in self.named.items() if self.rules}
        self.optimizer = make_optimizer(factors)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.private = None if job.mechanism is None else job.mechanism.wrap(self.optimizer)
        self.share, self.loss = 0.0, 0.0

    def step(self, clip: float | None, schedule: Schedule | None, step: int) -> None:
        """Move by the gradient that is there, which is the noised one of the step's rows under privacy."""
        if self.private is not None:
            self.private.release(len(self.job.batches[step]))
        if step == 0:
            _all_called(self.leaves)
        for rule in self.rules:
            _add(rule, self.named, self.start)
        _step(self.optimizer, clip, self.rates, schedule, step, len(self.job.batches))

    def fitted(self, adapter: Adapter) -> FitResult:
        """The result."""
        steps, private = len(self.job.batches), self.private
        clipped = None if private is None else private.clipped / max(1, private.seen)
        return FitResult(adapter, self.loss / max(1, steps), steps, clipped)


def descend(
    base: Base,
    parameters: Parameters,
    losses: Callable[[list[Example]], Tensor],
    batches: Sequence[Sequence[Example]],
    make_optimizer: MakeOptimizer,
    schedule: Schedule | None = None,
    clip: float | None = None,
    tokens: int | None = None,
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
    tokens = budget(tokens, base.device.type)
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
            micros = micro_batches([(0, row) for row in batch], tokens, base.traits)
            for grads, loss in workers.map(backward, [(micro, len(batch)) for micro in micros]):
                _accumulate(grads)
                total += loss
            _step(optimizer, clip, rates, schedule, step, len(batches))
    return total / max(1, len(batches)), len(batches)


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


def _add(rule: LocalRule, parameters: Mapping[str, nn.Parameter], start: Mapping[str, Tensor]) -> None:
    """Add a rule's term to the gradients of what a client trains."""
    now = {name: parameter.detach() for name, parameter in parameters.items()}
    for name, term in rule.gradient(now, start).items():
        if name not in parameters or term.shape != parameters[name].shape:
            raise ConfigError(
                f"rule {type(rule).__name__}: expected terms for tensors that the client trains, in their "
                f"shapes, got {tuple(term.shape)} for '{name}'"
            )
        _accumulate([(parameters[name], term.to(parameters[name]))])


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
