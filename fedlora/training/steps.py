"""The steps of local training: what moves a client's parameters by their gradients, each client by itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ConfigError, ModelError
from fedlora.models import MultiAdapterModel
from fedlora.privacy import Mechanism
from fedlora.training.gradients import Gathering, accumulate
from fedlora.training.rules.base import LocalRule, RoundStart, Term, part_of
from fedlora.training.workers import Workers


@dataclass(frozen=True)
class FitJob:
    """One client's work: where it starts and what it trains, and its batches in order.

    The task's local rules add their terms to every step. With a mechanism a step is the noised mean of the
    clipped gradients of its rows, to which the terms are added; a batch may be empty. The rates of all its
    steps are multiplied with `rate`, beside what the schedule of the steps does. `memory` is what the client
    kept, its rules' among it, behind the place of each in `task.method`: "0/NAME".
    """

    task: Task
    batches: Sequence[Sequence[Example]]
    mechanism: Mechanism | None = None
    rate: float = 1.0
    memory: Mapping[str, Tensor] = field(default_factory=dict)


Parameters = dict[str, list[nn.Parameter]]
MakeOptimizer = Callable[[Parameters], torch.optim.Optimizer]
Schedule = Callable[[int, int], float]


@dataclass(frozen=True)
class How:
    """How a step moves: the optimizer, the largest norm of a client's gradient, the rate's factor."""

    make_optimizer: MakeOptimizer
    clip: float | None = None
    schedule: Schedule | None = None

    def factor(self, step: int, steps: int, rate: float = 1.0) -> float:
        """What the rates are multiplied with in a step, from 0, of so many; `rate` is that of all steps."""
        return rate if self.schedule is None else rate * self.schedule(step, steps)


class Learner:
    """What a client trains: its parameters, and what its rules add to their gradients."""

    def __init__(self, job: FitJob, bank: MultiAdapterModel, slot: int) -> None:
        self.job = job
        rules = [(at, part) for at, part in enumerate(job.task.method) if isinstance(part, LocalRule)]
        self.named = {name: p for name, p in bank.parameters(slot).items() if p.requires_grad}
        start = {name: p.detach().clone() for name, p in self.named.items() if rules}
        self._terms: list[tuple[LocalRule, Term]] = [
            (rule, rule.term(RoundStart(job.task.adapter, start, part_of(job.memory, at))))
            for at, rule in rules
        ]

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return len(self.job.batches)

    def add_rules(self) -> None:
        """Add the rules' terms to the gradients."""
        for rule, term in self._terms:
            _add(rule, term, self.named)

    def finish(self) -> None:
        """Forget what the rules hold, as large as an adapter, after the last step."""
        self._terms = []


class _Optimizer:
    """A client's optimizer, at the rates that it began with."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.rates = [group["lr"] for group in optimizer.param_groups]


class Apart:
    """Each client has an optimizer of its own.

    Args:
        jobs: one a slot.
        bank: holds what they train.
        how: the steps.
        gathering: how their gradients come to the parameters.
    """

    lockstep = False

    def __init__(
        self, jobs: Sequence[FitJob], bank: MultiAdapterModel, how: How, gathering: Gathering
    ) -> None:
        self._bank, self._how, self._gathering = bank, how, gathering
        self._learners = [Learner(job, bank, slot) for slot, job in enumerate(jobs)]
        self._groups = [bank.factors(slot) for slot in range(len(jobs))]
        self._optimizers: dict[int, _Optimizer] = {}  # of the clients that are on their way

    def begin(self, slots: Sequence[int]) -> None:
        """Make the optimizers of these clients, before the gradients of their first step."""
        for slot in slots:
            optimizer = self._how.make_optimizer(self._groups[slot])
            self._optimizers[slot] = _Optimizer(optimizer)
            self._gathering.begin(slot, optimizer)

    def step(self, slots: Sequence[int], step: int, workers: Workers) -> None:
        """Move these clients by the gradients that are there, noised ones under privacy.

        Raises:
            ModelError: in the first step, a parameter has no gradient.
        """
        batches = {slot: self._learners[slot].job.batches[step] for slot in slots}
        self._gathering.release({slot: len(batch) for slot, batch in batches.items()}, workers)
        workers.map(lambda slot: self._move(slot, step), slots)
        if self._bank.stacks:
            self._bank.stacks.moved()

    def adapter(self, slot: int) -> Adapter:
        """What a client has trained; the bank's own tensors, which nothing may train further."""
        return self._bank.adapter(slot, copy=False)

    def _move(self, slot: int, step: int) -> None:
        learner, own = self._learners[slot], self._optimizers[slot]
        if step == 0:
            silent = self._bank.stacks.silent if self._bank.stacks and not self._gathering.by_row else 0
            check_called([p for found in self._groups[slot].values() for p in found], silent)
        learner.add_rules()
        factor = self._how.factor(step, learner.steps, learner.job.rate)
        keep = self._bank.stacks is not None  # windows on what is there for all
        move(own.optimizer, self._how.clip, own.rates, factor, keep)
        if step + 1 == learner.steps:  # what an optimizer remembers is as large as two adapters
            del self._optimizers[slot]
            self._gathering.end(slot)
            learner.finish()


def check_called(parameters: Sequence[nn.Parameter], silent: int = 0) -> None:
    """Refuse a model that never calls the forward of a layer whose tensors are to be trained.

    Args:
        parameters: what has a gradient, unless the model is so.
        silent: others that are known to have none.

    Raises:
        ModelError: a tensor to train got no gradient.
    """
    if silent := silent + sum(parameter.grad is None for parameter in parameters):
        raise ModelError(
            f"{silent} of the tensors to train got no gradient, since this model never calls their layers; "
            "choose other lora.targets"
        )


def move(
    optimizer: torch.optim.Optimizer,
    clip: float | None,
    rates: Sequence[float],
    factor: float,
    keep: bool = False,
) -> None:
    """One client's step: clip, set the rate of this step, move, forget the gradient.

    Args:
        optimizer: the client's.
        clip: the largest norm of the gradient; None for any.
        rates: of the optimizer's groups.
        factor: what they are multiplied with.
        keep: whether gradients become zeros where they are, and not nothing.
    """
    if clip is not None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor
    optimizer.step()
    optimizer.zero_grad(set_to_none=not keep)


def _add(rule: LocalRule, term: Term, parameters: Mapping[str, nn.Parameter]) -> None:
    """Add a rule's terms to the gradients of what a client trains."""
    now = {name: parameter.detach() for name, parameter in parameters.items()}
    for name, added in term(now).items():
        if name not in parameters or added.shape != parameters[name].shape:
            raise ConfigError(
                f"rule {type(rule).__name__}: expected terms for tensors that the client trains, in their "
                f"shapes, got {tuple(added.shape)} for '{name}'"
            )
        accumulate([(parameters[name], added.to(parameters[name]))])
